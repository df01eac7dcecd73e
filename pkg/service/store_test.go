package service

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
)

// drain takes all changes of a store.
func drain(s *Store) map[Name]*Service {
	changes := map[Name]*Service{}
	for name, svc, ok := s.Next(); ok; name, svc, ok = s.Next() {
		changes[name] = svc
	}
	return changes
}

func TestOnlyTheServiceThatChangedIsWorkedOutAgain(t *testing.T) {
	s := NewStore(Node{Name: "here"})
	for i := range 100 {
		name := fmt.Sprintf("s%d", i)
		s.SetService(&Object{Name: Name{"default", name}, ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(i)})}, Ports: []Port{{"", TCP, 80, 0}}})
		s.SetSlice(&Slice{Name: Name{"default", name + "-x"}, Service: name})
	}
	if n := len(drain(s)); n != 100 {
		t.Fatalf("%d changes at first, want 100", n)
	}
	s.SetSlice(&Slice{Name: Name{"default", "s7-x"}, Service: "s7", Endpoints: []Endpoint{ep("10.0.0.1", "ready")}})
	changes := drain(s)
	if len(changes) != 1 || changes[Name{"default", "s7"}] == nil {
		t.Errorf("changed: %v", changes)
	}
	s.SetSlice(&Slice{Name: Name{"default", "s7-x"}, Service: "s7", Endpoints: []Endpoint{ep("10.0.0.1", "ready")}})
	if n := s.Pending(); n != 0 {
		t.Errorf("an update that says the same costs %d", n)
	}
	if services, endpoints := s.Counts(); services != 100 || endpoints != 1 {
		t.Errorf("counts %d, %d", services, endpoints)
	}
}

func TestEveryChangeOfTypeCleansUp(t *testing.T) {
	kinds := map[string]func(*Object){
		"ClusterIP":    func(*Object) {},
		"NodePort":     func(o *Object) { o.Type = TypeNodePort },
		"LoadBalancer": func(o *Object) { o.Type = TypeLoadBalancer },
		"headless":     func(o *Object) { o.Headless, o.ClusterIPs = true, nil },
		"ExternalName": func(o *Object) { o.Type, o.ClusterIPs = TypeExternalName, nil },
		"foreign":      func(o *Object) { o.Foreign = true },
		"absent":       nil,
	}
	for from, was := range kinds {
		for to, is := range kinds {
			t.Run(from+" to "+to, func(t *testing.T) {
				s := NewStore(Node{Name: "here"})
				s.SetSlice(slice("a", ep("10.0.0.1", "ready")))
				if was != nil {
					s.SetService(web(was))
				}
				before := drain(s)[web().Name]
				if is != nil {
					s.SetService(web(is))
				} else {
					s.DeleteService(web().Name)
				}
				changes := drain(s)
				after, told := changes[web().Name]
				served := func(kind string) bool { return kind == "ClusterIP" || kind == "NodePort" || kind == "LoadBalancer" }
				if (before != nil) != served(from) {
					t.Errorf("before: %s", render(before))
				}
				if served(from) && !served(to) && (!told || after != nil) {
					t.Errorf("not cleaned up: %v %s", told, render(after))
				}
				if served(to) && from != to && (after == nil || len(after.Frontends[0].Backends) != 1) {
					t.Errorf("not served: %s", render(after))
				}
				if !served(from) && !served(to) && told {
					t.Error("mentioned though it never meant anything")
				}
			})
		}
	}
}

func TestASliceThatMovesToAnotherServiceLeavesTheFirst(t *testing.T) {
	s := NewStore(Node{})
	s.SetService(web())
	other := web(func(o *Object) { o.Name.Name = "other"; o.ClusterIPs = []netip.Addr{netip.MustParseAddr("10.96.0.2")} })
	s.SetService(other)
	s.SetSlice(slice("a", ep("10.0.0.1", "ready")))
	drain(s)
	moved := slice("a", ep("10.0.0.1", "ready"))
	moved.Service = "other"
	s.SetSlice(moved)
	changes := drain(s)
	if got := render(changes[web().Name]); got != "10.96.0.1:80/TCP ->" {
		t.Errorf("first: %s", got)
	}
	if got := render(changes[other.Name]); got != "10.96.0.2:80/TCP -> 10.0.0.1:8080" {
		t.Errorf("second: %s", got)
	}
}

func TestAServiceDeletedAndMadeAgainFindsItsSlices(t *testing.T) {
	s := NewStore(Node{})
	s.SetService(web())
	s.SetSlice(slice("a", ep("10.0.0.1", "ready")))
	drain(s)
	s.DeleteService(web().Name)
	if svc, told := drain(s)[web().Name]; !told || svc != nil {
		t.Error("deletion not told")
	}
	s.SetService(web())
	if got := render(drain(s)[web().Name]); got != "10.96.0.1:80/TCP -> 10.0.0.1:8080" {
		t.Error(got)
	}
	s.DeleteSlice(Name{"default", "a"})
	s.DeleteService(web().Name)
	drain(s)
	if len(s.services) != 0 || len(s.owner) != 0 {
		t.Errorf("left behind: %v %v", s.services, s.owner)
	}
}

