package kube

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// kind is a kind of object that sources watch.
type kind string

// The kinds that sources watch. Before a group has been listed in full, nothing that depends on it is announced.
const (
	kindService       kind = "Service"
	kindEndpointSlice kind = "EndpointSlice"
	kindPod           kind = "Pod"
	kindNamespace     kind = "Namespace"
	kindNode          kind = "Node"
)

var kinds = []kind{kindService, kindEndpointSlice, kindPod, kindNamespace, kindNode}

// namespace is what is used of a Namespace.
type namespace struct {
	name  string
	label Choice
}

// table joins the objects of a source and tells the Handler what changed.
//
// Sources call set, unset and listed from any goroutine; they only note the change and wake run, the one goroutine
// that calls the Handler. Changes of one object that arrive while the Handler works are thereby coalesced.
type table struct {
	cfg      Config
	recorder EventRecorder
	wake     chan struct{}

	mu         sync.Mutex // guards all below
	store      *service.Store
	pods       map[service.Name]*podEntry
	dirtyPods  []*podEntry
	namespaces map[string]Choice
	node       *Node
	nodeDirty  bool
	devices    []netip.Addr // what SetAddresses said
	waiting    map[kind]bool
	synced     bool

	told map[service.Name][]service.Problem // run's own: problems that the Service's owner was told of
}

// podEntry is a pod by its name: the object as it is now, and as it was last announced.
type podEntry struct {
	name      service.Name
	now       *Pod
	announced *Pod
	dirty     bool
}

func newTable(cfg Config, recorder EventRecorder) *table {
	t := &table{
		cfg:        cfg,
		recorder:   recorder,
		wake:       make(chan struct{}, 1),
		store:      service.NewStore(service.Node{Name: cfg.NodeName, ExternalIPs: cfg.ExternalIPs, Outside: cfg.Outside}),
		pods:       map[service.Name]*podEntry{},
		namespaces: map[string]Choice{},
		waiting:    map[kind]bool{},
		told:       map[service.Name][]service.Problem{},
	}
	for _, k := range kinds {
		t.waiting[k] = true
	}
	return t
}

// set adds an object or replaces it: *service.Object, *service.Slice, *Pod, *namespace or *Node.
func (t *table) set(object any) {
	t.mu.Lock()
	switch o := object.(type) {
	case *service.Object:
		t.store.SetService(o)
	case *service.Slice:
		t.store.SetSlice(o)
	case *Pod:
		e := t.pod(service.Name{Namespace: o.Namespace, Name: o.Name})
		e.now = o
		t.markPod(e)
	case *namespace:
		t.setNamespace(o.name, o.label)
	case *Node:
		t.setNode(o)
	}
	t.mu.Unlock()
	t.signal()
}

// unset removes an object; only its names are read.
func (t *table) unset(object any) {
	t.mu.Lock()
	switch o := object.(type) {
	case *service.Object:
		t.store.DeleteService(o.Name)
	case *service.Slice:
		t.store.DeleteSlice(o.Name)
	case *Pod:
		if e := t.pods[service.Name{Namespace: o.Namespace, Name: o.Name}]; e != nil {
			e.now = nil
			t.markPod(e)
		}
	case *namespace:
		t.setNamespace(o.name, Unset)
		delete(t.namespaces, o.name)
	case *Node:
		// A Node object that is deleted while its agent runs comes back; what was known of it stays true.
	}
	t.mu.Unlock()
	t.signal()
}

// listed notes that all objects of a kind that exist have been set.
func (t *table) listed(k kind) {
	t.mu.Lock()
	delete(t.waiting, k)
	complete := len(t.waiting) == 0
	if k == kindNode && t.node == nil {
		t.setNode(&Node{Name: t.cfg.NodeName}) // A folder without a Node object: the name is all there is.
	}
	t.mu.Unlock()
	if complete {
		t.cfg.Logger.Info("every kind of object has been listed")
	}
	t.signal()
}

func (t *table) signal() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// run tells the Handler of changes until ctx ends.
func (t *table) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
		}
		for ctx.Err() == nil && t.step() {
		}
	}
}

// step makes one call to the Handler; false: there was nothing to tell.
func (t *table) step() bool {
	t.mu.Lock()
	call := t.next()
	t.mu.Unlock()
	if call == nil {
		return false
	}
	call()
	return true
}

