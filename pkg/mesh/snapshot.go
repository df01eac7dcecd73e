// Package mesh holds the runtime meaning of the xDS configuration: plain, typed, immutable values that the
// proxy loops and the datapath reconciler read, and the pure functions that compile them out of Envoy's
// protobuf messages.
//
// Data flows one way: pkg/xds hands over resources, Compile* turns each into a value of this package or an
// error that names the field, Build joins the warm ones into one Snapshot, and readers load that snapshot
// from an atomic pointer. A request uses the snapshot that it began with.
//
// It must never do I/O, never keep a protobuf message in what it returns, never mutate a published value,
// and never drop a field without either refusing it or reporting it as ignored.
package mesh

import (
	"net/netip"
	"slices"
	"strings"
)

// Snapshot is one consistent view of the whole configuration: every route in it names only clusters that are
// in it too, or clusters that the control plane has not sent at all (Envoy: flag NC). Immutable once
// published. Unchanged listeners and clusters keep their pointers from one snapshot to the next, so that a
// reader can tell by pointer comparison what a change touched.
type Snapshot struct {
	// Generation counts published snapshots, from 1.
	Generation uint64
	// Listeners are the warm ones, ordered by name.
	Listeners []*Listener
	// Clusters are the warm ones, by name.
	Clusters map[string]*Cluster

	claims claimIndex
	routes map[string]*RouteConfig // by HTTPConnectionManager.place
}

// Warning is something that was accepted without being acted upon: a field that this data plane does not
// support and that does not change what happens to a request.
type Warning struct {
	Type  string `json:"type"`  // "listener", "route", "cluster", "endpoint"
	Name  string `json:"name"`  // of the resource
	Field string `json:"field"` // protobuf path within the resource
}

// Claim tells the datapath what to do with connections of enrolled pods to Addr.
type Claim struct {
	// Addr is the original destination. An unspecified IP means every destination of that family on the
	// port; port 0 with an unspecified IP means everything not claimed otherwise (use_original_dst).
	Addr netip.AddrPort
	// Listener that claims it.
	Listener string
	// Offload is set where the kernel itself can choose the endpoint; nil sends the connection to the proxy.
	Offload *Offload
	// Reason is why Offload is nil, naming the field; it depends on the clusters, so it is the answer to "why
	// not in the kernel" rather than Listener.OffloadReason.
	Reason string
}

// Offload is a plain TCP listener compiled for the kernel: draw a cluster by weight, then an endpoint.
type Offload struct {
	Clusters []OffloadCluster
}

// OffloadCluster is one weighted cluster of an offloaded listener.
type OffloadCluster struct {
	Name      string
	Weight    uint32 // relative; zero is never chosen
	Endpoints []OffloadEndpoint
}

// OffloadEndpoint has its locality's weight already multiplied in.
type OffloadEndpoint struct {
	Addr   netip.AddrPort
	Weight uint32
}

// NewSnapshot joins listeners and clusters and indexes what the listeners claim. It keeps both arguments.
func NewSnapshot(generation uint64, listeners []*Listener, clusters map[string]*Cluster) *Snapshot {
	slices.SortFunc(listeners, func(a, b *Listener) int { return strings.Compare(a.Name, b.Name) })
	s := &Snapshot{
		Generation: generation, Listeners: listeners, Clusters: clusters,
		claims: buildClaims(listeners, clusters), routes: map[string]*RouteConfig{},
	}
	for _, l := range listeners {
		for _, h := range l.managers() {
			if h.place != "" {
				s.routes[h.place] = h.Routes
			}
		}
	}
	return s
}

// Routes returns the routes that are in force now for a connection manager that may be from an older snapshot,
// so that connections kept alive follow a change at their next request. Where the connection manager itself is
// gone it returns the routes that it had.
func (s *Snapshot) Routes(h *HTTPConnectionManager) *RouteConfig {
	if rc := s.routes[h.place]; rc != nil {
		return rc
	}
	return h.Routes
}

// Listener returns the listener of that name, nil if there is none.
func (s *Snapshot) Listener(name string) *Listener {
	i, found := slices.BinarySearchFunc(s.Listeners, name, func(l *Listener, name string) int { return strings.Compare(l.Name, name) })
	if !found {
		return nil
	}
	return s.Listeners[i]
}
