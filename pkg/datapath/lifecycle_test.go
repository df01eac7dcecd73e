package datapath

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

func TestTwoInstancesSideBySide(t *testing.T) {
	w := newWorld(t)
	client, a, b := w.pod(), w.pod(), w.pod()
	a.server("a", 8080)
	b.server("b", 8080)
	instance := func(name string, backend *ns) (cgroup string, d *Datapath) {
		cfg := w.cfg
		cfg.CgroupRoot = filepath.Join(w.cgroup, name)
		cfg.BPFFS = filepath.Join(t.TempDir(), "bpf")
		must(t, os.Mkdir(cfg.CgroupRoot, 0o755))
		t.Cleanup(func() {
			joinCgroup(t, w.cgroup)
			must(t, os.Remove(cfg.CgroupRoot))
		})
		d, err := Open(cfg)
		must(t, err)
		t.Cleanup(func() {
			d.Close()
			if err := Cleanup(cfg); err != nil {
				t.Error(err)
			}
		})
		d.Reconciler().SetService(svc("web", vip4, ap(backend.v4, 8080)))
		synced(t, d)
		return cfg.CgroupRoot, d
	}
	cgroupA, _ := instance("a", a)
	cgroupB, dB := instance("b", b)
	expect := func(cgroup, want string) {
		t.Helper()
		joinCgroup(t, cgroup)
		if got, err := client.ask(vip4); err != nil || got != want {
			t.Errorf("in %s: %q, %v; want %q", cgroup, got, err, want)
		}
	}
	expect(cgroupA, "a")
	expect(cgroupB, "b")
	dB.Close()
	must(t, Cleanup(Config{CgroupRoot: cgroupB, BPFFS: dB.cfg.BPFFS, Logger: w.cfg.Logger}))
	expect(cgroupA, "a")
	joinCgroup(t, cgroupB)
	if got, err := client.ask(vip4, briefly); err == nil {
		t.Errorf("after its cleanup the second still answers: %q", got)
	}
}

// loaded lists the names of our programs and maps that exist in the kernel, whoever's they are.
func loaded(t *testing.T) (ids []ebpf.ProgramID) {
	t.Helper()
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return ids
		}
		must(t, err)
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone meanwhile
		}
		if info, err := p.Info(); err == nil && strings.HasPrefix(info.Name, "sm_") {
			ids = append(ids, id)
		}
		p.Close()
	}
}

func TestCleanupLeavesNothing(t *testing.T) {
	w := newWorld(t)
	d := w.open(func(c *Config) { c.OriginalDstSockopt = true })
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	synced(t, d)
	if got, err := client.ask(vip4); err != nil || got != "b" {
		t.Fatal(got, err)
	}
	var own []ebpf.ProgramID
	for _, p := range d.Status().Datapath.Programs {
		own = append(own, ebpf.ProgramID(p.ID))
	}
	if len(own) != 16 {
		t.Errorf("%d programs, want all 16", len(own))
	}
	// A running agent holds links and maps open; cleanup must work all the same.
	must(t, Cleanup(w.cfg))
	if got, err := client.ask(vip4, briefly); err == nil {
		t.Errorf("still translated: %q", got)
	}
	if _, err := os.Stat(w.cfg.BPFFS); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", w.cfg.BPFFS, err)
	}
	must(t, d.Close())
	eventually(t, "the kernel frees the programs", func() bool {
		return !slices.ContainsFunc(loaded(t), func(id ebpf.ProgramID) bool { return slices.Contains(own, id) })
	})
	must(t, Cleanup(w.cfg)) // once more: nothing to do
	must(t, Cleanup(Config{BPFFS: "/sys/fs/bpf/never-started"}))
}

func TestSwitchedOffHookIsDetachedAtTheNextStart(t *testing.T) {
	w := newWorld(t)
	d := w.open(func(c *Config) { c.OriginalDstSockopt = true })
	must(t, d.Close())
	pin := d.dir.linkPin("sm_getsockopt")
	if _, err := os.Stat(pin); err != nil {
		t.Fatal(err)
	}
	w.open(func(c *Config) { c.OriginalDstSockopt = false })
	if _, err := os.Stat(pin); !errors.Is(err, os.ErrNotExist) {
		t.Error("the getsockopt hook is still attached")
	}
}

func TestPinnedLinksOfAnotherCgroupAreReplaced(t *testing.T) {
	w := newWorld(t)
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	other := filepath.Join(w.cgroup, "other")
	must(t, os.Mkdir(other, 0o755))
	root := w.cfg.CgroupRoot
	d := w.open(func(c *Config) { c.CgroupRoot = other })
	must(t, d.Close())
	must(t, os.Remove(other)) // its links are dead now: ENOLINK
	d = w.open(func(c *Config) { c.CgroupRoot = root })
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	synced(t, d)
	if got, err := client.ask(vip4); err != nil || got != "b" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestExclusiveProgramInTheWayIsNamed(t *testing.T) {
	w := newWorld(t)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	must(t, err)
	defer prog.Close()
	dir, err := os.Open(w.cgroup)
	must(t, err)
	defer dir.Close()
	opts := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInet4Connect}
	must(t, link.RawAttachProgram(opts))
	defer link.RawDetachProgram(link.RawDetachProgramOptions(opts))
	_, err = Open(w.cfg)
	if err == nil || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "exclusively") || !strings.Contains(err.Error(), w.cgroup) {
		t.Errorf("the error should name the cause, the cgroup and the cure: %v", err)
	}
}