// next takes one change and gives the call that tells it. Called with mu held; the call is made without it.
func (t *table) next() func() {
	h := t.cfg.Handler
	if t.nodeDirty {
		t.nodeDirty = false
		node := *t.node
		return func() { h.NodeChanged(&node) }
	}
	if !t.waiting[kindPod] && !t.waiting[kindNamespace] {
		if call := t.nextPod(); call != nil {
			return call
		}
	}
	if !t.waiting[kindService] && !t.waiting[kindEndpointSlice] {
		if name, svc, ok := t.store.Next(); ok {
			return func() {
				h.ServiceChanged(name, svc)
				t.tell(name, svc)
			}
		}
	}
	if !t.synced && len(t.waiting) == 0 {
		t.synced = true
		return h.Synced
	}
	return nil
}

func (t *table) nextPod() func() {
	h := t.cfg.Handler
	for len(t.dirtyPods) > 0 {
		e := t.dirtyPods[0]
		was := e.announced
		if was != nil && (e.now == nil || e.now.UID != was.UID) {
			// Deleted, or deleted and made again under its name; the entry stays dirty for what comes after.
			e.announced = nil
			return func() { h.PodDeleted(was) }
		}
		t.dirtyPods[0] = nil
		t.dirtyPods = t.dirtyPods[1:]
		e.dirty = false
		if e.now == nil {
			delete(t.pods, e.name)
			continue
		}
		now := *e.now
		now.NamespaceLabel = t.namespaces[now.Namespace]
		now.Enrolled = enrolled(t.cfg.Enroll, &now)
		if was == nil || !was.equal(&now) {
			e.announced = &now
			given := now // The handler's to keep.
			given.IPs = slices.Clone(now.IPs)
			return func() { h.PodChanged(&given) }
		}
	}
	t.dirtyPods = nil
	return nil
}

// tell publishes what of a Service cannot be honoured, once for each problem.
func (t *table) tell(name service.Name, svc *service.Service) {
	if svc == nil || len(svc.Problems) == 0 {
		delete(t.told, name)
		return
	}
	told := t.told[name]
	t.told[name] = svc.Problems
	ref := Ref{APIVersion: "v1", Kind: "Service", Namespace: name.Namespace, Name: name.Name, UID: svc.UID}
	for _, p := range svc.Problems {
		if p.Minor || slices.Contains(told, p) {
			continue
		}
		message := p.Field + ": " + p.Detail
		if p.Cure != "" {
			message += ": " + p.Cure
		}
		t.recorder.Warn(ref, cmp.Or(p.Reason, "Unsupported"), message)
	}
}

func (t *table) pod(name service.Name) *podEntry {
	e := t.pods[name]
	if e == nil {
		e = &podEntry{name: name}
		t.pods[name] = e
	}
	return e
}

func (t *table) markPod(e *podEntry) {
	if !e.dirty {
		e.dirty = true
		t.dirtyPods = append(t.dirtyPods, e)
	}
}

func (t *table) setNamespace(name string, label Choice) {
	if t.namespaces[name] == label {
		return
	}
	t.namespaces[name] = label
	for n, e := range t.pods { // This node's pods only: a few hundred.
		if n.Namespace == name {
			t.markPod(e)
		}
	}
}

func (t *table) setNode(n *Node) {
	if t.node != nil && t.node.equal(n) {
		return
	}
	t.node, t.nodeDirty = n, true
	t.updateNode()
}

// SetAddresses says which addresses the node's devices have.
func (t *table) SetAddresses(devices []netip.Addr) {
	t.mu.Lock()
	t.devices = slices.Clone(devices)
	t.updateNode()
	t.mu.Unlock()
	t.signal()
}

// updateNode tells the store what the Node object, the devices and the settings say together. Called with mu held.
func (t *table) updateNode() {
	node := service.Node{Name: t.cfg.NodeName, ExternalIPs: t.cfg.ExternalIPs, Outside: t.cfg.Outside}
	var primary []netip.Addr
	if t.node != nil {
		node.Name, node.Zone, primary = t.node.Name, t.node.Zone, t.node.Addresses
	}
	node.NodePorts = t.cfg.NodePorts.Choose(primary, t.devices)
	node.Addresses = slices.Concat(primary, t.devices)
	slices.SortFunc(node.Addresses, netip.Addr.Compare)
	node.Addresses = slices.Compact(node.Addresses)
	t.store.SetNode(node)
}

// status is what Status says of the table.
func (t *table) status(source string) Status {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := Status{Source: source, Synced: t.synced}
	st.Services, st.Endpoints = t.store.Counts()
	for _, e := range t.pods {
		if e.now != nil {
			st.Pods++
		}
	}
	for _, k := range kinds {
		if t.waiting[k] {
			st.Waiting = append(st.Waiting, string(k))
		}
	}
	return st
}
