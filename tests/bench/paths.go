package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// behindIptables is how a mesh without eBPF does it: a REDIRECT rule in the pod.
func (w *world) behindIptables(start starter) setUp {
	return func(ctx context.Context, s scenario) (setup, error) {
		proc, err := start(ctx, s)
		if err != nil {
			return setup{}, err
		}
		undo := func() error {
			// The whole rule set goes, so that the next case does not pay for an empty NAT table.
			_, err := w.client.Run(context.WithoutCancel(ctx), "nft", "flush", "ruleset")
			return errors.Join(stop(proc), err)
		}
		_, err = w.client.Run(ctx, "iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", target.Addr().String(),
			"--dport", fmt.Sprint(target.Port()), "-j", "REDIRECT", "--to-ports", fmt.Sprint(outbound.Port()))
		set := setup{target: target, proxy: proc, undo: undo}
		if proc.Name() == "envoy" && s.dynamic {
			set.version = w.envoyVersion
		}
		if proc.Name() == "sockmesh-agent" {
			set.mallocs = func(ctx context.Context) (float64, error) {
				text, err := w.client.Run(ctx, "curl", "-sSf", "http://"+bareMetrics+"/metrics")
				if err != nil {
					return 0, err
				}
				return goMallocs(text)
			}
		}
		return set, err
	}
}

// behindHooks puts a foreign proxy behind our own programs: the bench itself drives the datapath, as the agent would,
// and the proxy merely listens where the hooks look for a listener.
func (w *world) behindHooks(start starter, accelerate bool) setUp {
	return func(ctx context.Context, s scenario) (setup, error) {
		proc, err := start(ctx, s)
		if err != nil {
			return setup{}, err
		}
		set, err := w.attachHooks(ctx, accelerate, mesh.Claim{Addr: target, Listener: "bench"})
		detach := set.undo
		set.proxy, set.undo = proc, func() error { return errors.Join(stop(proc), detach()) }
		return set, err
	}
}

// throughKernel is our programs and no proxy: the endpoint is chosen at connect(), as for a plain Service or a TCP
// canary.
func (w *world) throughKernel(accelerate bool) setUp {
	return func(ctx context.Context, s scenario) (setup, error) {
		claim := mesh.Claim{Addr: target, Listener: "bench", Offload: &mesh.Offload{Clusters: []mesh.OffloadCluster{{
			Name: "server", Weight: 1, Endpoints: []mesh.OffloadEndpoint{{Addr: w.backend(s), Weight: 1}},
		}}}}
		return w.attachHooks(ctx, accelerate, claim)
	}
}

func (w *world) attachHooks(ctx context.Context, accelerate bool, claim mesh.Claim) (setup, error) {
	cfg := datapath.Config{
		CgroupRoot: w.lab.Cgroup, BPFFS: w.lab.BPFFS(), Services: true, Logger: slog.New(slog.DiscardHandler),
		// No agent made the proxy's sockets. So whoever listens is the proxy, and its upstream connections count as what they
		// look like: a pod calling a pod.
		ForeignProxy: true, Acceleration: accelerate, AcceleratePods: accelerate,
	}
	set := setup{target: target, undo: func() error { return nil }}
	dp, err := datapath.Open(cfg)
	if err != nil {
		return set, err
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	set.undo = func() error {
		cancel()
		return errors.Join(dp.Close(), datapath.Cleanup(cfg))
	}
	set.kernel = func(context.Context) (kernelCounts, error) {
		c, err := dp.Counters()
		return kernelCounts{taken: c.Proxied + c.Offloaded, redirected: c.RedirectedBytes, passed: c.PassedBytes}, err
	}
	rec := dp.Reconciler()
	go func() { _ = rec.Run(running) }()
	var pods []datapath.Pod
	for _, p := range []*lab.Pod{w.client, w.server} {
		cookie, err := p.Cookie()
		if err != nil {
			return set, err
		}
		pods = append(pods, datapath.Pod{Cookie: cookie, IPs: p.Addrs, Enrolled: true, Namespace: p.Namespace, Name: p.PodSpec.Name})
	}
	rec.SetPods(pods)
	rec.SetClaims([]mesh.Claim{claim})
	for _, source := range []string{datapath.SourceServices, datapath.SourceClaims, datapath.SourcePods} {
		rec.Synced(source)
	}
	return set, rec.Flush(ctx)
}

// sockmesh is the whole thing as it runs on a node.
func (w *world) sockmesh(acceleration string, flags ...string) setUp {
	return func(ctx context.Context, s scenario) (setup, error) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		listener := lab.HTTPListener("bench", "bench", target).WithoutRequestIDs()
		if s.tcp {
			// The access log keeps it in the proxy, which is what is measured; else the kernel would do it alone.
			listener = lab.TCPListener("bench", []lab.Weight{{Cluster: "server", Weight: 1}}, "/dev/null", target)
		}
		if err := w.lab.WriteXDS("bench", append(s.resources(w.backend(s)), listener)...); err != nil {
			return setup{}, err
		}
		if err := w.resetChurn(s); err != nil {
			return setup{}, err
		}
		control, err := w.lab.StartControl(ctx)
		if err != nil {
			return setup{}, err
		}
		agent, err := w.lab.StartAgent(ctx, append([]string{"--acceleration", acceleration, "--concurrency", s.workers(), "--drain-time", "1s"}, flags...)...)
		if err != nil {
			return setup{}, errors.Join(err, stop(control))
		}
		if err := pin(proxyRole, agent); err != nil {
			return setup{}, errors.Join(err, stop(agent), stop(control))
		}
		undo := func() error {
			err := errors.Join(stop(agent), stop(control))
			// The agent leaves its programs attached, which is what it is for; the next case must not meet them.
			cleanup, cleanErr := exec.Command(filepath.Join(w.o.build, "bin/sockmesh-agent"), "cleanup", "--cgroup-root", w.lab.Cgroup, "--bpffs", w.lab.BPFFS()).CombinedOutput()
			if cleanErr != nil {
				err = errors.Join(err, fmt.Errorf("sockmesh-agent cleanup: %w: %s", cleanErr, cleanup))
			}
			return err
		}
		clusters := len(s.clusterNames())
		err = w.lab.WaitStatus(ctx, "the listener and two enrolled pods", func(s lab.Status) bool {
			return s.XDS.Resources["listener"] == 1 && s.XDS.Resources["cluster"] == clusters && s.Pods.Enrolled == 2
		})
		kernel := func(ctx context.Context) (kernelCounts, error) {
			s, err := w.lab.Status(ctx)
			a := s.Acceleration
			return kernelCounts{s.Connections.Proxied, a.RedirectedBytes, a.PassedBytes, s.Connections.SteppedAside, a.StepAside.Bytes}, err
		}
		mallocs := func(ctx context.Context) (float64, error) {
			text, err := w.lab.Metrics(ctx, "/metrics")
			if err != nil {
				return 0, err
			}
			return goMallocs(text)
		}
		version := func(ctx context.Context) (float64, error) {
			s, err := w.lab.Status(ctx)
			return float64(s.Proxy.Generation), err
		}
		return setup{target, agent, kernel, mallocs, version, undo}, err
	}
}

// stop ends a process in good order; that it ended by our signal is not an error.
func stop(p *lab.Process) error {
	_ = p.Stop(5 * time.Second)
	return nil
}
