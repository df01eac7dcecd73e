package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/sockmesh/sockmesh/pkg/service"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	discoveryv1client "k8s.io/client-go/kubernetes/typed/discovery/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// apiSource watches an API server through shared informers, one per kind.
//
// The informers do what is hard: list, watch, resume, notice after an outage what was deleted meanwhile, back off.
// A transform turns each object into the trimmed one before it is stored, so full objects live for a moment only.
// Selectors keep out what is not ours at the server already: other nodes' pods, other proxies' Services.
type apiSource struct {
	*table
	log       *slog.Logger
	server    string
	informers map[kind]cache.SharedIndexInformer
	recorder  *apiRecorder

	mu     sync.Mutex
	broken map[kind]string // what went wrong last, until it works again
}

// notForeign and notHeadless leave out at the server what foreign and headless would leave out here.
const (
	notForeign  = "!" + labelServiceProxyName + "," + notHeadless
	notHeadless = "!" + labelHeadless
)

// NewAPI gives a source that watches an API server. RESTConfig makes the rest.Config.
func NewAPI(cfg Config, rc *rest.Config) (Source, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	binary := rest.CopyConfig(rc)
	binary.ContentType = runtime.ContentTypeProtobuf
	binary.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	core, err := corev1client.NewForConfig(binary)
	if err != nil {
		return nil, fmt.Errorf("API server %s: %w", rc.Host, err)
	}
	discovery, err := discoveryv1client.NewForConfig(binary)
	if err != nil {
		return nil, fmt.Errorf("API server %s: %w", rc.Host, err)
	}
	meta, err := metadata.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("API server %s: %w", rc.Host, err)
	}
	s := &apiSource{
		log:       cfg.Logger.With("source", "api-server"),
		server:    rc.Host,
		informers: map[kind]cache.SharedIndexInformer{},
		recorder:  newAPIRecorder(core, cfg.NodeName, cfg.Logger),
		broken:    map[kind]string{},
	}
	s.table = newTable(cfg, s.recorder)
	all := metav1.NamespaceAll
	s.watch(kindService, &corev1.Service{}, lister(core.Services(all), labels(notForeign)))
	s.watch(kindEndpointSlice, &discoveryv1.EndpointSlice{}, lister(discovery.EndpointSlices(all), labels(notHeadless)))
	s.watch(kindPod, &corev1.Pod{}, lister(core.Pods(all), fieldIs("spec.nodeName", cfg.NodeName)))
	s.watch(kindNode, &corev1.Node{}, lister(core.Nodes(), fieldIs("metadata.name", cfg.NodeName)))
	s.watch(kindNamespace, &metav1.PartialObjectMetadata{}, lister(meta.Resource(corev1.SchemeGroupVersion.WithResource("namespaces")), nil))
	return s, nil
}

// Run watches until ctx ends.
func (s *apiSource) Run(ctx context.Context) error {
	s.log.Info("watching the API server", "server", s.server, "node", s.cfg.NodeName)
	var wg sync.WaitGroup
	defer wg.Wait()
	s.recorder.start(ctx)
	for k, informer := range s.informers {
		registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { s.put(k, obj) },
			UpdateFunc: func(_, obj any) { s.put(k, obj) },
			DeleteFunc: s.drop,
		})
		if err != nil {
			return fmt.Errorf("watching %s: %w", k, err)
		}
		wg.Go(func() { informer.RunWithContext(ctx) })
		wg.Go(func() {
			select {
			case <-registration.HasSyncedChecker().Done():
				s.mend(k)
				s.listed(k)
			case <-ctx.Done():
			}
		})
	}
	s.run(ctx)
	return nil
}

// Status says what is seen.
func (s *apiSource) Status() Status {
	st := s.status(s.server)
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, problem := range s.broken {
		st.Errors = append(st.Errors, string(k)+": "+problem)
	}
	slices.Sort(st.Errors)
	return st
}

// Recorder publishes Events.
func (s *apiSource) Recorder() EventRecorder { return s.recorder }

