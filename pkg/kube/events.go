package kube

import "log/slog"

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
