package service

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// web is a Service with one TCP port, changed by options.
func web(change ...func(*Object)) *Object {
	o := &Object{
		Name:       Name{"default", "web"},
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
		Ports:      []Port{{"http", TCP, 80, 0}},
	}
	for _, c := range change {
		c(o)
	}
	return o
}

// slice is an EndpointSlice of web with port http at 8080.
func slice(name string, endpoints ...Endpoint) *Slice {
	return &Slice{Name: Name{"default", name}, Service: "web", Ports: []Port{{"http", TCP, 8080, 0}}, Endpoints: endpoints}
}

// ep is an endpoint; what is said of it: "ready", "serving", "terminating", "@node", "pod=name", "zone=name".
func ep(addr, said string) Endpoint {
	e := Endpoint{Addr: netip.MustParseAddr(addr)}
	for _, word := range strings.Fields(said) {
		switch {
		case word == "ready":
			e.Ready, e.Serving = true, true
		case word == "serving":
			e.Serving = true
		case word == "terminating":
			e.Terminating = true
		case strings.HasPrefix(word, "@"):
			e.Node = word[1:]
		case strings.HasPrefix(word, "pod="):
			e.Pod = word[4:]
		case strings.HasPrefix(word, "zone="):
			e.Zone = word[5:]
		default:
			panic(word)
		}
	}
	return e
}

