package mesh

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// linger is how long a cluster that the control plane removed stays while routes in force still name it: control
// planes send CDS before the RDS that stops using the cluster.
const linger = 15 * time.Second

// grace is how long routes wait for a cluster that the control plane has not sent at all. On separate streams,
// or from a server that minds no order, it may be on its way; if it never comes, requests for it get NC.
const grace = time.Second

// Builder joins compiled resources into snapshots, incrementally: whatever did not change keeps its pointer.
//
// A resource is warm when everything that it needs has come. A cluster needs its endpoints (EDS) or the first
// answer for its names (DNS), a listener its routes (RDS), and routes and TCP proxies the clusters they name, as
// far as the control plane has sent those at all. Until a new version is warm the old one stays in force; what
// is removed goes last. So a request never meets a route whose cluster is on its way.
//
// It is not safe for concurrent use.
type Builder struct {
	listeners map[string]*listenerState
	clusters  map[string]*clusterState
	routes    map[string]*routeState
	endpoints map[string]*Endpoints
	// noEndpoints and noRoutes are names that the control plane did not answer in time; they count as empty.
	noEndpoints, noRoutes map[string]bool
	answers               map[DNSKey][]netip.Addr

	last *Snapshot
}

// DNSKey is a name to be resolved.
type DNSKey struct {
	Host   string
	Family DNSFamily
}

type listenerState struct {
	want, active *Listener
	since        time.Time      // when Build first saw want
	from         *Listener      // what active was joined from
	routes       []*RouteConfig // and with which routes
}

type clusterState struct {
	want, active *Cluster // want is nil after removal
	from         *Cluster
	endpoints    *Endpoints
	dirty        bool // DNS answers changed
	removedAt    time.Time
}

type routeState struct {
	want, active *RouteConfig
	since        time.Time // when Build first saw want
}

// NewBuilder returns an empty builder.
func NewBuilder() *Builder {
	return &Builder{
		listeners: map[string]*listenerState{}, clusters: map[string]*clusterState{}, routes: map[string]*routeState{},
		endpoints: map[string]*Endpoints{}, noEndpoints: map[string]bool{}, noRoutes: map[string]bool{},
		answers: map[DNSKey][]netip.Addr{},
		last:    &Snapshot{Clusters: map[string]*Cluster{}},
	}
}

// SetListener adds or replaces a listener.
func (b *Builder) SetListener(l *Listener) {
	state := b.listeners[l.Name]
	if state == nil {
		state = &listenerState{}
		b.listeners[l.Name] = state
	}
	state.want, state.since = l, time.Time{}
}

// DeleteListener removes a listener.
func (b *Builder) DeleteListener(name string) { delete(b.listeners, name) }

// SetCluster adds or replaces a cluster.
func (b *Builder) SetCluster(c *Cluster) {
	state := b.clusters[c.Name]
	if state == nil {
		state = &clusterState{}
		b.clusters[c.Name] = state
	}
	state.want, state.removedAt = c, time.Time{}
}

// DeleteCluster removes a cluster, as soon as no route in force names it.
func (b *Builder) DeleteCluster(name string, now time.Time) {
	if state := b.clusters[name]; state != nil && state.want != nil {
		state.want, state.removedAt = nil, now
	}
}

// SetRoutes adds or replaces a route configuration. It is forgotten when no listener asks for it at a Build.
func (b *Builder) SetRoutes(rc *RouteConfig) {
	state := b.routes[rc.Name]
	if state == nil {
		state = &routeState{}
		b.routes[rc.Name] = state
	}
	state.want, state.since = rc, time.Time{}
	delete(b.noRoutes, rc.Name)
}

// SetEndpoints adds or replaces the endpoints of an EDS name. They are forgotten when no cluster asks for them
// at a Build.
func (b *Builder) SetEndpoints(e *Endpoints) {
	b.endpoints[e.Name] = e
	delete(b.noEndpoints, e.Name)
}

// EndpointsTimedOut says that the control plane did not answer for an EDS name: the cluster is warm and empty.
func (b *Builder) EndpointsTimedOut(name string) {
	if b.endpoints[name] == nil {
		b.noEndpoints[name] = true
	}
}

// RoutesTimedOut says that the control plane did not answer for an RDS name: the listener is warm without routes.
func (b *Builder) RoutesTimedOut(name string) {
	if b.routes[name] == nil {
		b.noRoutes[name] = true
	}
}

// SetAddresses stores a resolver's answer, which may be empty.
func (b *Builder) SetAddresses(key DNSKey, addrs []netip.Addr) {
	if old, known := b.answers[key]; known && slices.Equal(old, addrs) {
		return
	}
	b.answers[key] = addrs
	for _, state := range b.clusters {
		if c := state.want; c != nil && c.DNS != nil && slices.ContainsFunc(c.DNS.Names, func(n DNSName) bool { return c.dnsKey(n) == key }) {
			state.dirty = true
		}
	}
}

func (cluster *Cluster) dnsKey(n DNSName) DNSKey { return DNSKey{n.Host, cluster.DNS.Family} }

