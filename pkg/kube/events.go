package kube

import (
	"context"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
)

// Ref names an object for an Event.
type Ref struct {
	APIVersion, Kind     string
	Namespace, Name, UID string
}

// An EventRecorder tells the owner of an object, on the object, what the data plane refuses or does not support.
type EventRecorder interface {
	// Warn publishes a warning; reason is one CamelCase word, message a sentence with the cure. It never blocks.
	Warn(on Ref, reason, message string)
}

// logRecorder is the recorder of a source that has nowhere to publish Events.
type logRecorder struct{ log *slog.Logger }

// Warn logs.
func (r logRecorder) Warn(on Ref, reason, message string) {
	r.log.Warn(message, "kind", on.Kind, "object", on.Namespace+"/"+on.Name, "reason", reason)
}

// apiRecorder logs and publishes. client-go's broadcaster queues without blocking, joins repeated Events and limits
// them per object, so a fleet of nodes with the same complaint does not flood the API server.
type apiRecorder struct {
	logRecorder
	broadcaster record.EventBroadcaster
	events      record.EventRecorder
	client      corev1client.EventsGetter
}

func newAPIRecorder(client corev1client.EventsGetter, node string, log *slog.Logger) *apiRecorder {
	b := record.NewBroadcaster()
	return &apiRecorder{
		logRecorder: logRecorder{log},
		broadcaster: b,
		// An ObjectReference is its own reference: no kind needs to be known to the scheme.
		events: b.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: "sockmesh-agent", Host: node}),
		client: client,
	}
}

func (r *apiRecorder) start(ctx context.Context) {
	r.broadcaster.StartRecordingToSink(&corev1client.EventSinkImpl{Interface: r.client.Events("")})
	context.AfterFunc(ctx, r.broadcaster.Shutdown)
}

// Warn logs and publishes.
func (r *apiRecorder) Warn(on Ref, reason, message string) {
	r.logRecorder.Warn(on, reason, message)
	r.events.Event(&corev1.ObjectReference{
		APIVersion: on.APIVersion, Kind: on.Kind, Namespace: on.Namespace, Name: on.Name, UID: types.UID(on.UID),
	}, corev1.EventTypeWarning, reason, message)
}
