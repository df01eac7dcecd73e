package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// open starts a datapath on a cgroup of its own, which the test process joins.
func open(t *testing.T, change ...func(*datapath.Config)) *datapath.Datapath {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test loads BPF programs and makes network namespaces: run it as root")
	}
	root, err := datapath.FindCgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	join := func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0); err != nil {
			t.Fatal(err)
		}
	}
	cgroup := filepath.Join(root, fmt.Sprintf("sm-selftest-%d", os.Getpid()))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	join(cgroup)
	cfg := datapath.Config{CgroupRoot: cgroup, BPFFS: filepath.Join(t.TempDir(), "bpf"), Acceleration: true, Services: true, SyncTimeout: time.Hour}
	for _, c := range change {
		c(&cfg)
	}
	d, err := datapath.Open(cfg)
	t.Cleanup(func() {
		join(root)
		if d != nil {
			d.Close()
		}
		if err := datapath.Cleanup(cfg); err != nil {
			t.Error(err)
		}
		if err := os.Remove(cgroup); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestThisKernelPasses(t *testing.T) {
	d := open(t)
	start := time.Now()
	if err := Guard(context.Background(), d, slog.Default()); err != nil {
		t.Fatal(err)
	}
	t.Log("took", time.Since(start))
	s := d.Status().Acceleration
	if !s.Active {
		t.Errorf("acceleration is off: %s", s.Reason)
	}
	seen := 0
	for _, p := range s.Probes {
		if strings.HasPrefix(p.Name, "selftest_") {
			seen++
			t.Log(p)
		}
	}
	if seen != len(checks) {
		t.Errorf("%d of %d checks are in the status", seen, len(checks))
	}
	for _, m := range d.Maps() {
		if (m.Name == "sm_local" || m.Name == "sm_nosplice") && m.Entries != 0 {
			t.Errorf("the self-test left %d entries in %s", m.Entries, m.Name)
		}
	}
}

// What fails switches acceleration off, and says so.
func TestVitalFailureSwitchesAccelerationOff(t *testing.T) {
	d := open(t)
	saved := checks
	defer func() { checks = saved }()
	lie := check{"selftest_lies", true, "", func(*Stage) error { return errors.New("it does not") }}
	checks = append([]check{lie}, saved[:2]...)
	if err := Guard(context.Background(), d, slog.Default()); err != nil {
		t.Fatal(err)
	}
	s := d.Status().Acceleration
	if s.Active || !strings.Contains(s.Reason, "selftest_lies: it does not") {
		t.Errorf("active %v, reason %q", s.Active, s.Reason)
	}
}

func TestNothingIsTriedWithoutAcceleration(t *testing.T) {
	d := open(t, func(c *datapath.Config) { c.Acceleration = false })
	if err := Guard(context.Background(), d, slog.Default()); err != nil {
		t.Fatal(err)
	}
	for _, p := range d.Probes() {
		if strings.HasPrefix(p.Name, "selftest") {
			t.Error(p)
		}
	}
}

// Where handing over doesn't work, only that is switched off. Here there is room for one pair of redirected sockets, and it
// takes two.
func TestOnlySteppingAsideIsSwitchedOffWhereOnlyThatFails(t *testing.T) {
	d := open(t, func(c *datapath.Config) { c.Sizes.Pairs = 2 })
	if !d.StepsAside() {
		t.Fatal("it is off from the start")
	}
	if err := Guard(context.Background(), d, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	s := d.Status().Acceleration
	if !s.Active || s.Reason != "" {
		t.Errorf("acceleration: active %v, %q", s.Active, s.Reason)
	}
	if s.StepAside.Active || !strings.Contains(s.StepAside.Reason, "self-test") {
		t.Errorf("stepping aside: %+v", s.StepAside)
	}
}

// One check after another fails on purpose. What it is about is switched off, with its reason in the status and in one line of
// the log; everything else stays as it is where nothing fails.
func TestEachFailureSwitchesOffItsFeatureAndNothingElse(t *testing.T) {
	saved := checks
	defer func() { checks = saved }()
	// state is what is switched on, and what the checks say.
	state := func(t *testing.T) (s datapath.Status, failed, lines []string) {
		d := open(t)
		var out bytes.Buffer
		if err := Guard(context.Background(), d, slog.New(slog.NewTextHandler(&out, nil))); err != nil {
			t.Fatal(err)
		}
		for _, p := range d.Probes() {
			if !p.OK {
				failed = append(failed, p.Name)
			}
		}
		for line := range strings.Lines(out.String()) {
			if strings.Contains(line, "failed on purpose") {
				lines = append(lines, line)
			}
		}
		return d.Status(), failed, lines
	}
	var healthy datapath.Status
	var known []string
	t.Run("none", func(t *testing.T) { healthy, known, _ = state(t) })
	if !healthy.Acceleration.Active || !healthy.Acceleration.StepAside.Active {
		t.Fatalf("without a failure: %+v", healthy.Acceleration)
	}
	for i, c := range saved {
		t.Run(c.name, func(t *testing.T) {
			checks = slices.Clone(saved)
			checks[i].run = func(*Stage) error { return errors.New("failed on purpose") }
			got, failed, lines := state(t)
			want := known
			if !slices.Contains(known, c.name) {
				want = append(slices.Clone(known), c.name)
			}
			slices.Sort(failed)
			slices.Sort(want)
			if !slices.Equal(failed, want) {
				t.Errorf("these failed: %v, want %v", failed, want)
			}
			if len(lines) != 1 || !strings.Contains(lines[0], c.name) && c.name != stepAsideCheck {
				t.Errorf("the log says it in %d lines: %q", len(lines), lines)
			}
			a := got.Acceleration
			if a.Active == c.vital || c.vital != strings.Contains(a.Reason, c.name+": failed on purpose") {
				t.Errorf("acceleration: active %v, %q", a.Active, a.Reason)
			}
			if !c.vital {
				off := c.name == stepAsideCheck
				if a.StepAside.Active == off || off != strings.Contains(a.StepAside.Reason, "failed on purpose") {
					t.Errorf("stepping aside: %+v", a.StepAside)
				}
			}
			names := func(s datapath.Status) (all []string) {
				for _, p := range s.Datapath.Programs {
					all = append(all, p.Name+" "+p.Attach)
				}
				slices.Sort(all)
				return all
			}
			if have, want := names(got), names(healthy); !slices.Equal(have, want) {
				t.Errorf("programs: %v, without the failure %v", have, want)
			}
		})
	}
}
