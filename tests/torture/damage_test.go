package torture

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// repairs of a kind that the agent's metrics count.
func (w *town) repairs(kind string) (int, error) {
	text, err := w.Metrics(w.ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	return metric(text, fmt.Sprintf("sockmesh_datapath_repairs_total{kind=%q}", kind))
}

// damage does something to the kernel's part and waits until the agent has counted n repairs; the result is the time in
// between.
func (w *town) damage(kind string, n int, do func()) lab.Window {
	w.t.Helper()
	before, err := w.repairs(kind)
	w.must(err)
	from := time.Now()
	do()
	w.eventually("the agent repairs a "+kind, func() error {
		now, err := w.repairs(kind)
		if err == nil && now < before+n {
			err = fmt.Errorf("%d repairs of %d", now-before, n)
		}
		return err
	})
	return lab.Window{From: from, Until: time.Now()}
}

// saysSo checks that people hear of a repair.
func (w *town) saysSo(what string) {
	w.t.Helper()
	out, err := w.CLI(w.ctx, "status")
	w.must(err)
	if !strings.Contains(out, "somebody had removed") || !strings.Contains(out, what) {
		w.t.Errorf("status does not tell of %s:\n%s", what, out)
	}
	if log := w.agent.Output(); !strings.Contains(log, "it has been put back") || !strings.Contains(log, what) {
		w.t.Errorf("the log does not tell of %s", what)
	}
}

// pins of a kind, maps or links, by name.
func (w *town) pins(kind string) map[string]string {
	w.t.Helper()
	files, err := filepath.Glob(filepath.Join(w.BPFFS(), "v*", kind, "*"))
	w.must(err)
	out := map[string]string{}
	for _, f := range files {
		// Links on devices are looked after by pkg/datapath/outside.go, which looks less often.
		if !strings.HasPrefix(filepath.Base(f), "sm_nat_") {
			out[filepath.Base(f)] = f
		}
	}
	if len(out) == 0 {
		w.t.Fatalf("no %s are pinned below %s", kind, w.BPFFS())
	}
	return out
}

// The BPF file system is emptied by hand: nobody notices, and the pins come back.
func TestPinsRemovedByHandUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	pins := []map[string]string{w.pins("maps"), w.pins("links")}
	for range times(1, 10) {
		w.damage("pin", len(pins[0])+len(pins[1]), func() { w.must(os.RemoveAll(w.BPFFS())) })
		w.eventually("every pin is back", func() error {
			for _, kind := range pins {
				for _, file := range kind {
					if _, err := os.Stat(file); err != nil {
						return err
					}
				}
			}
			return nil
		})
		load.flow(20)
	}
	w.saysSo("sm_frontends")
	// The next agent finds the same world.
	w.upgrade()
	load.flow(20)
	w.judge("pins removed by hand", load.stop(nothing), 0)
	w.nothingLeaked("pins removed by hand")
}

// Programs are detached by hand, some and all of them: each is back within seconds. Until then connections can't be made
// as they should; those that there are go on.
func TestProgramsDetachedByHandUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	w.patience = 5 * time.Second // a connect that nobody translates goes nowhere
	load := w.load(w.client, 50*time.Millisecond)
	var gaps []lab.Window
	detach := func(names ...string) {
		t.Helper()
		pins := w.pins("links")
		gap := w.damage("link", len(names), func() {
			for _, name := range names {
				l, err := link.LoadPinnedLink(pins[name], nil)
				w.must(err)
				w.must(l.Detach())
				w.must(l.Close())
			}
		})
		if took := gap.Until.Sub(gap.From); took > 20*time.Second {
			t.Errorf("%s: noticed after %s", names, took)
		}
		gaps = append(gaps, gap)
		load.flow(10)
		for _, name := range names {
			w.saysSo(name)
		}
	}
	detach("sm_sockops", "sm_connect4")
	detach(slices.Collect(maps.Keys(w.pins("links")))...)
	if *long {
		for range 5 {
			for name := range w.pins("links") {
				detach(name)
			}
		}
	}
	w.judge("programs detached by hand", load.stop(madeIn(gaps)), -1)
	w.nothingLeaked("programs detached by hand")
}

// The verdict program is taken off sm_pairs: bytes go by TCP until it is back, and none is lost.
func TestVerdictDetachedByHandUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	for range times(2, 20) {
		w.damage("verdict", 1, func() {
			pairs, err := ebpf.LoadPinnedMap(w.pins("maps")["sm_pairs"], nil)
			w.must(err)
			defer pairs.Close()
			q, err := link.QueryPrograms(link.QueryOptions{Target: pairs.FD(), Attach: ebpf.AttachSkMsgVerdict})
			w.must(err)
			if len(q.Programs) != 1 {
				t.Fatalf("%d verdict programs", len(q.Programs))
			}
			prog, err := ebpf.NewProgramFromID(q.Programs[0].ID)
			w.must(err)
			defer prog.Close()
			w.must(link.RawDetachProgram(link.RawDetachProgramOptions{Target: pairs.FD(), Program: prog, Attach: ebpf.AttachSkMsgVerdict}))
		})
		load.flow(20)
	}
	w.saysSo("sm_msg")
	before := w.status().Acceleration.RedirectedBytes
	load.flow(20)
	if after := w.status().Acceleration.RedirectedBytes; after <= before {
		t.Error("nothing is redirected any more")
	}
	w.judge("verdict program detached by hand", load.stop(nothing), 0)
	w.nothingLeaked("verdict program detached by hand")
}
