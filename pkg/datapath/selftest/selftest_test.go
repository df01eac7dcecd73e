package selftest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
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
