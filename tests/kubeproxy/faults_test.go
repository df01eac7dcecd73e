package kubeproxy

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// faults are mistakes that the differential test has to notice: each field that sockmesh keeps, lost or mistaken on its
// way from the API object to the store.
var faults = []fault{
	{name: "type lost", object: func(o *service.Object) { o.Type = service.TypeClusterIP }},
	{name: "headless lost", object: func(o *service.Object) {
		if o.Headless {
			o.Headless, o.ClusterIPs = false, []netip.Addr{netip.MustParseAddr("10.96.0.99")}
		}
	}},
	{name: "foreign lost", object: func(o *service.Object) { o.Foreign = false }},
	{name: "second cluster IP lost", object: func(o *service.Object) { o.ClusterIPs = o.ClusterIPs[:min(1, len(o.ClusterIPs))] }},
	{name: "node ports lost", object: func(o *service.Object) {
		for i := range o.Ports {
			o.Ports[i].NodePort = 0
		}
	}},
	{name: "UDP is TCP", object: func(o *service.Object) {
		for i := range o.Ports {
			o.Ports[i].Protocol = service.TCP
		}
	}},
	{name: "port names lost", object: func(o *service.Object) {
		for i := range o.Ports {
			o.Ports[i].Name = ""
		}
	}},
	{name: "load-balancer IPs lost", object: func(o *service.Object) { o.LoadBalancerIPs = nil }},
	{name: "external IPs lost", object: func(o *service.Object) { o.ExternalIPs = nil }},
	{name: "source ranges lost", object: func(o *service.Object) { o.SourceRanges = nil }},
	{name: "one source range lost", object: func(o *service.Object) { o.SourceRanges = o.SourceRanges[:min(1, len(o.SourceRanges))] }},
	{name: "affinity lost", object: func(o *service.Object) { o.Affinity = 0 }},
	{name: "internal policy lost", object: func(o *service.Object) { o.InternalLocal = false }},
	{name: "external policy lost", object: func(o *service.Object) { o.ExternalLocal = false }},
	{name: "external policy is internal", object: func(o *service.Object) { o.InternalLocal = o.InternalLocal || o.ExternalLocal }},
	{name: "health check lost", object: func(o *service.Object) { o.HealthCheckNodePort = 0 }},
	{name: "ready lost", slice: endpoints(func(e *service.Endpoint) { e.Ready = false })},
	{name: "all ready", slice: endpoints(func(e *service.Endpoint) { e.Ready = true })},
	{name: "serving lost", slice: endpoints(func(e *service.Endpoint) { e.Serving = false })},
	{name: "serving is ready", slice: endpoints(func(e *service.Endpoint) { e.Ready = e.Ready || e.Serving })},
	{name: "terminating lost", slice: endpoints(func(e *service.Endpoint) { e.Terminating = false })},
	{name: "terminating is not ready", slice: endpoints(func(e *service.Endpoint) { e.Ready = e.Ready && !e.Terminating })},
	{name: "node lost", slice: endpoints(func(e *service.Endpoint) { e.Node = "" })},
	{name: "hints lost", slice: endpoints(func(e *service.Endpoint) { e.Hints = service.Hints{} })},
	{name: "hints for zones lost", slice: endpoints(func(e *service.Endpoint) {
		e.Hints = service.MakeHints(nil, slices.Collect(e.Hints.Nodes()))
	})},
	{name: "hints for nodes lost", slice: endpoints(func(e *service.Endpoint) {
		e.Hints = service.MakeHints(slices.Collect(e.Hints.Zones()), nil)
	})},
	{name: "second zone hint lost", slice: endpoints(func(e *service.Endpoint) {
		zones := slices.Collect(e.Hints.Zones())
		e.Hints = service.MakeHints(zones[:min(1, len(zones))], slices.Collect(e.Hints.Nodes()))
	})},
	{name: "last endpoint lost", slice: func(s *service.Slice) { s.Endpoints = s.Endpoints[:max(0, len(s.Endpoints)-1)] }},
	{name: "second slice port lost", slice: func(s *service.Slice) { s.Ports = s.Ports[:min(1, len(s.Ports))] }},
	{name: "slice of another Service", slice: func(s *service.Slice) { s.Service = "s0" }},
	{name: "zone lost", node: func(n *service.Node) { n.Zone = "" }},
	{name: "zone never changes", node: func(n *service.Node) { n.Zone = "a" }},
	{name: "node ports on no address", node: func(n *service.Node) { n.NodePorts = nil }},
}

func endpoints(spoil func(*service.Endpoint)) func(*service.Slice) {
	return func(s *service.Slice) {
		for i := range s.Endpoints {
			spoil(&s.Endpoints[i])
		}
	}
}

// TestEveryFaultIsFound proves the test: with each fault sockmesh and kube-proxy disagree soon, and what is left after
// shrinking is a handful of changes.
func TestEveryFaultIsFound(t *testing.T) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			const most = 4000
			for seed := range uint64(most) {
				changes := history(seed)
				if d, _, _ := compare(changes, &f); d == "" {
					continue
				}
				small := shrink(changes, &f)
				d, _, _ := compare(small, &f)
				t.Logf("in world %d of %d changes; shrunk to %d:\n%s\nchanges:\n%s", seed, len(changes), len(small), d, render(small))
				if len(small) > 5 {
					t.Errorf("%d changes are left after shrinking", len(small))
				}
				return
			}
			t.Errorf("not found in %d worlds", most)
		})
	}
}