func TestWrongDirectoriesAreRefusedBeforeAnythingIsDone(t *testing.T) {
	w := newWorld(t)
	full := t.TempDir()
	must(t, os.WriteFile(filepath.Join(full, "file"), nil, 0o600))
	for _, c := range []struct {
		name, want string
		change     func(*Config)
	}{
		{"cgroup root that isn't one", "not a cgroup v2", func(c *Config) { c.CgroupRoot = full }},
		{"cgroup root that doesn't exist", "--cgroup-root", func(c *Config) { c.CgroupRoot = filepath.Join(full, "none") }},
		{"relative bpffs", "absolute", func(c *Config) { c.BPFFS = "bpf" }},
		{"bpffs on a directory in use", "not empty", func(c *Config) { c.BPFFS = full }},
	} {
		cfg := w.cfg
		c.change(&cfg)
		if d, err := Open(cfg); err == nil {
			d.Close()
			t.Errorf("%s: accepted", c.name)
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestFindCgroup2InMountTables(t *testing.T) {
	for _, c := range []struct{ mounts, want string }{
		{"tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "/sys/fs/cgroup/unified"},
		{"cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "/sys/fs/cgroup"},
		{"none /mnt/with\\040space cgroup2 rw 0 0\n", "/mnt/with space"},
		{"proc /proc proc rw 0 0\n", ""},
	} {
		got, err := findCgroup2(strings.NewReader(c.mounts))
		if got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("%q: %q, %v", c.mounts, got, err)
		}
	}
}

func TestDumpReadsLikeATable(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	pod := w.pod()
	enrol(d, pod)
	d.Reconciler().SetService(svc("web", vip4, ap(pod.v4, 8080)))
	d.Reconciler().SetClaims([]mesh.Claim{claim(netip.MustParseAddrPort("0.0.0.0:9090"))})
	synced(t, d)
	e, err := d.Dump("sm_frontends")
	must(t, err)
	if len(e) != 1 || e[0].Key["addr"] != "10.96.0.10" || e[0].Key["port"] != uint16(80) || e[0].Value["slots"] != uint32(1) {
		t.Errorf("sm_frontends: %v", e)
	}
	e, err = d.Dump("sm_claims")
	must(t, err)
	if len(e) != 1 || e[0].Key["addr"] != "0.0.0.0" || e[0].Value["mode"] != uint16(modeProxy) {
		t.Errorf("sm_claims: %v", e)
	}
	for _, m := range d.Maps() {
		if m.Type == "SkStorage" { // has no keys
			continue
		}
		if _, err := d.Dump(m.Name); err != nil {
			t.Errorf("%s: %v", m.Name, err)
		}
	}
	if _, err := d.Dump("nonsense"); err == nil || !strings.Contains(err.Error(), "sm_frontends") {
		t.Errorf("an unknown map: %v", err)
	}
	for _, p := range d.Probes() {
		// Hardened kernels refuse iterators over maps; then the other iterator must be there, whose probe is in the list too.
		if !p.OK && p.Name != "load_"+progSockets {
			t.Errorf("probe %s: %s", p.Name, p.Detail)
		}
	}
}

func TestAccelerationSwitchedOffAtRunTime(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	must(t, m.d.SetAcceleration(false, "the self-test failed"))
	ask := func() map[string]int {
		c, err := m.client.dial(ap(m.server.v4, 8080))
		must(t, err)
		defer c.Close()
		if got, err := greeting(c); err != nil || got != "b" {
			t.Fatal(got, err)
		}
		echo(t, c, 1000)
		return roles(t, m.d)
	}
	if got := ask(); got["client plain "] != 1 {
		t.Errorf("sockets: %v", got)
	}
	if s := m.d.Status().Acceleration; s.Active || s.Reason != "the self-test failed" || s.Mode != "auto" {
		t.Errorf("status says %+v", s)
	}
	must(t, m.d.SetAcceleration(true, ""))
	if got := ask(); got["client enrolled redirect"] != 1 {
		t.Errorf("sockets: %v", got)
	}
}

func TestReplacedAgentLeavesTheMapsToItsSuccessor(t *testing.T) {
	w := newWorld(t)
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	old := w.open()
	old.Reconciler().SetService(svc("old", vip6, ap(b.v6, 8080)))
	synced(t, old)
	next := w.open() // the old one still runs, and drains
	next.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	synced(t, next)
	want := resolve(t, next)
	old.Reconciler().SetService(svc("web", vip4))
	if err := old.Reconciler().Flush(t.Context()); !errors.Is(err, ErrSuperseded) {
		t.Errorf("the old agent's change: %v", err)
	}
	if n := old.Reconciler().Repair(); n != 0 {
		t.Errorf("the old agent repaired %d entries of the new one's", n)
	}
	if err := old.SetAcceleration(false, "no"); !errors.Is(err, ErrSuperseded) {
		t.Errorf("the old agent switches acceleration: %v", err)
	}
	if got := resolve(t, next); !reflect.DeepEqual(got, want) {
		t.Errorf("the maps are %v, want %v", got, want)
	}
	if got, err := client.ask(vip4); err != nil || got != "b" {
		t.Errorf("%q, %v", got, err)
	}
	if !old.Status().Reconciler.Superseded || next.Status().Reconciler.Superseded {
		t.Error("status doesn't say who is in charge")
	}
}
