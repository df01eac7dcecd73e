package datapath

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

func TestSecondStartAdoptsEverythingUnderTraffic(t *testing.T) {
	w := newWorld(t)
	// An agent that is replaced never closes its datapath; here the old one is closed by the test's end.
	first := w.open(func(c *Config) { c.AcceleratePods = true })
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	fill := func(d *Datapath) {
		enrol(d, client, b)
		d.Reconciler().SetService(svc("four", vip4, ap(b.v4, 8080)))
		d.Reconciler().SetService(svc("six", vip6, ap(b.v6, 8080)))
		synced(t, d)
	}
	fill(first)
	long, err := client.dial(vip4)
	must(t, err)
	defer long.Close()
	if got, err := greeting(long); err != nil || got != "b" {
		t.Fatal(got, err)
	}
	echo(t, long, 1000)

	var asked, failed atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			for _, to := range []netip.AddrPort{vip4, vip6} {
				asked.Add(1)
				if got, err := client.ask(to); err != nil || got != "b" {
					failed.Add(1)
					t.Logf("%v: %q, %v", to, got, err)
				}
			}
		}
	}()
	d := first
	linkIDs := func(d *Datapath) map[string]link.ID {
		out := map[string]link.ID{}
		for name, l := range d.links {
			info, err := l.Info()
			must(t, err)
			out[name] = info.ID
		}
		return out
	}
	links, shares := linkIDs(d), resolve(t, d)
	for range 10 {
		must(t, d.Close())
		next, err := Open(w.cfg)
		must(t, err)
		if got := linkIDs(next); !reflect.DeepEqual(got, links) {
			t.Errorf("links were made anew: %v, before %v", got, links)
		}
		fill(next)
		if s := next.Status().Reconciler; s.Writes != 0 || s.Deletes != 0 {
			t.Errorf("the second start wrote %d entries and deleted %d, where nothing changed", s.Writes, s.Deletes)
		}
		if got := resolve(t, next); !reflect.DeepEqual(got, shares) {
			t.Errorf("after the restart: %v, before %v", got, shares)
		}
		d = next
	}
	cancel()
	<-done
	t.Cleanup(func() { d.Close() })
	echo(t, long, 100_000)
	if got := roles(t, d); got["service enrolled redirect"] != 1 {
		t.Errorf("the connection from before is no longer redirected: %v", got)
	}
	t.Logf("%d connections during 10 restarts, %d failed", asked.Load(), failed.Load())
	if failed.Load() > 0 || asked.Load() == 0 {
		t.Errorf("%d of %d connections failed", failed.Load(), asked.Load())
	}
}

func TestNothingIsDeletedBeforeEverySourceHasSynced(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	enrol(d, client)
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	d.Reconciler().SetClaims([]mesh.Claim{claim(vip6)})
	synced(t, d)
	before := resolve(t, d)
	must(t, d.Close())

	d = w.open()
	r := d.Reconciler()
	flush(t, d) // knows nothing yet
	r.SetClaims(nil)
	r.SetPods(nil)
	r.Synced(SourceServices)
	r.Synced(SourcePods)
	flush(t, d)
	if got := resolve(t, d); !reflect.DeepEqual(got, before) {
		t.Errorf("with a source missing: %v, want what was there: %v", got, before)
	}
	if got, err := client.ask(vip4); err != nil || got != "b" {
		t.Errorf("%q, %v", got, err)
	}
	s := r.Status()
	if s.Synced || !reflect.DeepEqual(s.Waiting, []string{SourceClaims}) {
		t.Errorf("status says %+v", s)
	}
	r.Synced(SourceClaims)
	flush(t, d)
	if got := resolve(t, d); len(got) != 0 {
		t.Errorf("after the last source: %v, want nothing", got)
	}
	for _, m := range d.Maps() {
		switch m.Name {
		case "sm_config", "sm_counters", "sm_splicing", "sm_nat_ports", "sm_node":
		default:
			if m.Entries != 0 {
				t.Errorf("%s has %d entries", m.Name, m.Entries)
			}
		}
	}
}

func TestSourceThatNeverSyncsKeepsItsEntriesAndTheOthersGoOn(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	d.Reconciler().SetService(svc("web", vip4))
	d.Reconciler().SetClaims([]mesh.Claim{claim(vip6)})
	synced(t, d)
	must(t, d.Close())

	d = w.open(func(c *Config) { c.SyncTimeout = 50 * time.Millisecond })
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error)
	go func() { stopped <- d.Reconciler().Run(ctx) }()
	d.Reconciler().Synced(SourceServices)
	eventually(t, "the old Service is deleted after the time-out", func() bool {
		e, err := d.Dump("sm_frontends")
		return err == nil && len(e) == 0
	})
	if e, err := d.Dump("sm_claims"); err != nil || len(e) != 1 {
		t.Errorf("claims of a source that never synced: %v, %v", e, err)
	}
	cancel()
	if err := <-stopped; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// victimEnv makes the test binary open a datapath and change it without end, until it is killed.
const victimEnv = "SM_DATAPATH_VICTIM"

type victimArgs struct {
	CgroupRoot, BPFFS string
	Sizes             Sizes
	Seed              uint64
}

