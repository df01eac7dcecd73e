package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// asAgent makes this test binary an agent: the tests below need agents that can be killed, in network namespaces and
// cgroups of their own.
const asAgent = "TEST_AS_SOCKMESH_AGENT"

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) == "" {
		os.Exit(m.Run())
	}
	if err := childAgent(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

func childAgent(args []string) error {
	fs := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	flags := config.NewFlags(fs)
	if err := fs.Parse(args); err != nil {
		return err
	}
	cfg, err := flags.Load(nil)
	if err != nil {
		return err
	}
	if err := cfg.Validate(false); err != nil {
		return err
	}
	level := new(slog.LevelVar)
	a, err := New(cfg, NewLogger(os.Stderr, cfg.LogFormat, level), level)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	go func() { <-signals; stop() }()
	return a.Run(ctx, context.Background())
}

// node is a place for agents: directories, a cgroup, a BPF file system.
type node struct {
	t           *testing.T
	dir, cgroup string
}

func newNode(t *testing.T) *node {
	t.Helper()
	root, err := datapath.FindCgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: t.TempDir()}
	if n.cgroup, err = os.MkdirTemp(root, "sockmesh-agent-test-"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(n.dir, "manifests"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := datapath.Cleanup(datapath.Config{CgroupRoot: n.cgroup, BPFFS: n.bpffs(), Logger: quiet})
		if err != nil {
			t.Error("cleanup:", err)
		}
		_ = unix.Unmount(n.bpffs(), unix.MNT_DETACH)
		for _, dir := range []string{filepath.Join(n.cgroup, "sockmesh-agent"), n.cgroup} {
			var err error
			for range 100 { // a process takes a moment to leave its cgroup
				if err = os.Remove(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		}
	})
	return n
}

func (n *node) bpffs() string { return filepath.Join(n.dir, "bpf") }
func (n *node) admin() string { return "unix://" + filepath.Join(n.dir, "a.sock") }

// process is an agent.
type process struct {
	cmd  *exec.Cmd
	log  *logBuffer
	done chan error
	n    *node
}

// logBuffer is what an agent has said so far.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String is all of it.
func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs an agent in a network namespace of its own, so that nothing can leave the machine.
func (n *node) start(flags ...string) *process {
	n.t.Helper()
	args := append([]string{
		"--node-name=n1", "--manifests=" + filepath.Join(n.dir, "manifests"), "--cgroup-root=" + n.cgroup, "--bpffs=" + n.bpffs(),
		"--netns-dir=" + filepath.Join(n.dir, "netns"), "--state-dir=" + filepath.Join(n.dir, "state"), "--admin=" + n.admin(),
		"--metrics=off", "--drain-time=1s",
		"--outside=off",         // this machine's own devices are none of a test's business
		"--drop-privileges=off", // a test binary may have cgo; tests/node drops them in the real one
	}, flags...)
	p := &process{cmd: exec.Command(os.Args[0], args...), log: &logBuffer{}, done: make(chan error, 1), n: n}
	p.cmd.Env = append(os.Environ(), asAgent+"=1")
	p.cmd.Stderr = p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	n.t.Cleanup(func() { p.end(syscall.SIGKILL) })
	return p
}

// end sends a signal and waits; it returns how the agent ended.
func (p *process) end(s syscall.Signal) error {
	_ = p.cmd.Process.Signal(s)
	select {
	case err := <-p.done:
		p.done <- err
		return err
	case <-time.After(30 * time.Second):
		p.n.t.Fatalf("the agent does not end:\n%s", p.log)
		return nil
	}
}

// status asks until the agent that answers is as ok says.
func (p *process) status(ok func(*api.Status) bool) *api.Status {
	p.n.t.Helper()
	var s api.Status
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		client, err := api.NewClient(p.n.admin())
		if err != nil {
			p.n.t.Fatal(err)
		}
		raw, err := client.Get(context.Background(), "/status")
		client.Close() // the next question may be for another agent
		if err != nil {
			continue
		}
		s = api.Status{}
		if err := json.Unmarshal(raw, &s); err != nil {
			p.n.t.Fatal(err)
		}
		if ok(&s) {
			return &s
		}
	}
	p.n.t.Fatalf("the status does not become what is expected: %+v\n%s", s, p.log)
	return nil
}

func ready(s *api.Status) bool { return s.Ready }

func TestAgentGetsReadyByARealConnectionAndLeavesItsPins(t *testing.T) {
	n := newNode(t)
	first := n.start()
	s := first.status(ready)
	if !s.Canary.OK || s.Connections.Proxied == 0 || s.Proxy.Accepted == 0 {
		t.Errorf("ready without a connection through hooks and proxy: %+v", s)
	}
	if s.Node != "n1" || !s.Kubernetes.Synced || len(s.Datapath.Programs) == 0 || len(s.Datapath.Maps) == 0 {
		t.Errorf("%+v", s)
	}
	if _, err := os.Stat(filepath.Join(n.cgroup, "sockmesh-agent")); err != nil {
		t.Error("the agent was outside --cgroup-root and has not moved below it:", err)
	}
	ids := map[string]uint32{}
	for _, m := range s.Datapath.Maps {
		ids[m.Name] = m.ID
	}
	if err := first.end(syscall.SIGTERM); err != nil {
		t.Errorf("SIGTERM: %v\n%s", err, first.log)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "a.sock")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the admin socket is left over: %v", err)
	}
	second := n.start()
	for _, m := range second.status(ready).Datapath.Maps {
		if ids[m.Name] != m.ID {
			t.Errorf("map %s was %d and is %d now: an agent must adopt what is pinned", m.Name, ids[m.Name], m.ID)
		}
	}
}

