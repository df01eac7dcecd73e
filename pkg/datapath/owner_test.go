package datapath

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// An agent whose successor dies takes charge again: programs, settings and tables are its own, made from what the other one
// left.
func TestPredecessorTakesChargeAgain(t *testing.T) {
	w := newWorld(t)
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	owners := t.TempDir()
	withOwners := func(c *Config) { c.Owners, c.Acceleration, c.Outside = owners, true, true }
	old := w.open(withOwners)
	old.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	synced(t, old)
	want, flags := resolve(t, old), old.flags
	if old.Orphaned() || !old.InCharge() || old.Accompanied() {
		t.Fatal("an agent that is alone is not in charge, or sees another")
	}
	next := w.open(withOwners, func(c *Config) { c.Acceleration, c.FailClosed = false, true })
	next.Reconciler().SetService(svc("other", vip6, ap(b.v6, 8080)))
	synced(t, next)
	if !old.Accompanied() || !next.Accompanied() {
		t.Fatal("two agents that live must know of each other")
	}
	if old.Orphaned() || old.InCharge() || !next.InCharge() {
		t.Fatal("the new agent must be in charge while it lives")
	}
	if err := old.Retake(); err == nil || !next.InCharge() {
		t.Fatalf("taken back from an agent that lives: %v", err)
	}
	old.lookAfter()
	if err := old.Reconciler().Flush(t.Context()); err == nil {
		t.Fatal("the old agent has not noticed")
	}
	// What the cluster says meanwhile is remembered.
	old.Reconciler().SetService(svc("late", ap(vip4.Addr(), 81), ap(b.v4, 8080)))
	must(t, next.Close())
	if !old.Orphaned() || old.Accompanied() {
		t.Fatal("the new agent's end goes unnoticed")
	}
	must(t, old.Retake())
	must(t, old.Reconciler().Flush(t.Context()))
	if !old.InCharge() || old.Orphaned() || old.Status().Reconciler.Superseded {
		t.Error("not in charge")
	}
	old.Reconciler().DeleteService(svc("late", vip4).Name)
	must(t, old.Reconciler().Flush(t.Context()))
	if got := resolve(t, old); !reflect.DeepEqual(got, want) {
		t.Errorf("the maps are %v, want %v", got, want)
	}
	fresh, err := newTables(old.objs)
	must(t, err)
	if !reflect.DeepEqual(fresh.frontends, old.rec.tables.frontends) || !reflect.DeepEqual(fresh.backends, old.rec.tables.backends) {
		t.Errorf("the maps are not what is known of them: %v and %v", fresh.frontends, old.rec.tables.frontends)
	}
	if old.flags != flags {
		t.Errorf("flags %b, want %b", old.flags, flags)
	}
	for name, l := range old.links {
		info, err := l.Info()
		must(t, err)
		if uint32(info.Program) != progID(old.objs.progs[name]) {
			t.Errorf("%s is another agent's program", name)
		}
	}
	q, err := link.QueryPrograms(link.QueryOptions{Target: old.objs.pairs().FD(), Attach: ebpf.AttachSkMsgVerdict})
	if err != nil || len(q.Programs) != 1 || uint32(q.Programs[0].ID) != progID(old.objs.progs[progMsg]) {
		t.Errorf("the verdict program is another agent's: %v, %v", q, err)
	}
	eventually(t, "the programs on the devices are its own", func() bool {
		for _, name := range pinnedOutside(old.dir) {
			l, err := link.LoadPinnedLink(old.dir.linkPin(name), nil)
			must(t, err)
			info, err := l.Info()
			l.Close()
			must(t, err)
			prog, err := ebpf.NewProgramFromID(info.Program)
			must(t, err)
			theirs := true
			for _, p := range old.outside.programs {
				theirs = theirs && progID(p.in) != progID(prog) && progID(p.out) != progID(prog)
			}
			prog.Close()
			if theirs {
				return false
			}
		}
		return true
	})
	if got, err := client.ask(vip4); err != nil || got != "b" {
		t.Errorf("%q, %v", got, err)
	}
	old.lookAfter()
	if n := old.Repairs(); n[repairPin]+n[repairLink]+n[repairVerdict] != 0 {
		t.Errorf("an upgrade and a return are no damage: %v", n)
	}
	if files, _ := os.ReadDir(owners); len(files) != 1 {
		t.Errorf("%d files of agents, want this one's alone", len(files))
	}
}

// An agent that shows nothing of itself, as one of an older build, is never taken for dead.
func TestAnUnknownSuccessorIsLeftInCharge(t *testing.T) {
	w := newWorld(t)
	owners := t.TempDir()
	old := w.open(func(c *Config) { c.Owners = owners })
	next := w.open(func(c *Config) { c.Owners = "" })
	must(t, next.Close())
	if old.Orphaned() {
		t.Error("nobody can know that the new agent has ended")
	}
	if err := old.Retake(); err == nil || !strings.Contains(err.Error(), "not known to be dead") {
		t.Error(err)
	}
}
