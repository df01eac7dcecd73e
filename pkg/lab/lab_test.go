package lab

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	traffic.MainIfAsked(ctx, "traffic")
	if len(os.Args) > 1 && os.Args[1] == "abandon" {
		abandon()
	}
	os.Exit(m.Run())
}

func newLab(t *testing.T, cfg Config) *Lab {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Helper = []string{exe, "traffic"}
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func addPod(t *testing.T, l *Lab, name string, addrs ...string) *Pod {
	t.Helper()
	spec := PodSpec{Name: name}
	for _, a := range addrs {
		spec.Addrs = append(spec.Addrs, netip.MustParseAddr(a))
	}
	p, err := l.AddPod(spec)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Two labs with the same addresses stand side by side; in each, pods reach each other over both families and every
// request of the generator is accounted for.
func TestPodsReachEachOther(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, name := range []string{"one", "two"} {
		l := newLab(t, Config{})
		server := addPod(t, l, "server", "10.77.0.2", "fd77::2")
		client := addPod(t, l, "client", "10.77.0.3", "fd77::3")
		if _, err := server.StartNginx(ctx, 8080, `location / { return 200 "`+name+` $remote_addr\n"; }`); err != nil {
			t.Fatal(err)
		}
		for url, want := range map[string]string{
			"http://10.77.0.2:8080": name + " 10.77.0.3\n", "http://[fd77::2]:8080": name + " fd77::3\n",
		} {
			if got, err := client.Run(ctx, "curl", "-sSg", url); err != nil || got != want {
				t.Errorf("curl %s: %q, %v; want %q", url, got, err, want)
			}
		}
		load, err := client.StartTraffic(traffic.Config{Addr: "10.77.0.2:8080", Host: "x", Connections: 4, Pause: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		if err := load.WaitRequests(ctx, 200); err != nil {
			t.Fatal(err)
		}
		r, err := load.Stop()
		if err != nil || r.Failed != 0 || r.Answers[name] != r.OK || r.OK < 200 || r.Connected != 4 {
			t.Errorf("traffic: %+v, %v", r, err)
		}
		if rules, err := l.ForeignRules(ctx); err != nil || len(rules) > 0 {
			t.Errorf("packet filter rules: %q, %v", rules, err)
		}
	}
}

// An address that nobody has is refused inside the lab, at once: it must not leave the machine.
func TestNothingLeavesTheNode(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client := addPod(t, newLab(t, Config{}), "client", "10.77.0.3", "fd77::3")
	for _, url := range []string{"http://10.96.0.1", "http://[fd96::1]"} {
		if _, err := client.Run(ctx, "curl", "-sSg", "-m", "5", url); err == nil || strings.Contains(err.Error(), "timed out") {
			t.Errorf("curl %s: %v; want an error at once", url, err)
		}
	}
}

// What a killed run leaves (mounts, a cgroup with living processes, a directory) the next one removes.
func TestAKilledLabIsSweptAway(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "abandon")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, _ := out.Read(buf)
	dir, cgroup, ok := strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
	if !ok {
		t.Fatalf("the abandoned lab said %q", buf[:n])
	}
	if err := Sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "node")); err != nil {
		t.Errorf("Sweep touched a lab whose owner lives: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if err := Sweep(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, cgroup} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	if mounts, err := mountsBelow(dir); err != nil || len(mounts) > 0 {
		t.Errorf("mounts are left: %v, %v", mounts, err)
	}
}

// abandon is a run that is going to be killed: a pod with a process that outlives its parent.
func abandon() {
	l, err := New(Config{})
	if err != nil {
		panic(err)
	}
	p, err := l.AddPod(PodSpec{Name: "p", Addrs: []netip.Addr{netip.MustParseAddr("10.77.0.2")}})
	if err != nil {
		panic(err)
	}
	if _, err := p.Start("orphan", "setsid", "--fork", "sleep", "600"); err != nil {
		panic(err)
	}
	os.Stdout.WriteString(l.Dir + " " + l.Cgroup + "\n")
	select {}
}

// A pod that is deleted takes its processes and its namespace with it; others stay.
func TestDeletedPodIsGone(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l := newLab(t, Config{})
	p := addPod(t, l, "gone", "10.77.0.2")
	q := addPod(t, l, "stays", "10.77.0.3")
	nginx, err := p.StartNginx(ctx, 80, `return 200 x;`)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Delete(); err != nil {
		t.Fatal(err)
	}
	<-nginx.Done()
	for _, path := range []string{p.NetnsPath, p.Cgroup, filepath.Join(l.Dir, "manifests", "pod-default_gone.yaml")} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	if _, err := q.Run(ctx, "true"); err != nil {
		t.Error(err)
	}
}