// TestTheOrderOfArrivalDoesNotMatter: random histories of changes, with Next called at random, end in what the final
// objects alone mean.
func TestTheOrderOfArrivalDoesNotMatter(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		node := randomNode(r)
		s := NewStore(node)
		objects, all := map[Name]*Object{}, map[Name]*Slice{}
		told := map[Name]*Service{}
		note := func() {
			for name, svc := range drain(s) {
				if svc == nil {
					if _, ok := told[name]; !ok {
						t.Fatalf("seed %d: %s is said to be gone but never was", seed, name)
					}
					delete(told, name)
				} else {
					told[name] = svc
				}
			}
		}
		for range 5 + r.IntN(60) {
			name := Name{"default", fmt.Sprintf("s%d", r.IntN(4))}
			sliceName := Name{"default", fmt.Sprintf("x%d", r.IntN(5))}
			switch r.IntN(25) {
			case 6:
				node = randomNode(r)
				s.SetNode(node)
			case 7, 8, 9, 10, 11, 12, 13, 14:
				x := randomSlice(r, sliceName)
				all[sliceName] = x
				s.SetSlice(x)
			case 1, 2, 3:
				delete(objects, name)
				s.DeleteService(name)
			case 4, 5:
				delete(all, sliceName)
				s.DeleteSlice(sliceName)
			default:
				o := randomObject(r, name)
				objects[name] = o
				s.SetService(o)
			}
			if r.IntN(4) == 0 {
				note()
			}
		}
		note()
		want := map[Name]*Service{}
		endpoints := 0
		for name, o := range objects {
			var its []*Slice
			for _, x := range all {
				if x.Service == name.Name {
					its = append(its, x)
				}
			}
			r.Shuffle(len(its), func(i, j int) { its[i], its[j] = its[j], its[i] })
			if svc := build(o, its, &node, naiveOwner(o, objects, &node)); svc != nil {
				want[name] = svc
			}
		}
		for _, x := range all {
			endpoints += len(x.Endpoints)
		}
		if !reflect.DeepEqual(told, want) {
			t.Fatalf("seed %d: told %v, want %v", seed, told, want)
		}
		if services, n := s.Counts(); services != len(want) || n != endpoints {
			t.Fatalf("seed %d: counts %d %d, want %d %d", seed, services, n, len(want), endpoints)
		}
	}
}

// naiveOwner looks through all objects for who has an address.
func naiveOwner(o *Object, all map[Name]*Object, node *Node) func(key) (Name, bool) {
	return func(k key) (Name, bool) {
		var best *Object
		var bestKind Kind
		for _, other := range all {
			for f := range other.addresses(node) {
				older := best != nil && (other.Created.Before(best.Created) ||
					other.Created.Equal(best.Created) && other.Name.String() < best.Name.String())
				if f.key == k && (best == nil || f.kind < bestKind || f.kind == bestKind && older) {
					best, bestKind = other, f.kind
				}
			}
		}
		return best.Name, best != o
	}
}

func randomNode(r *rand.Rand) Node {
	n := Node{Name: "n0", Zone: fmt.Sprintf("z%d", r.IntN(2)), Outside: r.IntN(2) == 0, ExternalIPs: ExternalIPPolicy(r.IntN(3))}
	for _, ip := range []string{"192.0.2.1", "127.0.0.1", "2001:db8::1"} {
		if r.IntN(2) == 0 {
			n.NodePorts = append(n.NodePorts, netip.MustParseAddr(ip))
		}
	}
	if r.IntN(2) == 0 {
		n.Addresses = []netip.Addr{netip.MustParseAddr("10.96.0.2")}
	}
	return n
}

func randomObject(r *rand.Rand, name Name) *Object {
	o := &Object{
		Name: name, Type: Type(r.IntN(4)), Headless: r.IntN(10) == 0, Foreign: r.IntN(10) == 0, InternalLocal: r.IntN(2) == 0,
		ExternalLocal: r.IntN(2) == 0, HealthCheckNodePort: uint16(r.IntN(3)), Created: time.Unix(int64(r.IntN(2)), 0),
	}
	for _, ip := range []string{"10.96.0.1", "fd00::1"} {
		if r.IntN(3) > 0 {
			o.ClusterIPs = append(o.ClusterIPs, netip.MustParseAddr(ip))
		}
	}
	some := func() (ips []netip.Addr) {
		for _, ip := range []string{"10.96.0.1", "10.96.0.2", "192.0.2.1", "fd00::1"} {
			if r.IntN(4) == 0 {
				ips = append(ips, netip.MustParseAddr(ip))
			}
		}
		return ips
	}
	o.LoadBalancerIPs, o.ExternalIPs = some(), some()
	for _, p := range []string{"10.0.0.0/8", "0.0.0.0/0", "fd00::/8"} {
		if r.IntN(3) == 0 {
			o.SourceRanges = append(o.SourceRanges, netip.MustParsePrefix(p))
		}
	}
	o.Ports = randomPorts(r)
	for i := range o.Ports {
		o.Ports[i].NodePort = uint16(r.IntN(2) * (30000 + i))
	}
	return o
}

func randomSlice(r *rand.Rand, name Name) *Slice {
	x := &Slice{Name: name, Service: fmt.Sprintf("s%d", r.IntN(3)), Ports: randomPorts(r)}
	family := []string{"10.0.0.%d", "fd01::%d"}[r.IntN(2)]
	for range r.IntN(4) {
		x.Endpoints = append(x.Endpoints, Endpoint{
			Addr:        netip.MustParseAddr(fmt.Sprintf(family, 1+r.IntN(3))),
			Node:        fmt.Sprintf("n%d", r.IntN(2)),
			Ready:       r.IntN(2) == 0,
			Serving:     r.IntN(2) == 0,
			Terminating: r.IntN(2) == 0,
			Hints:       MakeHints([]string{"z0", "z1"}[:r.IntN(3)], []string{"n0", "n1"}[:r.IntN(3)]),
		})
	}
	return x
}

func randomPorts(r *rand.Rand) []Port {
	ports := []Port{{"a", TCP, 80, 0}, {"b", TCP, 81, 0}, {"c", UDP, 80, 0}}
	r.Shuffle(len(ports), func(i, j int) { ports[i], ports[j] = ports[j], ports[i] })
	return slices.Clone(ports[:r.IntN(4)])
}
