package datapath

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// guarded is a world with a Service and an enrolled pair of pods, whose datapath looks after itself.
func guarded(t *testing.T) (*world, *Datapath, func()) {
	t.Helper()
	w := newWorld(t)
	d := w.open(func(c *Config) { c.Acceleration, c.OriginalDstSockopt = true, true })
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	synced(t, d)
	d.lookAfter()
	if n := d.Repairs(); n[repairPin]+n[repairLink]+n[repairVerdict] != 0 {
		t.Fatalf("repairs where nothing was broken: %v", n)
	}
	return w, d, func() {
		t.Helper()
		if got, err := client.ask(vip4); err != nil || got != "b" {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestEmptiedPinsComeBack(t *testing.T) {
	for name, empty := range map[string]func(w *world, d *Datapath){
		"every file": func(_ *world, d *Datapath) { must(t, d.dir.remove()) },
		"one file":   func(_ *world, d *Datapath) { must(t, os.Remove(d.dir.mapPin(sockmeshMapSmFrontends))) },
		"unmounted":  func(w *world, _ *Datapath) { must(t, unix.Unmount(w.cfg.BPFFS, unix.MNT_DETACH)) },
	} {
		t.Run(name, func(t *testing.T) {
			w, d, works := guarded(t)
			empty(w, d)
			works() // what is attached stays attached
			d.lookAfter()
			works()
			if d.Repairs()[repairPin] == 0 || d.guardStatus().Problem != "" {
				t.Errorf("%+v", d.guardStatus())
			}
			before := d.Repairs()[repairPin]
			d.lookAfter()
			if again := d.Repairs()[repairPin]; again != before {
				t.Errorf("repaired once more: %d pins, before %d", again, before)
			}
			// The next agent finds everything.
			ids := map[string]ebpf.MapID{}
			for name, m := range d.objs.maps {
				ids[name] = mapID(m)
			}
			must(t, d.Close())
			works()
			next := w.open(func(c *Config) { c.Acceleration, c.OriginalDstSockopt = true, true })
			for name, m := range next.objs.maps {
				if mapID(m) != ids[name] {
					t.Errorf("%s is another map", name)
				}
			}
			works()
		})
	}
}

func TestDetachedProgramsAreAttachedAgain(t *testing.T) {
	_, d, works := guarded(t)
	var names []string
	for name := range d.links {
		names = append(names, name)
	}
	if len(names) < 6 {
		t.Fatalf("links: %v", names)
	}
	for i, name := range names {
		must(t, d.links[name].Detach())
		d.lookAfter()
		works()
		if n := d.Repairs()[repairLink]; n != uint64(i+1) {
			t.Errorf("%s: %d repairs, want %d", name, n, i+1)
		}
		if info, err := d.links[name].Info(); err != nil || detached(info) {
			t.Errorf("%s hangs nowhere: %v", name, err)
		}
		if _, err := os.Stat(d.dir.linkPin(name)); err != nil {
			t.Errorf("%s is not pinned: %v", name, err)
		}
	}
}

func TestVerdictProgramIsAttachedAgain(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	m.d.lookAfter()
	ask := func() (redirected uint64) {
		t.Helper()
		before, err := m.d.Counters()
		must(t, err)
		if got, err := m.client.ask(ap(m.server.v4, 8080)); err != nil || got != "b" {
			t.Errorf("%q, %v", got, err)
		}
		after, err := m.d.Counters()
		must(t, err)
		return after.RedirectedBytes - before.RedirectedBytes
	}
	if ask() == 0 {
		t.Fatal("nothing is redirected")
	}
	must(t, link.RawDetachProgram(link.RawDetachProgramOptions{
		Target: m.d.objs.pairs().FD(), Program: m.d.objs.progs[progMsg], Attach: ebpf.AttachSkMsgVerdict,
	}))
	// A connection that is made now has nobody who decides about its messages.
	gap, err := m.client.dial(ap(m.server.v4, 8080))
	must(t, err)
	defer gap.Close()
	greeting := make([]byte, 2)
	if _, err := io.ReadFull(gap, greeting); err != nil || ask() != 0 {
		t.Errorf("%q, %v", greeting, err)
	}
	if pairs := countEntries(m.d.objs.pairs()); pairs == 0 {
		t.Error("the connection is not in sm_pairs: this tests nothing")
	}
	m.d.lookAfter()
	if m.d.Repairs()[repairVerdict] != 1 {
		t.Errorf("%+v", m.d.guardStatus())
	}
	// Those of connections that have ended leave by themselves.
	eventually(t, "no socket that was enrolled without a verdict program is", func() bool { return countEntries(m.d.objs.pairs()) == 0 })
	if ask() == 0 {
		t.Error("nothing is redirected any more")
	}
	must(t, echoes(gap)) // goes on by TCP
	m.d.lookAfter()
	if m.d.Repairs()[repairVerdict] != 1 {
		t.Errorf("repaired again: %+v", m.d.guardStatus())
	}
}

// Sockets that were enrolled without a verdict program are taken out of sm_pairs, and none of those that bytes are being
// redirected to, whatever they are doing at that moment: what such a socket has not read would be lost with its place.
func TestReleaseOfMuteSocketsLosesNothing(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	dial := func() *net.TCPConn {
		t.Helper()
		c, err := m.client.dial(ap(m.server.v4, 8080))
		must(t, err)
		t.Cleanup(func() { c.Close() })
		if got, err := greeting(c); err != nil || got != "b" {
			t.Fatalf("%q, %v", got, err)
		}
		return c
	}
	before := dial()
	must(t, link.RawDetachProgram(link.RawDetachProgramOptions{
		Target: m.d.objs.pairs().FD(), Program: m.d.objs.progs[progMsg], Attach: ebpf.AttachSkMsgVerdict,
	}))
	gap := dial()
	must(t, m.d.attachMsg())
	after := dial()
	if pairs := countEntries(m.d.objs.pairs()); pairs != 3*4 {
		t.Fatalf("%d sockets are enrolled: this tests nothing", pairs)
	}
	must(t, m.d.releaseMute())
	if pairs := countEntries(m.d.objs.pairs()); pairs != 2*4 {
		t.Errorf("%d sockets are enrolled, want those of the two connections that were not made in the gap", pairs)
	}
	for _, c := range []*net.TCPConn{before, gap, after} {
		must(t, echoes(c))
	}

	// Connections that come, send their first bytes and go, while it looks again and again.
	stop := make(chan struct{})
	var looking sync.WaitGroup
	defer looking.Wait()
	defer close(stop)
	looking.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if err := m.d.releaseMute(); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	for range 300 {
		c := dial()
		must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		if err := echoes(c); err != nil {
			t.Errorf("a connection lost bytes: %v", err)
			break
		}
		c.Close()
	}
}

func echoes(c net.Conn) error {
	if _, err := io.WriteString(c, "still"); err != nil {
		return err
	}
	got := make([]byte, 5)
	_, err := io.ReadFull(c, got)
	if err == nil && string(got) != "still" {
		err = fmt.Errorf("%q came back", got)
	}
	return err
}

// Whoever made other pins meanwhile has taken over: two that repair each other's work would never end.
func TestPinsOfAnotherAgentAreLeftAlone(t *testing.T) {
	w, d, works := guarded(t)
	must(t, d.dir.remove())
	next := w.open(func(c *Config) { c.Acceleration, c.OriginalDstSockopt = true, true })
	d.lookAfter()
	if d.Repairs()[repairPin] != 0 || d.inCharge() || !next.inCharge() {
		t.Errorf("repairs %v, in charge %v and %v", d.Repairs(), d.inCharge(), next.inCharge())
	}
	if !sameMap(next.dir.mapPin(sockmeshMapSmConfig), next.objs.config()) {
		t.Error("the pin is not the new agent's")
	}
	works()
}

// An agent of another layout removes the pins of the old one: that is no damage either.
func TestAnotherLayoutIsNoDamage(t *testing.T) {
	_, d, _ := guarded(t)
	other := layoutDir{d.dir.base, layoutVersion + 1}
	must(t, other.create())
	must(t, os.Rename(d.dir.linkPin(sockmeshProgSmConnect4), other.linkPin(sockmeshProgSmConnect4)))
	d.lookAfter()
	if d.Repairs()[repairPin] != 0 || d.inCharge() {
		t.Errorf("repairs %v, in charge %v", d.Repairs(), d.inCharge())
	}
	if _, err := os.Stat(filepath.Join(other.path(), "links", sockmeshProgSmConnect4)); err != nil {
		t.Error(err)
	}
}
