package datapath

import (
	"fmt"
	"maps"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// resolve reads the maps as a connecting socket would: for every frontend and claim the exact share of each address.
func resolve(t testing.TB, d *Datapath) map[string]string {
	t.Helper()
	frontends, outside, claims := map[frontendKey]targetValue{}, map[frontendKey]targetValue{}, map[claimKey]targetValue{}
	members, sources := map[memberKey]uint32{}, map[sourceKey]uint32{}
	must(t, readMap(d.objs.outside(), outside))
	must(t, readMap(d.objs.members(), members))
	must(t, readMap(d.objs.sources(), sources))
	slots, backends := map[slotKey]slotValue{}, map[uint32]backendValue{}
	must(t, readMap(d.objs.frontends(), frontends))
	must(t, readMap(d.objs.claims(), claims))
	must(t, readMap(d.objs.slots(), slots))
	must(t, readMap(d.objs.backends(), backends))
	out := map[string]string{}
	usedSlots, usedBackends := 0, map[uint32]bool{}
	shares := func(target targetValue) string {
		share := map[string]*big.Rat{}
		add := func(id uint32, num, den uint64) {
			name := "refuse"
			if id != 0 {
				b, ok := backends[id]
				if !ok {
					t.Fatalf("a slot names backend %d, which isn't there", id)
				}
				usedBackends[id] = true
				name = addrPort(b.Addr, b.Port).String()
			}
			if share[name] == nil {
				share[name] = new(big.Rat)
			}
			share[name].Add(share[name], new(big.Rat).SetFrac(new(big.Int).SetUint64(num), new(big.Int).SetUint64(den)))
		}
		for i := range target.Slots {
			s, ok := slots[slotKey{Pool: target.Pool, Generation: target.Generation, Slot: i}]
			if !ok {
				t.Fatalf("slot %d of pool %d isn't there", i, target.Pool)
			}
			usedSlots++
			n := uint64(target.Slots)
			add(s.Backend, s.Keep, target.Weight*n)
			add(s.Other, target.Weight-s.Keep, target.Weight*n)
		}
		for name, r := range share {
			if r.Sign() == 0 {
				delete(share, name)
			}
		}
		return fmt.Sprint("mode ", target.Mode, " ", share)
	}
	// What belongs to a pool beside its slots: members are its backends, no more and no less.
	belongings := func(target targetValue) string {
		inUse, ranges := map[uint32]bool{}, []string{}
		for i := range target.Slots {
			inUse[slots[slotKey{Pool: target.Pool, Generation: target.Generation, Slot: i}].Backend] = true
		}
		for k := range members {
			if k.Pool != target.Pool {
				continue
			}
			if !inUse[k.Backend] || target.Flags&targetMembers == 0 {
				t.Errorf("backend %d is a member of pool %d, but has no slot there or the pool has no members", k.Backend, k.Pool)
			}
			delete(inUse, k.Backend)
			delete(members, k)
		}
		if target.Flags&targetMembers != 0 && len(inUse) > 0 {
			t.Errorf("backends %v of pool %d are no members", inUse, target.Pool)
		}
		for k := range sources {
			if k.Pool == target.Pool {
				ranges = append(ranges, fmt.Sprint(addrPort(k.Addr, 0).Addr(), "/", k.Prefixlen))
				delete(sources, k)
			}
		}
		slices.Sort(ranges)
		return fmt.Sprint(" affinity ", target.AffinitySeconds, " flags ", target.Flags, " sources ", ranges)
	}
	for k, v := range frontends {
		out["frontend "+frontendAddr(k)] = shares(v) + belongings(v)
	}
	for k, v := range outside {
		out["outside "+frontendAddr(k)] = shares(v) + belongings(v)
	}
	for k, v := range claims {
		out["claim "+addrPort(k.Addr, k.Port).String()] = shares(v)
	}
	if len(members)+len(sources) > 0 {
		t.Errorf("members %v and sources %v belong to no pool", members, sources)
	}
	if usedSlots != len(slots) || len(usedBackends) != len(backends) {
		t.Errorf("%d slots for %d in use, %d backends for %d in use: something leaks", len(slots), usedSlots, len(backends), len(usedBackends))
	}
	return out
}

// wish is a random wanted state that changes at random.
type wish struct {
	r        *rand.Rand
	services map[service.Name]*service.Service
	claims   []mesh.Claim
	pods     []Pod
}

func newWish(r *rand.Rand) *wish { return &wish{r: r, services: map[service.Name]*service.Service{}} }

func (w *wish) addr(six bool) netip.AddrPort {
	if six {
		return ap(netip.MustParseAddr(fmt.Sprintf("fd00::%x", 1+w.r.IntN(60))), uint16(80+w.r.IntN(3)))
	}
	return ap(netip.MustParseAddr(fmt.Sprintf("10.1.0.%d", 1+w.r.IntN(60))), uint16(80+w.r.IntN(3)))
}

func (w *wish) offload(six bool) *mesh.Offload {
	o := &mesh.Offload{}
	for i := range 1 + w.r.IntN(3) {
		c := mesh.OffloadCluster{Name: fmt.Sprint(i), Weight: uint32(w.r.IntN(100))}
		for range w.r.IntN(5) {
			c.Endpoints = append(c.Endpoints, mesh.OffloadEndpoint{Addr: w.addr(six), Weight: uint32(1 + w.r.IntN(9))})
		}
		o.Clusters = append(o.Clusters, c)
	}
	return o
}

// change makes n random changes and tells the reconciler.
func (w *wish) change(rec *Reconciler, n int) {
	for range n {
		switch w.r.IntN(8) {
		case 0, 1, 2, 3:
			name := service.Name{Namespace: "ns", Name: fmt.Sprint("s", w.r.IntN(25))}
			s := &service.Service{Name: name}
			for range 1 + w.r.IntN(2) {
				six := w.r.IntN(3) == 0
				front := w.addr(six)
				f := service.Frontend{Addr: ap(front.Addr(), uint16(8000+w.r.IntN(4))), Protocol: service.TCP}
				if w.r.IntN(4) == 0 {
					f.Protocol = service.UDP
				}
				for range w.r.IntN(12) {
					f.Backends = append(f.Backends, service.Backend{Addr: w.addr(six)})
				}
				if w.r.IntN(4) == 0 {
					f.Affinity = time.Duration(1+w.r.IntN(2)) * time.Hour
				}
				w.fromOutside(&f, six)
				if !hasFrontend(s, f) {
					s.Frontends = append(s.Frontends, f)
				}
			}
			if w.r.IntN(6) == 0 {
				f := service.Frontend{Addr: ap(netip.MustParseAddr("127.0.0.1"), uint16(30000+w.r.IntN(4))), Protocol: service.TCP, Kind: service.NodePort}
				f.Backends = append(f.Backends, service.Backend{Addr: w.addr(false)})
				s.Loopback = append(s.Loopback, f)
			}
			w.services[name] = s
			rec.SetService(s)
		case 4, 5:
			name := service.Name{Namespace: "ns", Name: fmt.Sprint("s", w.r.IntN(25))}
			delete(w.services, name)
			rec.DeleteService(name)
		case 6:
			w.claims = nil
			seen := map[netip.AddrPort]bool{}
			for range w.r.IntN(12) {
				six := w.r.IntN(2) == 0
				c := mesh.Claim{Addr: w.addr(six), Listener: "l"}
				if w.r.IntN(5) == 0 {
					c.Addr = ap(netip.IPv4Unspecified(), uint16(w.r.IntN(3)))
					six = false
				}
				if seen[c.Addr] {
					continue
				}
				seen[c.Addr] = true
				if w.r.IntN(2) == 0 {
					c.Offload = w.offload(six)
				}
				w.claims = append(w.claims, c)
			}
			rec.SetClaims(w.claims)
		case 7:
			w.pods = nil
			for i := range w.r.IntN(20) {
				w.pods = append(w.pods, Pod{Name: fmt.Sprint("p", i), Cookie: uint64(1000 + w.r.IntN(40)), Enrolled: w.r.IntN(2) == 0,
					IPs: []netip.Addr{w.addr(false).Addr(), w.addr(true).Addr()}})
			}
			rec.SetPods(w.pods)
		}
	}
}

// fromOutside makes a frontend one that clients outside may use, now and then.
func (w *wish) fromOutside(f *service.Frontend, six bool) {
	if w.r.IntN(3) != 0 {
		return
	}
	f.Kind = service.LoadBalancer
	f.External = &service.External{Backends: f.Backends, Local: w.r.IntN(2) == 0}
	if f.External.Local {
		f.External.Backends = f.Backends[:w.r.IntN(len(f.Backends)+1)]
		f.External.Silent = len(f.External.Backends) == 0 && w.r.IntN(2) == 0
	}
	for range w.r.IntN(3) {
		bits := 8 * w.r.IntN(5)
		f.External.Sources = append(f.External.Sources, netip.PrefixFrom(w.addr(six).Addr(), bits).Masked())
	}
}

func hasFrontend(s *service.Service, f service.Frontend) bool {
	for _, g := range s.Frontends {
		if g.Addr == f.Addr && g.Protocol == f.Protocol {
			return true
		}
	}
	return false
}

// all tells a fresh reconciler the whole state at once.
func (w *wish) all(rec *Reconciler) {
	for _, s := range w.services {
		rec.SetService(s)
	}
	rec.SetClaims(w.claims)
	rec.SetPods(w.pods)
}

// compareWithFresh checks that d's maps mean what a datapath that never saw any change computes from the final state.
func compareWithFresh(t testing.TB, w *world, d *Datapath, wish *wish) {
	t.Helper()
	cfg := w.cfg
	cfg.BPFFS = filepath.Join(t.TempDir(), "fresh")
	cfg.CgroupRoot = filepath.Join(w.cgroup, "fresh")
	must(t, os.Mkdir(cfg.CgroupRoot, 0o755))
	defer os.Remove(cfg.CgroupRoot)
	fresh, err := Open(cfg)
	must(t, err)
	defer func() {
		fresh.Close()
		must(t, Cleanup(cfg))
	}()
	wish.all(fresh.Reconciler())
	synced(t, fresh)
	if got, want := resolve(t, d), resolve(t, fresh); !reflect.DeepEqual(got, want) {
		for k := range maps.Keys(want) {
			if got[k] != want[k] {
				t.Errorf("%s: %s\nwant %s", k, got[k], want[k])
			}
		}
		for k := range maps.Keys(got) {
			if _, ok := want[k]; !ok {
				t.Errorf("%s should not be there", k)
			}
		}
	}
	for _, name := range []string{"sm_netns", "sm_local"} {
		got, err := d.Dump(name)
		must(t, err)
		want, err := fresh.Dump(name)
		must(t, err)
		index := func(es []Entry) map[string]string {
			m := map[string]string{}
			for _, e := range es {
				m[fmt.Sprint(e.Key)] = fmt.Sprint(e.Value)
			}
			return m
		}
		if !reflect.DeepEqual(index(got), index(want)) {
			t.Errorf("%s: %v\nwant %v", name, index(got), index(want))
		}
	}
}

func TestMapsEqualAFreshComputationAfterRandomChanges(t *testing.T) {
	w := newWorld(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	wish := newWish(rand.New(rand.NewPCG(seed, 5)))
	d := w.open(func(c *Config) { c.Outside = true })
	synced(t, d)
	for range 12 {
		for range 10 {
			wish.change(d.Reconciler(), 1+wish.r.IntN(10))
			flush(t, d)
		}
		if wish.r.IntN(2) == 0 { // a restart in between
			must(t, d.Close())
			d = w.open()
			wish.all(d.Reconciler())
			synced(t, d)
		}
		compareWithFresh(t, w, d, wish)
	}
}

func TestDriftIsRepairedAndCounted(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	enrol(d, client, b)
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080), ap(b.v6, 8080)))
	d.Reconciler().SetService(svc("six", vip6, ap(b.v6, 8080)))
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	d.Reconciler().SetClaims([]mesh.Claim{claim(vip6)})
	synced(t, d)
	want := resolve(t, d)
	if n := d.Reconciler().Repair(); n != 0 {
		t.Fatalf("%d entries differ although nobody touched them", n)
	}
	must(t, d.objs.frontends().Delete(frontendKeyOf(vip4, 6)))
	must(t, d.objs.frontends().Put(frontendKeyOf(netip.MustParseAddrPort("9.9.9.9:9"), 6), targetValue{Mode: modeService}))
	var slot slotKey
	must(t, d.objs.slots().NextKey(nil, &slot))
	must(t, d.objs.slots().Put(slot, slotValue{Keep: 1, Backend: 77, Other: 77}))
	var id uint32
	must(t, d.objs.backends().NextKey(nil, &id))
	must(t, d.objs.backends().Delete(id))
	must(t, d.objs.netns().Delete(client.cookie))
	if n := d.Reconciler().Repair(); n != 5 {
		t.Errorf("repaired %d entries, want 5", n)
	}
	if got := resolve(t, d); !reflect.DeepEqual(got, want) {
		t.Errorf("after the repair: %v, want %v", got, want)
	}
	if s := d.Status().Reconciler; s.DriftRepaired != 5 {
		t.Errorf("status counts %d", s.DriftRepaired)
	}
}
