package service

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// outsideNode is "here", with node ports on two addresses.
func outsideNode() Node {
	return Node{Name: "here", Zone: "z1", Outside: true, NodePorts: addrs("192.0.2.1", "2001:db8::1")}
}

func addrs(list ...string) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// renderAll writes all of a Service, one frontend a line: "NodePort 192.0.2.1:30080/TCP in 10.0.0.1 out 10.0.0.1 local".
// Backends' ports are not written.
func renderAll(s *Service) string {
	if s == nil {
		return "none"
	}
	list := func(backends []Backend) string {
		var out []string
		for _, b := range backends {
			out = append(out, b.Addr.Addr().String())
		}
		return strings.Join(out, ",")
	}
	var lines []string
	for _, f := range slices.Concat(s.Frontends, s.Loopback) {
		line := fmt.Sprintf("%s %s/%s in %s", [...]string{"ClusterIP", "NodePort", "LoadBalancer", "ExternalIP"}[f.Kind], f.Addr, f.Protocol, list(f.Backends))
		if x := f.External; x != nil {
			line += " out " + list(x.Backends)
			if x.Local {
				line += " local"
			}
			if x.Silent {
				line += " silent"
			}
			for _, p := range x.Sources {
				line += " from " + p.String()
			}
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	if h := s.HealthCheck; h != nil {
		lines = append(lines, fmt.Sprintf("health %d: %d %d", h.Port, h.LocalReady4, h.LocalReady6))
	}
	return strings.Join(lines, "\n")
}

func nodePort(o *Object) { o.Type, o.Ports = TypeNodePort, []Port{{"http", TCP, 80, 30080}} }

func TestBuildOutside(t *testing.T) {
	local := func(o *Object) { o.ExternalLocal = true }
	balancer := func(o *Object) { o.Type, o.LoadBalancerIPs = TypeLoadBalancer, addrs("203.0.113.1") }
	here, there := ep("10.0.0.1", "ready @here"), ep("10.0.0.2", "ready @there")
	for _, test := range []struct {
		name   string
		object *Object
		slices []*Slice
		want   string
	}{{
		name:   "functioning NodePort: on the node's addresses of the Service's family",
		object: web(nodePort),
		slices: []*Slice{slice("a", here, there)},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.1,10.0.0.2\n" +
			"NodePort 192.0.2.1:30080/TCP in 10.0.0.1,10.0.0.2 out 10.0.0.1,10.0.0.2",
	}, {
		name: "same port with different protocols: each has its node port",
		object: web(func(o *Object) {
			o.Ports = []Port{{"http", TCP, 80, 30080}, {"quic", UDP, 80, 30080}}
		}),
		want: "ClusterIP 10.96.0.1:80/TCP in\nClusterIP 10.96.0.1:80/UDP in\n" +
			"NodePort 192.0.2.1:30080/TCP in  out\nNodePort 192.0.2.1:30080/UDP in  out",
	}, {
		name:   "a load balancer's and an external address",
		object: web(balancer, func(o *Object) { o.ExternalIPs = addrs("198.51.100.1") }),
		slices: []*Slice{slice("a", there)},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.2\nLoadBalancer 203.0.113.1:80/TCP in 10.0.0.2 out 10.0.0.2\n" +
			"ExternalIP 198.51.100.1:80/TCP in 10.0.0.2 out 10.0.0.2",
	}, {
		name:   "an address that is given twice is one frontend of the better kind",
		object: web(balancer, func(o *Object) { o.ExternalIPs = addrs("203.0.113.1", "10.96.0.1") }),
		want:   "ClusterIP 10.96.0.1:80/TCP in\nLoadBalancer 203.0.113.1:80/TCP in  out",
	}, {
		name:   "an address of a family without cluster IP is nothing",
		object: web(balancer, func(o *Object) { o.LoadBalancerIPs = addrs("2001:db8:1::1") }),
		slices: []*Slice{slice("a", here)},
		want:   "ClusterIP 10.96.0.1:80/TCP in 10.0.0.1",
	}, {
		name:   "externalTrafficPolicy Local binds clients outside, inside all endpoints serve",
		object: web(nodePort, local),
		slices: []*Slice{slice("a", here, there)},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.1,10.0.0.2\n" +
			"NodePort 192.0.2.1:30080/TCP in 10.0.0.1,10.0.0.2 out 10.0.0.1 local",
	}, {
		name:   "externalTrafficPolicy Local without a local endpoint: silence, so that the load balancer tries others",
		object: web(nodePort, local),
		slices: []*Slice{slice("a", there)},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.2\n" +
			"NodePort 192.0.2.1:30080/TCP in 10.0.0.2 out  local silent",
	}, {
		name:   "rejected when no endpoints exist",
		object: web(nodePort, local),
		slices: []*Slice{slice("a", ep("10.0.0.1", "@here"), ep("10.0.0.2", "terminating @there"))},
		want:   "ClusterIP 10.96.0.1:80/TCP in\nNodePort 192.0.2.1:30080/TCP in  out  local",
	}, {
		name:   "fallback to local terminating endpoints (external Local), while Cluster still uses the ready ones",
		object: web(nodePort, local),
		slices: []*Slice{slice("a", ep("10.0.0.1", "serving terminating @here"), there)},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.2\n" +
			"NodePort 192.0.2.1:30080/TCP in 10.0.0.2 out 10.0.0.1 local",
	}, {
		name:   "fallback to terminating endpoints (external Cluster)",
		object: web(nodePort),
		slices: []*Slice{slice("a", ep("10.0.0.2", "serving terminating @there"), ep("10.0.0.3", "terminating @there"))},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.2\n" +
			"NodePort 192.0.2.1:30080/TCP in 10.0.0.2 out 10.0.0.2",
	}, {
		name:   "internalTrafficPolicy Local binds the cluster IP only",
		object: web(nodePort, func(o *Object) { o.InternalLocal = true }),
		slices: []*Slice{slice("a", here, there)},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.1\n" +
			"NodePort 192.0.2.1:30080/TCP in 10.0.0.1,10.0.0.2 out 10.0.0.1,10.0.0.2",
	}, {
		name: "loadBalancerSourceRanges are the load balancer's addresses' only",
		object: web(nodePort, balancer, func(o *Object) {
			o.SourceRanges = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
		}),
		want: "ClusterIP 10.96.0.1:80/TCP in\nNodePort 192.0.2.1:30080/TCP in  out\n" +
			"LoadBalancer 203.0.113.1:80/TCP in  out  from 10.0.0.0/8",
	}, {
		name: "a range that is everything restricts nobody",
		object: web(balancer, func(o *Object) {
			o.SourceRanges = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("0.0.0.0/0")}
		}),
		want: "ClusterIP 10.96.0.1:80/TCP in\nLoadBalancer 203.0.113.1:80/TCP in  out",
	}, {
		name:   "healthCheckNodePort counts ready local endpoints, each address once",
		object: web(balancer, local, func(o *Object) { o.HealthCheckNodePort = 31000; o.Ports = append(o.Ports, Port{"admin", TCP, 81, 0}) }),
		slices: []*Slice{{Name: Name{"default", "a"}, Ports: []Port{{"http", TCP, 8080, 0}, {"admin", TCP, 8081, 0}}, Endpoints: []Endpoint{here, there}}},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.1,10.0.0.2\nClusterIP 10.96.0.1:81/TCP in 10.0.0.1,10.0.0.2\n" +
			"LoadBalancer 203.0.113.1:80/TCP in 10.0.0.1,10.0.0.2 out 10.0.0.1 local\n" +
			"LoadBalancer 203.0.113.1:81/TCP in 10.0.0.1,10.0.0.2 out 10.0.0.1 local\nhealth 31000: 1 0",
	}, {
		name:   "fail the health check if there are only terminating endpoints, which still serve",
		object: web(balancer, local, func(o *Object) { o.HealthCheckNodePort = 31000 }),
		slices: []*Slice{slice("a", ep("10.0.0.1", "serving terminating @here"))},
		want: "ClusterIP 10.96.0.1:80/TCP in 10.0.0.1\n" +
			"LoadBalancer 203.0.113.1:80/TCP in 10.0.0.1 out 10.0.0.1 local\nhealth 31000: 0 0",
	}} {
		t.Run(test.name, func(t *testing.T) {
			if got := renderAll(Build(test.object, test.slices, outsideNode())); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

func TestTrafficDistribution(t *testing.T) {
	hinted := func(addr, said, zones, nodes string) Endpoint {
		e := ep(addr, said)
		e.Hints = MakeHints(strings.Fields(zones), strings.Fields(nodes))
		return e
	}
	for _, test := range []struct {
		name      string
		endpoints []Endpoint
		want      string
	}{{
		name:      "same zone",
		endpoints: []Endpoint{hinted("10.0.0.1", "ready", "z1", ""), hinted("10.0.0.2", "ready", "z2", ""), hinted("10.0.0.3", "ready", "z2 z1", "")},
		want:      "10.0.0.1,10.0.0.3",
	}, {
		name:      "same node goes before same zone",
		endpoints: []Endpoint{hinted("10.0.0.1", "ready", "z1", "there"), hinted("10.0.0.2", "ready", "z1", "here")},
		want:      "10.0.0.2",
	}, {
		name:      "no endpoint for this node: the zone",
		endpoints: []Endpoint{hinted("10.0.0.1", "ready", "z1", "there"), hinted("10.0.0.2", "ready", "z2", "elsewhere")},
		want:      "10.0.0.1",
	}, {
		name:      "no endpoint for this zone: all",
		endpoints: []Endpoint{hinted("10.0.0.1", "ready", "z2", ""), hinted("10.0.0.2", "ready", "z3", "")},
		want:      "10.0.0.1,10.0.0.2",
	}, {
		name:      "a ready endpoint without hints: all",
		endpoints: []Endpoint{hinted("10.0.0.1", "ready", "z1", ""), hinted("10.0.0.2", "ready", "", "")},
		want:      "10.0.0.1,10.0.0.2",
	}, {
		name:      "an endpoint without hints that is not ready doesn't count",
		endpoints: []Endpoint{hinted("10.0.0.1", "ready", "z1", ""), hinted("10.0.0.2", "", "", ""), hinted("10.0.0.3", "ready", "z2", "")},
		want:      "10.0.0.1",
	}, {
		name:      "hints are ignored among terminating endpoints",
		endpoints: []Endpoint{hinted("10.0.0.1", "serving terminating", "z2", ""), hinted("10.0.0.2", "serving terminating", "z1", "")},
		want:      "10.0.0.1,10.0.0.2",
	}, {
		name:      "the name of a zone that is part of another's is another zone",
		endpoints: []Endpoint{hinted("10.0.0.1", "ready", "z11 z12", ""), hinted("10.0.0.2", "ready", "az1", "")},
		want:      "10.0.0.1,10.0.0.2",
	}} {
		t.Run(test.name, func(t *testing.T) {
			got := renderAll(Build(web(), []*Slice{slice("a", test.endpoints...)}, outsideNode()))
			if want := "ClusterIP 10.96.0.1:80/TCP in " + test.want; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}

func TestHintsExcludeForAReason(t *testing.T) {
	e, f := ep("10.0.0.1", "ready"), ep("10.0.0.2", "ready")
	e.Hints, f.Hints = MakeHints([]string{"z1"}, nil), MakeHints([]string{"z2"}, nil)
	s := Build(web(), []*Slice{slice("a", e, f)}, outsideNode())
	if x := s.Excluded; len(x) != 1 || x[0].Addr.String() != "10.0.0.2:8080" || x[0].Reason != "its hints are for other zones" || x[0].Endpoint.Addr != x[0].Addr.Addr() {
		t.Errorf("%+v", x)
	}
}

func TestNodePortsOnLoopbackStandApart(t *testing.T) {
	n := outsideNode()
	n.NodePorts = addrs("127.0.0.1", "192.0.2.1")
	s := Build(web(nodePort), nil, n)
	if len(s.Frontends) != 2 || len(s.Loopback) != 1 || s.Loopback[0].Addr.String() != "127.0.0.1:30080" {
		t.Error(renderAll(s))
	}
}

func TestExternalIPPolicies(t *testing.T) {
	o := web(func(o *Object) { o.ExternalIPs = addrs("198.51.100.1", "192.0.2.1") })
	for policy, want := range map[string]string{
		"all":  "ExternalIP 198.51.100.1:80/TCP in  out\nExternalIP 192.0.2.1:80/TCP in  out",
		"own":  "ExternalIP 192.0.2.1:80/TCP in  out",
		"none": "",
	} {
		n := outsideNode()
		n.Addresses = addrs("192.0.2.1")
		var err error
		if n.ExternalIPs, err = ParseExternalIPPolicy(policy); err != nil {
			t.Fatal(err)
		}
		s := Build(o, nil, n)
		if got := strings.TrimPrefix(strings.TrimPrefix(renderAll(s), "ClusterIP 10.96.0.1:80/TCP in"), "\n"); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", policy, got, want)
		}
		if refused := 2 - strings.Count(want, "ExternalIP"); len(s.Problems) != refused {
			t.Errorf("%s: problems %v", policy, s.Problems)
		}
	}
	if _, err := ParseExternalIPPolicy("some"); err == nil {
		t.Error("accepted")
	}
}

func TestNoServiceTakesWhatTheClusterGaveAnother(t *testing.T) {
	victim := &Object{Name: Name{"kube-system", "dns"}, ClusterIPs: addrs("10.96.0.10"), Ports: []Port{{"dns", TCP, 53, 0}}, Created: time.Unix(9, 0)}
	thief := &Object{Name: Name{"aaa", "thief"}, ClusterIPs: addrs("10.96.0.11"), Ports: []Port{{"dns", TCP, 53, 0}}, ExternalIPs: addrs("10.96.0.10"), Created: time.Unix(1, 0)}
	s := NewStore(outsideNode())
	s.SetService(thief)
	if got := renderAll(drain(s)[thief.Name]); !strings.Contains(got, "ExternalIP 10.96.0.10:53") {
		t.Error(got)
	}
	s.SetService(victim)
	name, svc, _ := s.Next()
	if name != thief.Name || renderAll(svc) != "ClusterIP 10.96.0.11:53/TCP in" {
		t.Errorf("first the loser gives the address up: %s %s", name, renderAll(svc))
	}
	if len(svc.Problems) != 1 || svc.Problems[0].Minor || svc.Problems[0].Detail != "10.96.0.10:53/TCP is not served: it is an address of Service kube-system/dns" {
		t.Errorf("%+v", svc.Problems)
	}
	if name, svc, _ = s.Next(); name != victim.Name || renderAll(svc) != "ClusterIP 10.96.0.10:53/TCP in" {
		t.Errorf("%s %s", name, renderAll(svc))
	}
	s.DeleteService(victim.Name)
	if name, svc, _ = s.Next(); name != victim.Name || svc != nil {
		t.Errorf("first the owner is gone: %s", name)
	}
	if got := renderAll(drain(s)[thief.Name]); !strings.Contains(got, "ExternalIP 10.96.0.10:53") {
		t.Errorf("then the other has it: %s", got)
	}
	s.DeleteService(thief.Name)
	drain(s)
	if len(s.addresses.first)+len(s.addresses.others) != 0 {
		t.Errorf("left behind: %v", s.addresses)
	}
}

func TestOnlyServicesThatDependOnTheNodeAreWorkedOutAgain(t *testing.T) {
	s := NewStore(Node{Name: "here", Outside: true})
	plain := web()
	ported := web(nodePort, func(o *Object) { o.Name.Name, o.ClusterIPs = "ported", addrs("10.96.0.2") })
	hinted := web(func(o *Object) { o.Name.Name, o.ClusterIPs = "hinted", addrs("10.96.0.3") })
	e := ep("10.0.0.1", "ready")
	e.Hints = MakeHints([]string{"z1"}, nil)
	for _, o := range []*Object{plain, ported, hinted} {
		s.SetService(o)
	}
	s.SetSlice(&Slice{Name: Name{"default", "h"}, Service: "hinted", Endpoints: []Endpoint{e}})
	drain(s)
	for _, step := range []struct {
		change string
		node   Node
		want   string
	}{
		{"zone", Node{Name: "here", Outside: true, Zone: "z1"}, "hinted"},
		{"addresses", Node{Name: "here", Outside: true, Zone: "z1", NodePorts: addrs("192.0.2.1")}, "ported"},
		{"nothing", Node{Name: "here", Outside: true, Zone: "z1", NodePorts: addrs("192.0.2.1")}, ""},
		{"name", Node{Name: "now", Outside: true, Zone: "z1", NodePorts: addrs("192.0.2.1")}, "hinted ported web"},
	} {
		s.SetNode(step.node)
		var names []string
		for name := range drain(s) {
			names = append(names, name.Name)
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != step.want {
			t.Errorf("%s: %s, want %s", step.change, got, step.want)
		}
	}
}

func TestNodePortAddresses(t *testing.T) {
	primary := addrs("192.0.2.1", "2001:db8::1", "192.0.2.9")
	devices := addrs("127.0.0.1", "::1", "192.0.2.1", "10.0.0.1", "fe80::1", "2001:db8::1", "fd00::1")
	for _, test := range []struct{ setting, want string }{
		{"", "192.0.2.1 2001:db8::1"},
		{"primary", "192.0.2.1 2001:db8::1"},
		{"primary,loopback", "127.0.0.1 192.0.2.1 ::1 2001:db8::1"},
		{"all", "10.0.0.1 192.0.2.1 192.0.2.9 2001:db8::1 fd00::1"},
		{"10.0.0.0/8", "10.0.0.1 2001:db8::1 fd00::1"},
		{"10.0.0.0/8, fd00::/8", "10.0.0.1 fd00::1"},
		{"127.0.0.0/8,fd00::/8", "127.0.0.1 fd00::1"},
	} {
		a, err := ParseNodePortAddresses(test.setting)
		if err != nil {
			t.Errorf("%q: %v", test.setting, err)
			continue
		}
		var got []string
		for _, ip := range a.Choose(primary, devices) {
			got = append(got, ip.String())
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%q: %v, want %s", test.setting, got, test.want)
		}
	}
	for _, bad := range []string{"10.0.0.1", "primary,10.0.0.0/8", "some"} {
		if _, err := ParseNodePortAddresses(bad); err == nil || !strings.Contains(err.Error(), "--nodeport-addresses") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestALoserNamesTheOwnerOfNow(t *testing.T) {
	s := NewStore(outsideNode())
	want := func(name, owner string) {
		t.Helper()
		drain := drain(s)
		if svc := drain[Name{"default", name}]; svc == nil || len(svc.Problems) != 1 || !strings.HasSuffix(svc.Problems[0].Detail, "Service default/"+owner) {
			t.Errorf("%s: %+v", name, svc)
		}
	}
	add := func(name string, created int64) {
		s.SetService(&Object{Name: Name{"default", name}, ClusterIPs: addrs("10.96.0.1"), Ports: []Port{{"", TCP, 80, 0}}, Created: time.Unix(created, 0)})
	}
	add("b", 2)
	add("c", 3)
	want("c", "b")
	add("a", 1)
	want("c", "a")
	s.DeleteService(Name{"default", "a"})
	want("c", "b")
}

func TestEndpointsOfAnotherFamilyOnlyAreAProblem(t *testing.T) {
	six := slice("a", ep("fd00::1", "ready"))
	s := Build(web(), []*Slice{six}, outsideNode())
	if len(s.Problems) != 1 || s.Problems[0].Minor || s.Problems[0].Reason != "EndpointFamily" || !strings.Contains(s.Problems[0].Detail, "IPv6") {
		t.Errorf("%+v", s.Problems)
	}
	if s := Build(web(), []*Slice{six, slice("b", ep("10.0.0.1", "ready"))}, outsideNode()); len(s.Problems) != 0 {
		t.Errorf("with an endpoint of its own family: %+v", s.Problems)
	}
	if s := Build(web(), nil, outsideNode()); len(s.Problems) != 0 {
		t.Errorf("without any: %+v", s.Problems)
	}
}

func TestAHealthCheckIsAskedWhereNodePortsAreServed(t *testing.T) {
	node := outsideNode()
	store := NewStore(node)
	o := web(func(o *Object) { o.HealthCheckNodePort, o.ExternalLocal, o.Ports[0].NodePort = 31000, true, 0 })
	store.SetService(o)
	_, s, _ := store.Next()
	if !slices.Equal(s.HealthCheck.Addresses, node.NodePorts) {
		t.Errorf("asked on %v, node ports are on %v", s.HealthCheck.Addresses, node.NodePorts)
	}
	node.NodePorts = []netip.Addr{netip.MustParseAddr("192.168.7.7")}
	store.SetNode(node)
	if _, s, ok := store.Next(); !ok || !slices.Equal(s.HealthCheck.Addresses, node.NodePorts) {
		t.Errorf("after the node's addresses changed: %v", s)
	}
}