// Names lists what a cluster's DNS names have to be resolved to, with the refresh times; empty for others.
func (cluster *Cluster) Names() []DNSKey {
	if cluster.DNS == nil {
		return nil
	}
	var keys []DNSKey
	for _, n := range cluster.DNS.Names {
		if key := cluster.dnsKey(n); !n.Endpoint.Addr.IsValid() && !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	return keys
}

// Build publishes what is warm. It returns the last snapshot again if nothing changed. A next time that is not
// zero is when to call again without a change, because a removed cluster lingers.
func (b *Builder) Build(now time.Time) (s *Snapshot, changed bool, next time.Time) {
	for _, state := range b.clusters {
		b.warmCluster(state)
	}
	for _, state := range b.routes {
		if state.active != state.want && b.usable(state.want.clusterNames(), &state.since, now, &next) {
			state.active = state.want
		}
	}
	for _, state := range b.listeners {
		b.warmListener(state, now, &next)
	}
	b.removeClusters(now, &next)
	b.prune()

	listeners := make([]*Listener, 0, len(b.listeners))
	for _, state := range b.listeners {
		if state.active != nil {
			listeners = append(listeners, state.active)
		}
	}
	clusters := make(map[string]*Cluster, len(b.clusters))
	for name, state := range b.clusters {
		if state.active != nil {
			clusters[name] = state.active
		}
	}
	s = NewSnapshot(b.last.Generation+1, listeners, clusters)
	if b.last.Generation > 0 && slices.Equal(s.Listeners, b.last.Listeners) && maps.Equal(s.Clusters, b.last.Clusters) {
		return b.last, false, next
	}
	b.last = s
	return s, true, next
}

// prune forgets endpoints and routes that nothing asks for any more.
func (b *Builder) prune() {
	endpoints, routes := b.WantedEndpoints(), b.WantedRoutes()
	maps.DeleteFunc(b.endpoints, func(name string, _ *Endpoints) bool { return !endpoints[name] })
	maps.DeleteFunc(b.noEndpoints, func(name string, _ bool) bool { return !endpoints[name] })
	maps.DeleteFunc(b.routes, func(name string, _ *routeState) bool { return !routes[name] })
	maps.DeleteFunc(b.noRoutes, func(name string, _ bool) bool { return !routes[name] })
}

func (b *Builder) warmCluster(state *clusterState) {
	want := state.want
	if want == nil {
		return
	}
	switch {
	case want.Discovery == EDS:
		endpoints := b.endpoints[want.ServiceName]
		if endpoints == nil && !b.noEndpoints[want.ServiceName] {
			return
		}
		if state.from == want && state.endpoints == endpoints && state.active != nil {
			return
		}
		state.active = want
		if endpoints != nil {
			state.active = want.WithEndpoints(endpoints)
		}
		state.from, state.endpoints = want, endpoints
	case want.DNS != nil:
		if state.from == want && !state.dirty {
			return
		}
		for _, key := range want.Names() {
			if _, answered := b.answers[key]; !answered {
				return
			}
		}
		state.active = want.WithAddresses(func(host string) []netip.Addr { return b.answers[DNSKey{host, want.DNS.Family}] })
		state.from, state.dirty = want, false
	default:
		state.active, state.from = want, want
	}
}

// unready names a cluster that has nothing in force; empty if there is none. Clusters that the control plane has
// not sent count only if unknown is set.
func (b *Builder) unready(names []string, unknown bool) string {
	for _, name := range names {
		if state := b.clusters[name]; state == nil && unknown || state != nil && state.active == nil {
			return name
		}
	}
	return ""
}

// usable says whether something that names these clusters may come into force. since is when it was first asked
// about; next is brought forward to when to ask again.
func (b *Builder) usable(names []string, since *time.Time, now time.Time, next *time.Time) bool {
	if since.IsZero() {
		*since = now
	}
	if b.unready(names, false) != "" {
		return false
	}
	until := since.Add(grace)
	if b.unready(names, true) == "" || !now.Before(until) {
		return true
	}
	sooner(next, until)
	return false
}

func sooner(next *time.Time, t time.Time) {
	if next.IsZero() || t.Before(*next) {
		*next = t
	}
}

var noRoutes = func() *RouteConfig {
	rc := &RouteConfig{}
	_ = rc.Init() // nothing in it can collide
	return rc
}()

// routesFor are the routes in force for a connection manager; nil while there are none.
func (b *Builder) routesFor(h *HTTPConnectionManager) *RouteConfig {
	if h.RouteConfigName == "" {
		return h.Routes
	}
	if state := b.routes[h.RouteConfigName]; state != nil {
		return state.active
	}
	if b.noRoutes[h.RouteConfigName] {
		return noRoutes
	}
	return nil
}

func (b *Builder) warmListener(state *listenerState, now time.Time, next *time.Time) {
	// The version in force follows its routes even while a newer version waits for something.
	for _, l := range []*Listener{state.want, state.from} {
		if l == nil || l == state.want && state.from != l && !b.usable(l.clusterNames(), &state.since, now, next) {
			continue
		}
		routes, ready := make([]*RouteConfig, 0, 4), true
		for _, h := range l.managers() {
			rc := b.routesFor(h)
			routes, ready = append(routes, rc), ready && rc != nil
		}
		if !ready {
			continue
		}
		if state.from != l || !slices.Equal(state.routes, routes) {
			state.active, state.from, state.routes = l.withRoutes(routes), l, routes
		}
		return
	}
}

// removeClusters drops removed clusters that no route in force names, and those that lingered long enough.
func (b *Builder) removeClusters(now time.Time, next *time.Time) {
	var named map[string]bool
	for name, state := range b.clusters {
		if state.want != nil {
			continue
		}
		if named == nil {
			named = b.namedClusters()
		}
		until := state.removedAt.Add(linger)
		if state.active == nil || !named[name] || !now.Before(until) {
			delete(b.clusters, name)
		} else {
			sooner(next, until)
		}
	}
}

func (b *Builder) namedClusters() map[string]bool {
	named := map[string]bool{}
	for _, state := range b.listeners {
		if state.active == nil {
			continue
		}
		for _, name := range state.active.clusterNames() {
			named[name] = true
		}
		for _, rc := range state.routes {
			for _, name := range rc.clusterNames() {
				named[name] = true
			}
		}
	}
	return named
}
