package datapath

// Maps that have no room left: what is refused, what is let go of first, what comes back, and that somebody is told.

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/service"
)

func TestFullMapRefusesTheNewEntryOnly(t *testing.T) {
	w := newWorld(t)
	d := w.open(func(c *Config) { c.Sizes.Frontends, c.Sizes.Backends, c.Sizes.Slots = 3, 4, 6 })
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	r := d.Reconciler()
	front := func(i int) netip.AddrPort { return ap(netip.MustParseAddr(fmt.Sprintf("10.96.1.%d", i)), 80) }
	one := ap(b.v4, 8080)
	synced(t, d)
	for i := range 3 {
		r.SetService(svc(fmt.Sprint("s", i), front(i), one))
	}
	flush(t, d)
	before := resolve(t, d)

	r.SetService(svc("frontends", front(9), one))
	if err := r.Flush(t.Context()); err == nil || !strings.Contains(err.Error(), "sm_frontends is full") {
		t.Errorf("a frontend too many: %v", err)
	}
	var many []netip.AddrPort
	for i := range 8 {
		many = append(many, ap(b.v4, uint16(9000+i)))
	}
	r.SetService(svc("s1", front(1), many...))
	if err := r.Flush(t.Context()); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Errorf("too many backends: %v", err)
	}
	if e := d.Status().Reconciler.Errors; len(e) != 2 || e[0].Name != "default/s1" || e[1].Name != "default/frontends" || e[1].Map != "sm_frontends" {
		t.Errorf("status says %+v", e)
	}
	failed, version := r.Failures(0)
	if len(failed) != 2 || !strings.Contains(failed[0].Error+failed[1].Error, "raise --map-frontends") {
		t.Errorf("failures %+v", failed)
	}
	if again, same := r.Failures(version); again != nil || same != version {
		t.Errorf("nothing changed, and yet %v, %d", again, same)
	}
	if got := resolve(t, d); !reflect.DeepEqual(got, before) {
		t.Errorf("what was there has changed: %v, before %v", got, before)
	}
	for i := range 3 {
		if got, err := client.ask(front(i)); err != nil || got != "b" {
			t.Errorf("existing Service %d: %q, %v", i, got, err)
		}
	}

	// Room comes: the change that brings it is enough.
	r.SetService(svc("s1", front(1), one))
	r.DeleteService(service.Name{Namespace: "default", Name: "s2"})
	r.SetService(svc("frontends", front(9), one))
	flush(t, d)
	if got, err := client.ask(front(9)); err != nil || got != "b" {
		t.Errorf("after room was made: %q, %v", got, err)
	}
	if failed, now := r.Failures(version); len(failed) != 0 || now == version {
		t.Errorf("after room was made failures are %v", failed)
	}
}

// Endpoints that go leave a full map, even where make before break has no room: a Service can shrink, and a pod can take the
// place of another. What waited for room gets it without another change of its own.
func TestAFullMapLetsGoOfWhatIsGone(t *testing.T) {
	w := newWorld(t)
	d := w.open(func(c *Config) { c.Sizes.Frontends, c.Sizes.Backends, c.Sizes.Slots, c.Sizes.Members = 3, 4, 4, 4 })
	r := d.Reconciler()
	synced(t, d)
	for protocol, make := range map[string]func(string, netip.AddrPort, ...netip.AddrPort) *service.Service{"TCP": svc, "UDP": udpSvc} {
		backends := func(names string) (all []netip.AddrPort) {
			for _, n := range names {
				all = append(all, ap(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 80))
			}
			return all
		}
		holds := func(want string) {
			t.Helper()
			got := resolve(t, d) // and nothing leaks
			if len(got) != 1 {
				t.Fatalf("%s: %v", protocol, got)
			}
			for _, text := range got {
				for n := 'a'; n <= 'z'; n++ {
					if has := strings.Contains(text, backends(string(n))[0].String()); has != strings.ContainsRune(want, n) {
						t.Errorf("%s: in the map is %s, want %q", protocol, text, want)
					}
				}
			}
		}
		for _, step := range []string{"abcd", "a", "abcd", "efgh", "dcba", "abcx", "", "abcd"} {
			r.SetService(make("web", vip4, backends(step)...))
			flush(t, d)
			holds(step)
		}
		r.SetService(make("web", vip4, backends("abcde")...))
		if err := r.Flush(t.Context()); err == nil || !strings.Contains(err.Error(), "is full") {
			t.Errorf("%s: an endpoint too many: %v", protocol, err)
		}
		holds("abcd")
		r.SetService(make("web", vip4, backends("abcefghi")...))
		if err := r.Flush(t.Context()); err == nil || !strings.Contains(err.Error(), "is full") {
			t.Errorf("%s: an endpoint goes and too many come: %v", protocol, err)
		}
		holds("abc")
		r.SetService(make("waits", vip6, backends("xy")...))
		if err := r.Flush(t.Context()); err == nil {
			t.Errorf("%s: two endpoints in a map of four that has three", protocol)
		}
		r.SetService(make("web", vip4, backends("ab")...))
		_ = r.Flush(t.Context()) // makes the room
		flush(t, d)              // what the reconciler does then by itself
		if got := resolve(t, d); len(got) != 2 {
			t.Errorf("%s: when there was room: %v", protocol, got)
		}
		r.DeleteService(service.Name{Namespace: "default", Name: "web"})
		r.DeleteService(service.Name{Namespace: "default", Name: "waits"})
		flush(t, d)
	}
}