func runVictim() {
	var a victimArgs
	if err := json.Unmarshal([]byte(os.Getenv(victimEnv)), &a); err != nil {
		panic(err)
	}
	d, err := Open(Config{CgroupRoot: a.CgroupRoot, BPFFS: a.BPFFS, Acceleration: true, Services: true, Sizes: a.Sizes})
	if err != nil {
		panic(err)
	}
	for _, s := range []string{SourceServices, SourceClaims, SourcePods} {
		d.Reconciler().Synced(s)
	}
	wish := newWish(rand.New(rand.NewPCG(a.Seed, 2)))
	fmt.Println("running")
	for {
		wish.change(d.Reconciler(), 1+wish.r.IntN(5))
		if err := d.Reconciler().Flush(context.Background()); err != nil {
			panic(err)
		}
	}
}

func TestKilledInTheMiddleOfChanges(t *testing.T) {
	w := newWorld(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	for round := range 10 {
		args, err := json.Marshal(victimArgs{w.cgroup, w.cfg.BPFFS, w.cfg.Sizes, seed + uint64(round)})
		must(t, err)
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), victimEnv+"="+string(args))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		if err := os.MkdirAll(w.cfg.BPFFS, 0o700); err != nil {
			t.Fatal(err)
		}
		must(t, ensureBPFFS(w.cfg.BPFFS)) // else the mount would belong to the victim
		must(t, cmd.Start())
		buf := make([]byte, 7)
		if _, err := out.Read(buf); err != nil {
			t.Fatal("the victim doesn't start: ", err)
		}
		time.Sleep(time.Duration(20+r.IntN(100)) * time.Millisecond)
		must(t, cmd.Process.Signal(syscall.SIGKILL))
		cmd.Wait()

		d, err := Open(w.cfg)
		must(t, err)
		wish := newWish(rand.New(rand.NewPCG(seed+uint64(round), 4)))
		wish.change(d.Reconciler(), 60)
		synced(t, d)
		compareWithFresh(t, w, d, wish)
		must(t, d.Close())
	}
}

func TestPinnedMapOfAnotherSizeIsReplacedByACopy(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	synced(t, d)
	must(t, d.Close())
	d = w.open(func(c *Config) { c.Sizes.Frontends, c.Sizes.Slots, c.Sizes.Backends = 2048, 16384, 8192 })
	if n := d.objs.frontends().MaxEntries(); n != 2048 {
		t.Errorf("sm_frontends has room for %d", n)
	}
	if got, err := client.ask(vip4); err != nil || got != "b" {
		t.Errorf("before any source has spoken: %q, %v", got, err)
	}
	must(t, d.Close())
	d = w.open(func(c *Config) { c.Sizes.Frontends = 1 })
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	synced(t, d)
	if got, err := client.ask(vip4); err != nil || got != "b" {
		t.Errorf("in the smallest map: %q, %v", got, err)
	}

	// Smaller than what is in it: nothing is thrown out, and status says why the size is another one.
	d.Reconciler().SetService(svc("many", vip6, ap(b.v4, 9001), ap(b.v4, 9002), ap(b.v4, 9003)))
	if err := d.Reconciler().Flush(t.Context()); err == nil || !strings.Contains(err.Error(), "sm_frontends is full (1 entries): raise --map-frontends") {
		t.Errorf("a second frontend in a map of one: %v", err)
	}
	must(t, d.Close())
	d = w.open(func(c *Config) { c.Sizes.Frontends, c.Sizes.Slots = 8, 2 })
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	d.Reconciler().SetService(svc("more", vip6, ap(b.v4, 9001)))
	synced(t, d)
	must(t, d.Close())
	d = w.open(func(c *Config) { c.Sizes.Frontends, c.Sizes.Slots = 1, 2 })
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	d.Reconciler().SetService(svc("more", vip6, ap(b.v4, 9001)))
	synced(t, d)
	if got, err := client.ask(vip4); err != nil || got != "b" || len(resolve(t, d)) != 2 {
		t.Errorf("after it should have shrunk below its fill: %q, %v, %v", got, err, resolve(t, d))
	}
	if w := strings.Join(d.Status().Datapath.Warnings, "\n"); !strings.Contains(w, "sm_frontends keeps its size of 8 entries, although 1 are asked for") {
		t.Errorf("status says %q", w)
	}
}

func TestOtherLayoutStaysInChargeUntilTheNewMapsAreFilled(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, a, b := w.pod(), w.pod(), w.pod()
	a.server("a", 8080)
	b.server("b", 8080)
	d.Reconciler().SetService(svc("web", vip4, ap(a.v4, 8080)))
	synced(t, d)
	must(t, d.Close())
	// What an earlier release with another layout would have left.
	must(t, os.Rename(layoutDir{w.cfg.BPFFS, layoutVersion}.path(), filepath.Join(w.cfg.BPFFS, "v0")))

	d = w.open()
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	flush(t, d)
	if got, err := client.ask(vip4); err != nil || got != "a" || d.Status().Datapath.Attached {
		t.Errorf("before the first sync: %q, %v; want the old layout's answer", got, err)
	}
	synced(t, d)
	if got, err := client.ask(vip4); err != nil || got != "b" || !d.Status().Datapath.Attached {
		t.Errorf("after it: %q, %v; want the new layout's answer", got, err)
	}
	if _, err := os.Stat(filepath.Join(w.cfg.BPFFS, "v0")); !errors.Is(err, os.ErrNotExist) {
		t.Error("the old layout's pins are still there")
	}
}