func TestAgentKilledAndStartedAgain(t *testing.T) {
	n := newNode(t)
	for range 3 {
		p := n.start()
		p.status(ready)
		_ = p.end(syscall.SIGKILL)
	}
	p := n.start()
	s := p.status(ready)
	for _, m := range s.Datapath.Maps {
		// Each agent's canary is a pod of the kernel's table; those of dead agents must not stay.
		if m.Name == "sm_netns" {
			p.status(func(s *api.Status) bool { return entries(s, "sm_netns") == 1 })
		}
	}
}

func entries(s *api.Status, name string) uint64 {
	for _, m := range s.Datapath.Maps {
		if m.Name == name {
			return m.Entries
		}
	}
	return 0
}

func TestASecondAgentTakesOverAndTheFirstLeavesItAlone(t *testing.T) {
	n := newNode(t)
	first := n.start()
	first.status(ready)
	time.Sleep(1100 * time.Millisecond) // uptime tells the two apart
	began := time.Now()
	second := n.start()
	second.status(func(s *api.Status) bool { return s.Ready && s.UptimeSeconds <= int64(time.Since(began)/time.Second) })
	for end := time.Now().Add(10 * time.Second); !strings.Contains(first.log.String(), "has taken over") && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	if !strings.Contains(first.log.String(), "has taken over") {
		t.Error("the first agent has not noticed the second")
	}
	if err := first.end(syscall.SIGTERM); err != nil {
		t.Errorf("%v\n%s", err, first.log)
	}
	// Whatever the first agent did at its end, the second one's pods are still in the kernel's table.
	if s := second.status(ready); entries(s, "sm_netns") != 1 || entries(s, "sm_claims") != 2 {
		t.Errorf("%+v", s.Datapath.Maps)
	}
}

func TestAnAgentWithWrongSettingsLeavesTheRunningOneAlone(t *testing.T) {
	n := newNode(t)
	first := n.start()
	first.status(ready)
	for _, wrong := range []string{
		"--bootstrap=/nonexistent.yaml", "--manifests=/nonexistent", "--metrics=127.0.0.1:99999", "--admin=unix:///proc/none/a.sock",
	} {
		second := n.start(wrong)
		select {
		case err := <-second.done:
			second.done <- err
			if err == nil {
				t.Errorf("%s: no error", wrong)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: the agent runs:\n%s", wrong, second.log)
		}
	}
	service := "apiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: shop}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n"
	if err := os.WriteFile(filepath.Join(n.dir, "manifests", "late.yaml"), []byte(service), 0o600); err != nil {
		t.Fatal(err)
	}
	first.status(func(s *api.Status) bool { return s.Ready && entries(s, "sm_frontends") > 0 })
	if strings.Contains(first.log.String(), "has taken over") {
		t.Errorf("the first agent believes that it was replaced:\n%s", first.log)
	}
}

func TestAgentWithoutKubernetesServesListenersOfTheNode(t *testing.T) {
	n := newNode(t)
	bootstrap := filepath.Join(n.dir, "bootstrap.yaml")
	text := `
static_resources:
  listeners:
  - name: edge
    address: {socket_address: {address: 127.0.0.1, port_value: 18080}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: edge
          http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 200}}]}]}
`
	if err := os.WriteFile(bootstrap, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := n.start("--manifests=", "--services=off", "--bootstrap="+bootstrap)
	s := p.status(func(s *api.Status) bool { return s.Ready && len(s.Proxy.Listeners) == 1 })
	if s.XDS.Resources.Listener != 1 || s.Kubernetes.Source != "none" {
		t.Errorf("%+v", s)
	}
}

func TestWhatPreventsAStartIsSaidInOneMessage(t *testing.T) {
	n := newNode(t)
	notBPF := filepath.Join(n.dir, "full")
	if err := os.MkdirAll(filepath.Join(notBPF, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(n.dir, "broken.yaml")
	if err := os.WriteFile(broken, []byte("static_resources: {listners: []}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ flag, want string }{
		"no cgroup v2":         {"--cgroup-root=" + n.dir, "cgroup"},
		"no BPF file system":   {"--bpffs=" + notBPF, "mount -t bpf"},
		"no such bootstrap":    {"--bootstrap=/nonexistent.yaml", "/nonexistent.yaml"},
		"a broken bootstrap":   {"--bootstrap=" + broken, "listners"},
		"no such manifests":    {"--manifests=/nonexistent", "/nonexistent"},
		"state dir is a file":  {"--state-dir=" + broken, "--state-dir"},
		"admin below a file":   {"--admin=unix://" + broken + "/a.sock", "--admin"},
		"no such kubeconfig":   {"--kubeconfig=/nonexistent", "both set"},
		"a bad xDS address":    {"--xds=nowhere", "--xds"},
		"netns dir is no dir":  {"--netns-dir=" + broken, "--netns-dir"},
		"an admin socket path": {"--admin=tcp://1.2.3.4:5", "never served over TCP"},
	} {
		p := n.start(tt.flag)
		select {
		case err := <-p.done:
			p.done <- err
			lines := strings.Split(strings.TrimSpace(p.log.String()), "\n")
			last := lines[len(lines)-1]
			if err == nil || !strings.HasPrefix(last, "agent: ") || !strings.Contains(last, tt.want) {
				t.Errorf("%s: ended with %v and said %q, expected %q", name, err, last, tt.want)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the agent runs:\n%s", name, p.log)
		}
	}
}