// Whatever changes while maps are full, nothing is in them that nobody uses, and nothing is used that is not in them.
func TestFullMapsHoldNothingDead(t *testing.T) {
	w := newWorld(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	wish := newWish(rand.New(rand.NewPCG(seed, 6)))
	d := w.open(func(c *Config) {
		c.Outside = true
		c.Sizes.Frontends, c.Sizes.Outside, c.Sizes.Backends, c.Sizes.Slots, c.Sizes.Members, c.Sizes.Sources = 12, 8, 20, 40, 12, 6
	})
	r := d.Reconciler()
	synced(t, d)
	refused := 0
	for range 200 {
		wish.change(r, 1+wish.r.IntN(4))
		if r.Flush(t.Context()) != nil {
			refused++
		}
		resolve(t, d)
		if t.Failed() {
			t.FailNow()
		}
	}
	if n := r.Repair(); n != 0 {
		t.Errorf("%d entries are not what was written", n)
	}
	if refused == 0 {
		t.Error("the maps were never full")
	}
	for name := range wish.services {
		r.DeleteService(name)
	}
	r.SetClaims(nil)
	_ = r.Flush(t.Context())
	flush(t, d)
	if got := resolve(t, d); len(got) != 0 {
		t.Errorf("when nothing is wanted any more: %v", got)
	}
}

func TestAMapThatIsAlmostFullIsWarnedOfOnce(t *testing.T) {
	w := newWorld(t)
	var said logLines
	d := w.open(func(c *Config) {
		c.Sizes.Frontends, c.Logger = 20, slog.New(slog.NewTextHandler(&said, nil))
	})
	r := d.Reconciler()
	front := func(i int) netip.AddrPort { return ap(netip.MustParseAddr(fmt.Sprintf("10.96.1.%d", i)), 80) }
	add := func(from, to int) {
		for i := from; i < to; i++ {
			r.SetService(svc(fmt.Sprint("s", i), front(i), ap(netip.MustParseAddr("10.0.0.1"), 80)))
		}
		flush(t, d)
		r.Repair()
	}
	synced(t, d)
	warnings := func() string { return strings.Join(d.Status().Datapath.Warnings, "\n") }
	add(0, 17)
	if w := warnings(); strings.Contains(w, "sm_frontends") {
		t.Errorf("at 85 %%: %s", w)
	}
	add(17, 18)
	if w := warnings(); !strings.Contains(w, "sm_frontends is 90% full (18 of 20 entries)") || !strings.Contains(w, "raise --map-frontends") {
		t.Errorf("at 90 %% status warns of %q", w)
	}
	add(18, 19)
	if n := said.count("a map is almost full"); n != 1 {
		t.Errorf("it was logged %d times", n)
	}
	for i := range 10 {
		r.DeleteService(service.Name{Namespace: "default", Name: fmt.Sprint("s", i)})
	}
	flush(t, d)
	r.Repair()
	if w := warnings(); strings.Contains(w, "sm_frontends") {
		t.Errorf("at 45 %%: %s", w)
	}
	add(0, 10)
	if n := said.count("a map is almost full"); n != 2 {
		t.Errorf("when it was full again, it had been logged %d times in all", n)
	}
}

// logLines is what was logged.
type logLines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logLines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logLines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}