// watch prepares the informer of a kind.
func (s *apiSource) watch(k kind, example runtime.Object, lw *cache.ListWatch) {
	informer := cache.NewSharedIndexInformerWithOptions(s.noticing(k, lw), example, cache.SharedIndexInformerOptions{})
	// Neither can fail before the informer runs.
	_ = informer.SetTransform(trim)
	_ = informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) { s.breaks(k, err) })
	s.informers[k] = informer
}

// noticing wraps a ListWatch so that a list or watch that works again clears the error shown for its kind.
func (s *apiSource) noticing(k kind, lw *cache.ListWatch) cache.ListerWatcher {
	list, watchFrom := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		found, err := list(ctx, o)
		if err == nil {
			s.mend(k)
		}
		return found, err
	}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (w watch.Interface, err error) {
		w, err = watchFrom(ctx, o)
		if err == nil {
			s.mend(k)
		} else {
			s.breaks(k, err)
		}
		return w, err
	}
	return lw
}

// breaks notes and logs an error once, however often it is met.
func (s *apiSource) breaks(k kind, err error) {
	problem := err.Error()
	s.mu.Lock()
	known := s.broken[k] != ""
	s.broken[k] = problem
	s.mu.Unlock()
	if !known {
		s.log.Warn("the API server cannot be watched; the last state stays, retrying", "kind", k, "server", s.server, "error", problem)
	}
}

func (s *apiSource) mend(k kind) {
	s.mu.Lock()
	known := s.broken[k] != ""
	delete(s.broken, k)
	s.mu.Unlock()
	if known {
		s.log.Info("watching the API server again", "kind", k, "server", s.server)
	}
}

// put hands an object on. A slice whose labels changed so that it serves no Service here any more is dropped.
func (s *apiSource) put(k kind, obj any) {
	h := obj.(*held)
	if h.value == nil {
		s.drop(h)
		return
	}
	if p, ok := h.value.(*Pod); ok && p.NodeName != s.cfg.NodeName {
		return // The field selector keeps these out; a server that ignored it would hand us another node's pods.
	}
	s.set(h.value)
}

func (s *apiSource) drop(obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	if h, ok := obj.(*held); ok {
		if h.value == nil {
			s.unset(&service.Slice{Name: service.Name{Namespace: h.Namespace, Name: h.Name}})
			return
		}
		s.unset(h.value)
	}
}

// held is an object as informers keep it: what they need of its metadata, and what trim left.
type held struct {
	metav1.ObjectMeta
	value any
}

// trim is the informers' transform. It may meet an object that it has seen before.
func trim(obj any) (any, error) {
	switch o := obj.(type) {
	case *held:
		return o, nil
	case *corev1.Service:
		return hold(&o.ObjectMeta, ConvertService(o)), nil
	case *discoveryv1.EndpointSlice:
		h := hold(&o.ObjectMeta, nil)
		if slice := ConvertSlice(o); slice != nil {
			h.value = slice // Not a nil *Slice in an interface.
		}
		return h, nil
	case *corev1.Pod:
		return hold(&o.ObjectMeta, convertPod(o)), nil
	case *corev1.Node:
		return hold(&o.ObjectMeta, ConvertNode(o)), nil
	case *metav1.PartialObjectMetadata:
		return hold(&o.ObjectMeta, convertNamespace(&o.ObjectMeta)), nil
	}
	return obj, nil
}

func hold(m *metav1.ObjectMeta, value any) *held {
	return &held{
		ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: types.UID(m.UID), ResourceVersion: m.ResourceVersion},
		value:      value,
	}
}

// labels and fieldIs limit what the server sends.
func labels(selector string) func(*metav1.ListOptions) {
	return func(o *metav1.ListOptions) { o.LabelSelector = selector }
}

func fieldIs(name, value string) func(*metav1.ListOptions) {
	return func(o *metav1.ListOptions) { o.FieldSelector = fields.OneTermEqualSelector(name, value).String() }
}

// lister adapts a typed client to informers.
func lister[L runtime.Object](client interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}, limit func(*metav1.ListOptions)) *cache.ListWatch {
	if limit == nil {
		limit = func(*metav1.ListOptions) {}
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			limit(&o)
			return client.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			limit(&o)
			return client.Watch(ctx, o)
		},
	}
}
