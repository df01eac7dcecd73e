package agent

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/pod"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// serviceUser, podFinder and proxyPods are whom objects talks to: the datapath, pkg/pod's Manager, the engine.
type serviceUser interface {
	SetService(*service.Service)
	DeleteService(service.Name)
	SetPods([]datapath.Pod)
	Synced(source string)
}

type podFinder interface {
	SetPod(pod.Spec)
	DeletePod(uid string)
}

// healthChecks is pkg/healthcheck's Services.
type healthChecks interface {
	Set(service.Name, *service.HealthCheck)
}

type proxyPods interface {
	AddPod(pod.Pod) error
	RemovePod(cookie uint64)
}

// objects keeps what Kubernetes and the node said last, and passes it on. It is kube's Handler and pkg/pod's.
//
// Order: a pod is known to the proxy before the kernel may send its connections there, and forgotten by the kernel
// before the proxy closes its listeners.
type objects struct {
	datapath serviceUser
	finder   podFinder
	proxy    proxyPods
	health   healthChecks
	log      *slog.Logger
	// translate is --services; known Services are shown in either case.
	translate bool
	// internal pods are always there: the canary.
	internal []datapath.Pod
	// portsChanged is told when Services' node ports may have changed.
	portsChanged chan struct{}
	// synced is called once Kubernetes has been listed in full.
	synced func()

	mu       sync.RWMutex
	services map[service.Name]*service.Service // guarded by mu, the values are immutable
	pods     map[string]*kube.Pod              // by UID, guarded by mu, immutable
	placed   map[string]pod.Pod                // by UID, guarded by mu: pods whose network namespace is known
	node     *kube.Node                        // guarded by mu
	devices  []netip.Addr                      // guarded by mu: addresses of the node's devices
}

var (
	_ kube.Handler = (*objects)(nil)
	_ pod.Handler  = (*objects)(nil)
)

func newObjects() *objects {
	return &objects{
		services: map[service.Name]*service.Service{}, pods: map[string]*kube.Pod{}, placed: map[string]pod.Pod{},
		portsChanged: make(chan struct{}, 1),
	}
}

// ServiceChanged implements kube.Handler.
func (o *objects) ServiceChanged(name service.Name, svc *service.Service) {
	o.mu.Lock()
	ports := hasHostPorts(o.services[name]) || hasHostPorts(svc)
	if svc == nil {
		delete(o.services, name)
	} else {
		o.services[name] = svc
	}
	o.mu.Unlock()
	if !o.translate {
		return
	}
	if ports {
		o.lookAtPorts()
	}
	if svc == nil {
		o.health.Set(name, nil)
	} else {
		o.health.Set(name, svc.HealthCheck)
	}
	if svc == nil {
		o.datapath.DeleteService(name)
	} else {
		o.datapath.SetService(svc)
	}
}

// hasHostPorts tells whether a Service has addresses that the host may have sockets on.
func hasHostPorts(svc *service.Service) bool {
	return svc != nil && (len(svc.Loopback) > 0 || slices.ContainsFunc(svc.Frontends, func(f service.Frontend) bool { return f.Kind != service.ClusterIP }))
}

func (o *objects) lookAtPorts() {
	select {
	case o.portsChanged <- struct{}{}:
	default:
	}
}

// setDevices notes the addresses of the node's devices.
func (o *objects) setDevices(devices []netip.Addr) {
	o.mu.Lock()
	o.devices = devices
	o.mu.Unlock()
	o.lookAtPorts()
}

// serviceUID is "" for a Service that isn't known.
func (o *objects) serviceUID(name service.Name) string {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if svc := o.services[name]; svc != nil {
		return svc.UID
	}
	return ""
}

// nodeNow is the Node object, nil while it is not known.
func (o *objects) nodeNow() *kube.Node {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.node
}

// PodChanged implements kube.Handler.
func (o *objects) PodChanged(p *kube.Pod) {
	o.mu.Lock()
	o.pods[p.UID] = p
	o.mu.Unlock()
	o.finder.SetPod(pod.Spec{
		UID: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, IPs: p.IPs,
		Enrolled: p.Enrolled, Ignored: p.HostNetwork || p.Terminal, Deleting: p.Deleting, Created: p.Created,
		AccelerateBlocking: p.AccelerateBlocking,
	})
}

// PodDeleted implements kube.Handler.
func (o *objects) PodDeleted(p *kube.Pod) {
	o.mu.Lock()
	delete(o.pods, p.UID)
	o.mu.Unlock()
	o.finder.DeletePod(p.UID)
}

// NodeChanged implements kube.Handler.
func (o *objects) NodeChanged(n *kube.Node) {
	o.mu.Lock()
	o.node = n
	o.mu.Unlock()
}

// Synced implements kube.Handler.
func (o *objects) Synced() {
	o.log.Info("Kubernetes objects are known", "services", len(o.serviceList()))
	o.datapath.Synced(datapath.SourceServices)
	o.synced()
}

// PodReady implements pod.Handler.
func (o *objects) PodReady(p pod.Pod) {
	if p.Netns != nil || len(p.Listeners) > 0 {
		if err := o.proxy.AddPod(p); err != nil {
			// It has closed the listeners: connections meet the fail mode.
			o.log.Error("the proxy can't serve a pod", "pod", p.Namespace+"/"+p.Name, "error", err)
		}
	}
	p.Netns, p.Listeners = nil, nil // the engine's now
	o.mu.Lock()
	o.placed[p.UID] = p
	list := o.datapathPods()
	o.mu.Unlock()
	o.datapath.SetPods(list)
}

// PodGone implements pod.Handler.
func (o *objects) PodGone(uid string) {
	o.mu.Lock()
	p, known := o.placed[uid]
	delete(o.placed, uid)
	list := o.datapathPods()
	o.mu.Unlock()
	if !known {
		return
	}
	o.datapath.SetPods(list)
	if p.Spec.Enrolled {
		o.proxy.RemovePod(p.Cookie)
	}
}

// datapathPods are all pods of this node as the kernel's tables want them. The caller holds mu.
func (o *objects) datapathPods() []datapath.Pod {
	list := make([]datapath.Pod, 0, len(o.placed)+len(o.internal))
	list = append(list, o.internal...)
	for _, p := range o.placed {
		list = append(list, datapath.Pod{
			Namespace: p.Namespace, Name: p.Name, Cookie: p.Cookie, IPs: p.IPs, Enrolled: p.Enrolled, AccelerateBlocking: p.AccelerateBlocking,
		})
	}
	return list
}

// setInternal adds the agent's own pods and tells the kernel.
func (o *objects) setInternal(list ...datapath.Pod) {
	o.mu.Lock()
	o.internal = list
	all := o.datapathPods()
	o.mu.Unlock()
	o.datapath.SetPods(all)
}

func (o *objects) serviceList() []*service.Service {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return slices.Collect(maps.Values(o.services))
}

// podList is by namespace and name.
func (o *objects) podList() []*kube.Pod {
	o.mu.RLock()
	list := slices.Collect(maps.Values(o.pods))
	o.mu.RUnlock()
	slices.SortFunc(list, func(a, b *kube.Pod) int {
		if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return list
}

func (o *objects) placedByUID() map[string]pod.Pod {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return maps.Clone(o.placed)
}