// render writes a Service like "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080".
func render(s *Service) string {
	if s == nil {
		return "none"
	}
	var lines []string
	for _, f := range s.Frontends {
		line := fmt.Sprintf("%s/%s ->", f.Addr, f.Protocol)
		for _, b := range f.Backends {
			line += " " + b.Addr.String()
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func TestBuild(t *testing.T) {
	for _, test := range []struct {
		name   string
		object *Object
		slices []*Slice
		want   string
	}{{
		name:   "ready endpoints serve",
		object: web(),
		slices: []*Slice{slice("a", ep("10.0.0.2", "ready"), ep("10.0.0.1", "ready"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080",
	}, {
		name:   "no endpoints: the frontend stays, to refuse",
		object: web(),
		want:   "10.96.0.1:80/TCP ->",
	}, {
		name:   "unready endpoints don't serve",
		object: web(),
		slices: []*Slice{slice("a", ep("10.0.0.1", ""), ep("10.0.0.2", "ready"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.2:8080",
	}, {
		name:   "only unready endpoints: refuse",
		object: web(),
		slices: []*Slice{slice("a", ep("10.0.0.1", "serving"))},
		want:   "10.96.0.1:80/TCP ->",
	}, {
		name:   "terminating endpoints don't serve beside ready ones",
		object: web(),
		slices: []*Slice{slice("a", ep("10.0.0.1", "serving terminating"), ep("10.0.0.2", "ready"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.2:8080",
	}, {
		name:   "fallback to terminating endpoints that serve",
		object: web(),
		slices: []*Slice{slice("a", ep("10.0.0.1", "serving terminating"), ep("10.0.0.2", "terminating"), ep("10.0.0.3", ""))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080",
	}, {
		name:   "publishNotReadyAddresses arrives as ready and is not filtered twice",
		object: web(),
		slices: []*Slice{slice("a", Endpoint{Addr: netip.MustParseAddr("10.0.0.1"), Ready: true, Terminating: true})},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080",
	}, {
		name:   "internalTrafficPolicy Local: local endpoints only",
		object: web(func(o *Object) { o.InternalLocal = true }),
		slices: []*Slice{slice("a", ep("10.0.0.1", "ready @here"), ep("10.0.0.2", "ready @there"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080",
	}, {
		name:   "internalTrafficPolicy Local without a local endpoint refuses and never falls back",
		object: web(func(o *Object) { o.InternalLocal = true }),
		slices: []*Slice{slice("a", ep("10.0.0.2", "ready @there"), ep("10.0.0.3", "ready"))},
		want:   "10.96.0.1:80/TCP ->",
	}, {
		name:   "internalTrafficPolicy Local falls back to local terminating ones though others are ready elsewhere",
		object: web(func(o *Object) { o.InternalLocal = true }),
		slices: []*Slice{slice("a", ep("10.0.0.1", "serving terminating @here"), ep("10.0.0.2", "ready @there"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080",
	}, {
		name: "dual stack: each family has its endpoints",
		object: web(func(o *Object) {
			o.ClusterIPs = append(o.ClusterIPs, netip.MustParseAddr("fd00::1"))
		}),
		slices: []*Slice{slice("a", ep("10.0.0.1", "ready")), slice("b", ep("fd01::1", "ready"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080\n[fd00::1]:80/TCP -> [fd01::1]:8080",
	}, {
		name:   "several slices are united and deduplicated",
		object: web(),
		slices: []*Slice{slice("a", ep("10.0.0.1", "ready"), ep("10.0.0.2", "ready")), slice("b", ep("10.0.0.2", "ready"), ep("10.0.0.3", "ready"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:8080 10.0.0.3:8080",
	}, {
		name:   "of one address in two slices the living observation counts",
		object: web(),
		slices: []*Slice{slice("a", ep("10.0.0.1", "ready")), slice("b", ep("10.0.0.1", "serving terminating"))},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080",
	}, {
		name:   "a named targetPort is resolved per slice",
		object: web(),
		slices: []*Slice{
			slice("a", ep("10.0.0.1", "ready")),
			{Name: Name{"default", "b"}, Service: "web", Ports: []Port{{"http", TCP, 9090, 0}}, Endpoints: []Endpoint{ep("10.0.0.2", "ready")}},
		},
		want: "10.96.0.1:80/TCP -> 10.0.0.1:8080 10.0.0.2:9090",
	}, {
		name:   "multiport: each port by its name",
		object: web(func(o *Object) { o.Ports = []Port{{"http", TCP, 80, 0}, {"admin", TCP, 81, 0}} }),
		slices: []*Slice{{Name: Name{"default", "a"}, Service: "web", Ports: []Port{{"http", TCP, 8080, 0}, {"admin", TCP, 8081, 0}}, Endpoints: []Endpoint{ep("10.0.0.1", "ready")}}},
		want:   "10.96.0.1:80/TCP -> 10.0.0.1:8080\n10.96.0.1:81/TCP -> 10.0.0.1:8081",
	}, {
		name:   "TCP and UDP on one port stay distinct",
		object: web(func(o *Object) { o.Ports = []Port{{"dns-tcp", TCP, 53, 0}, {"dns", UDP, 53, 0}} }),
		slices: []*Slice{{Name: Name{"default", "a"}, Service: "web", Ports: []Port{{"dns", UDP, 5353, 0}, {"dns-tcp", TCP, 5354, 0}}, Endpoints: []Endpoint{ep("10.0.0.1", "ready")}}},
		want:   "10.96.0.1:53/TCP -> 10.0.0.1:5354\n10.96.0.1:53/UDP -> 10.0.0.1:5353",
	}, {
		name:   "a slice's port of the same name and another protocol is another port",
		object: web(func(o *Object) { o.Ports = []Port{{"http", UDP, 80, 0}} }),
		slices: []*Slice{slice("a", ep("10.0.0.1", "ready"))},
		want:   "10.96.0.1:80/UDP ->",
	}, {
		name:   "headless is not ours",
		object: web(func(o *Object) { o.Headless = true; o.ClusterIPs = nil }),
		slices: []*Slice{slice("a", ep("10.0.0.1", "ready"))},
		want:   "none",
	}, {
		name:   "ExternalName is not ours, whatever else it says",
		object: web(func(o *Object) { o.Type = TypeExternalName }),
		slices: []*Slice{slice("a", ep("10.0.0.1", "ready"))},
		want:   "none",
	}, {
		name:   "another proxy's Service is not ours",
		object: web(func(o *Object) { o.Foreign = true }),
		want:   "none",
	}, {
		name:   "a Service without an address yet is nothing",
		object: web(func(o *Object) { o.ClusterIPs = nil }),
		want:   "none",
	}} {
		t.Run(test.name, func(t *testing.T) {
			got := Build(test.object, test.slices, Node{Name: "here"})
			if render(got) != test.want {
				t.Errorf("got\n%s\nwant\n%s", render(got), test.want)
			}
		})
	}
}

func TestBackendsCarryWhatIsKnownOfThem(t *testing.T) {
	s := Build(web(func(o *Object) { o.Affinity = 3 * time.Hour }), []*Slice{
		slice("a", ep("10.0.0.1", "serving terminating @here zone=z1 pod=web-1")),
	}, Node{Name: "here"})
	f := s.Frontends[0]
	if f.Affinity != 3*time.Hour || f.PortName != "http" || f.Kind != ClusterIP {
		t.Errorf("frontend: %+v", f)
	}
	want := Backend{Addr: netip.MustParseAddrPort("10.0.0.1:8080"), Node: "here", Zone: "z1", Local: true, Terminating: true, Pod: "default/web-1"}
	if f.Backends[0] != want {
		t.Errorf("got %+v, want %+v", f.Backends[0], want)
	}
}

func TestAnUnnamedNodeHasNoLocalEndpoints(t *testing.T) {
	s := Build(web(), []*Slice{slice("a", ep("10.0.0.1", "ready"))}, Node{})
	if s.Frontends[0].Backends[0].Local {
		t.Error("an endpoint without a node is not on a node without a name")
	}
}

func TestWhatIsExcludedIsSaid(t *testing.T) {
	s := Build(web(func(o *Object) { o.Ports = append(o.Ports, Port{"admin", TCP, 81, 0}); o.InternalLocal = true }), []*Slice{
		slice("a", ep("10.0.0.1", "ready @here"), ep("10.0.0.2", "@here"), ep("10.0.0.3", "serving terminating @here"),
			ep("10.0.0.4", "terminating @here"), ep("10.0.0.5", "ready @there")),
	}, Node{Name: "here"})
	var got []string
	for _, e := range s.Excluded {
		got = append(got, fmt.Sprintf("%s: %s", e.Addr, e.Reason))
	}
	want := []string{
		"10.0.0.1:0: its slice has no port of this name and protocol: admin TCP",
		"10.0.0.2:0: its slice has no port of this name and protocol: admin TCP",
		"10.0.0.2:8080: not ready",
		"10.0.0.3:0: its slice has no port of this name and protocol: admin TCP",
		"10.0.0.3:8080: terminating, and there are ready ones",
		"10.0.0.4:0: its slice has no port of this name and protocol: admin TCP",
		"10.0.0.4:8080: terminating and no longer serving",
		"10.0.0.5:0: its slice has no port of this name and protocol: admin TCP",
		"10.0.0.5:8080: on another node, and internalTrafficPolicy is Local",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestEveryEndpointIsUsedOrExcludedForAReason: in random Services, each endpoint of the Service's families that its
// slice gives a port of the Service is a backend somewhere or is listed with a reason, and never both.
func TestEveryEndpointIsUsedOrExcludedForAReason(t *testing.T) {
	for seed := range uint64(5000) {
		r := rand.New(rand.NewPCG(seed, 2))
		o, node := randomObject(r, Name{"default", "s"}), randomNode(r)
		var eps []*Slice
		for i := range r.IntN(4) {
			eps = append(eps, randomSlice(r, Name{"default", fmt.Sprint(i)}))
		}
		if Build(o, eps, node) == nil {
			continue
		}
		for _, port := range o.Ports {
			one := *o
			one.Ports = []Port{port}
			svc := Build(&one, eps, node)
			used, excluded := map[netip.AddrPort]bool{}, map[netip.AddrPort]bool{}
			for _, f := range slices.Concat(svc.Frontends, svc.Loopback) {
				for _, b := range f.Backends {
					used[b.Addr] = true
				}
				if f.External != nil {
					for _, b := range f.External.Backends {
						used[b.Addr] = true
					}
				}
			}
			for _, e := range svc.Excluded {
				excluded[e.Addr] = true
			}
			outside := port.NodePort != 0 || len(o.LoadBalancerIPs)+len(o.ExternalIPs) > 0
			for _, ip := range o.ClusterIPs {
				for _, c := range gather(eps, ip.Is4(), port, nil) {
					// An endpoint that only addresses of the outside use is no backend where the node serves none of them.
					if used[c.addr] == excluded[c.addr] && !outside {
						t.Fatalf("seed %d: %s of port %s: used %v, excluded %v", seed, c.addr, port.Name, used[c.addr], excluded[c.addr])
					}
					if used[c.addr] && excluded[c.addr] {
						t.Fatalf("seed %d: %s is used and excluded", seed, c.addr)
					}
				}
			}
		}
	}
}
