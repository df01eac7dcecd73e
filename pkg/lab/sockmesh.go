package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// controlAddr is where the lab's control plane listens, inside the node's namespace.
const controlAddr = "127.0.0.1:18000"

// metricsAddr is the agent's default, inside the node's namespace.
const metricsAddr = "127.0.0.1:15090"

// StartControl starts sockmesh-control on the lab's xDS folder and waits until it accepts connections.
func (l *Lab) StartControl(ctx context.Context) (*Process, error) {
	proc, err := l.Node.Start("sockmesh-control", l.binary("sockmesh-control"), "--dir", filepath.Join(l.Dir, "xds"), "--listen", controlAddr)
	if err != nil {
		return nil, err
	}
	err = l.waitFor(ctx, proc, func() error {
		c, err := l.Node.Dial(ctx, "tcp", controlAddr)
		if err == nil {
			c.Close()
		}
		return err
	})
	return proc, err
}

// StartAgent starts sockmesh-agent in the node's namespace, on the lab's own folders, and waits until it is ready:
// a canary connection went through its hooks. Flags are added to the lab's own; a later one wins.
func (l *Lab) StartAgent(ctx context.Context, flags ...string) (*Process, error) {
	proc, err := l.StartAgentNoWait(flags...)
	if err != nil {
		return nil, err
	}
	return proc, l.WaitReady(ctx, proc)
}

// StartAgentNoWait starts the agent and returns at once.
func (l *Lab) StartAgentNoWait(flags ...string) (*Process, error) {
	return l.Node.Start("sockmesh-agent", l.AgentCommand(flags...)...)
}

// AgentCommand is the command line by which the lab starts its agent, for who wants to start it differently.
func (l *Lab) AgentCommand(flags ...string) []string {
	return append([]string{l.binary("sockmesh-agent"),
		"--node-name", l.cfg.NodeName,
		"--manifests", filepath.Join(l.Dir, "manifests"),
		"--xds", controlAddr,
		"--cgroup-root", l.Cgroup,
		"--bpffs", l.BPFFS(),
		"--netns-dir", filepath.Join(l.Dir, "netns"),
		"--state-dir", filepath.Join(l.Dir, "state"),
		"--admin", l.Admin(),
		"--metrics", metricsAddr,
	}, flags...)
}

// WaitReady waits until the agent answers /readyz with 200.
func (l *Lab) WaitReady(ctx context.Context, agent *Process) error {
	return l.waitFor(ctx, agent, func() error { _, err := l.Metrics(ctx, "/readyz"); return err })
}

// Admin is the agent's --admin and the CLI's.
func (l *Lab) Admin() string { return "unix://" + filepath.Join(l.Dir, "admin.sock") }

// BPFFS is where the agent pins.
func (l *Lab) BPFFS() string { return filepath.Join(l.Dir, "bpf", "sockmesh") }

func (l *Lab) binary(name string) string { return filepath.Join(l.cfg.Binaries, name) }

// Metrics gets a path of the agent's metrics port: /metrics, /healthz or /readyz. Not 200 is an error with the body.
func (l *Lab) Metrics(ctx context.Context, path string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return l.Node.Dial(ctx, network, addr)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddr+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var body strings.Builder
	if _, err := copyBounded(&body, resp.Body); err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return body.String(), fmt.Errorf("%s answered %s: %s", path, resp.Status, strings.TrimSpace(body.String()))
	}
	return body.String(), nil
}

// CLI runs `sockmesh ARGS` against the lab's agent and returns its stdout.
func (l *Lab) CLI(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, l.binary("sockmesh"), append(args, "--admin", l.Admin())...)
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("sockmesh %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(exit.Stderr)))
	}
	return string(out), err
}

// Status is the part of `sockmesh status -o json` that labs look at.
type Status struct {
	Node, Version   string
	Ready           bool
	NotReadyReasons []string `json:"not_ready_reasons"`
	Acceleration    struct {
		Mode, Reason    string
		Active          bool
		Pairs           int
		RedirectedBytes uint64                           `json:"redirected_bytes"`
		PassedBytes     uint64                           `json:"passed_bytes"`
		StepAside       struct{ Bytes, Returned uint64 } `json:"step_aside"`
	}
	Datapath struct {
		Programs []struct {
			Name, Attach, Pinned string
			ID                   uint32
		}
		Maps []struct {
			Name, Type string
			Entries    int
		}
		Errors []string
	}
	Kubernetes struct {
		Source                    string
		Synced                    bool
		Services, Endpoints, Pods int
	}
	XDS struct {
		Servers []struct {
			Name      string
			Connected bool
			LastError string `json:"last_error"`
		}
		Resources map[string]int
		Rejected  []struct{ Type, Name, Error string }
	}
	Pods        struct{ Local, Enrolled int }
	Connections struct {
		Proxied, Offloaded, Service, Passed, Refused uint64
		SteppedAside                                 uint64 `json:"stepped_aside"`
	}
	// Proxy.Generation counts the configurations that were put in force.
	Proxy struct{ Generation uint64 }
}

// Status asks the agent through the CLI, as a user would.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	var s Status
	out, err := l.CLI(ctx, "status", "-o", "json")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("sockmesh status -o json: %w", err)
	}
	return s, nil
}

// WaitStatus asks until the condition holds; the error has the last status that was seen.
func (l *Lab) WaitStatus(ctx context.Context, what string, ok func(Status) bool) error {
	return Wait(ctx, func() error {
		s, err := l.Status(ctx)
		if err == nil && !ok(s) {
			text, _ := json.Marshal(s)
			err = fmt.Errorf("not yet %s: status is %s", what, text)
		}
		return err
	})
}

// waitFor is Wait that gives up when the process has ended.
func (l *Lab) waitFor(ctx context.Context, proc *Process, try func() error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-proc.Done():
			cancel(errors.New(proc.name + " ended: " + fmt.Sprint(proc.err)))
		case <-ctx.Done():
		}
	}()
	if err := Wait(ctx, try); err != nil {
		return fmt.Errorf("%s did not come up: %w\n%s", proc.name, err, proc.Tail())
	}
	return nil
}

// Wait calls try until it succeeds. When ctx ends first, the error tells of both.
func Wait(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", context.Cause(ctx), err)
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// ForeignRules lists every packet filter rule in the lab's namespaces, by iptables and nftables: there should be none.
func (l *Lab) ForeignRules(ctx context.Context) ([]string, error) {
	var found []string
	for _, place := range l.Places() {
		for _, args := range [][]string{{"nft", "list", "ruleset"}, {"iptables-save"}, {"ip6tables-save"}} {
			out, err := place.Run(ctx, args...)
			if err != nil {
				return nil, err
			}
			for line := range strings.Lines(out) {
				if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
					found = append(found, place.Name+": "+args[0]+": "+line)
				}
			}
		}
	}
	return found, nil
}

// Namespaces counts the lab's network namespaces.
func (l *Lab) Namespaces() int { return len(l.Places()) }

// LogDir has the output of every process.
func (l *Lab) LogDir() string { return filepath.Join(l.Dir, "log") }

// SaveLogs copies the processes' output to a directory that outlives the lab.
func (l *Lab) SaveLogs(to string) error { return os.CopyFS(to, os.DirFS(l.LogDir())) }
