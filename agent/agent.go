// Package agent is the per-node agent: it wires Kubernetes (pkg/kube), pods (pkg/pod), the control plane (pkg/xds), the
// kernel (pkg/datapath) and the proxy (pkg/proxy) together, and shows what they do (admin API, metrics, probes).
//
// Reading order: agent.go (what there is and in which order it starts and ends), objects.go (Kubernetes objects and
// pods on their way to kernel and proxy), publish.go (configuration on its way), status.go (what can be asked).
//
// It must hold no knowledge of its own about HTTP, BPF maps or Kubernetes' objects: every decision is in one of the
// packages, what is here is order.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/agent/admin"
	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/canary"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/agent/host"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/pod"
	"github.com/sockmesh/sockmesh/pkg/proxy"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
	"github.com/sockmesh/sockmesh/pkg/xds"
)

// Agent is one running agent.
type Agent struct {
	cfg     config.Config
	log     *slog.Logger
	level   *slog.LevelVar
	started time.Time

	datapath  *datapath.Datapath
	engine    *proxy.Engine
	logs      *telemetry.Logs
	metrics   *telemetry.Metrics
	source    kube.Source // nil: none
	xds       *xds.Client // nil: none
	pods      *pod.Manager
	objects   *objects
	publisher *publisher

	canary     *canary.Canary
	canaryLoop *canaryLoop

	admin *admin.Server
	web   *webServer

	// serving: pods are being looked for, because the proxy knows what to do with their connections.
	serving  atomic.Bool
	draining atomic.Bool
	// succeeded: another agent has been started beside this one and has taken over.
	succeeded   atomic.Bool
	stopWriting context.CancelFunc // ends the datapath's reconciler
	failed      chan error         // the first part that ended with an error
	parts       sync.WaitGroup
}

// New prepares the machine and every part; nothing that pods could notice happens before Run, except that programs
// of an earlier agent are replaced by this build's.
func New(cfg config.Config, log *slog.Logger, level *slog.LevelVar) (_ *Agent, err error) {
	a := &Agent{cfg: cfg, log: log, level: level, started: time.Now(), failed: make(chan error, 16)}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if err := a.prepareHost(); err != nil {
		return nil, err
	}
	if a.datapath, err = datapath.Open(a.datapathConfig()); err != nil {
		return nil, fmt.Errorf("the kernel's part can't be set up: %w", err)
	}
	a.logs, a.metrics = telemetry.NewLogs(), telemetry.NewMetrics()
	a.engine, err = proxy.New(proxy.Config{
		Concurrency: cfg.Concurrency, Mark: datapath.ProxyMark, OriginalDst: a.originalDst, Metrics: a.metrics, Logs: a.logs,
		Logger: log.With("component", "proxy"),
	})
	if err != nil {
		return nil, fmt.Errorf("the proxy can't be set up: %w", err)
	}
	if a.canary, err = canary.New(datapath.OutboundPort); err != nil {
		return nil, err
	}
	a.canaryLoop = newCanaryLoop(a.canary.Check, log)
	rec := a.datapath.Reconciler()
	a.publisher = newPublisher(a.engine, rec, log, a.canary.Listener)

	o := newObjects()
	o.datapath, o.proxy, o.log, o.translate, o.synced = rec, proxyAdapter{a.engine, log}, log, cfg.Services, a.podsKnown
	a.objects = o
	if a.pods, err = pod.New(pod.Config{NetnsDir: cfg.NetnsDir, OutboundPort: datapath.OutboundPort, Handler: o, Logger: log}); err != nil {
		return nil, err
	}
	o.finder = a.pods
	if a.source, err = newSource(cfg, o, log); err != nil {
		return nil, err
	}
	if a.xds, err = newControl(cfg, a.publisher.Publish, log); err != nil {
		return nil, err
	}
	return a, nil
}

// prepareHost checks and prepares what the rest needs, cheapest and clearest first.
func (a *Agent) prepareHost() error {
	if err := host.CheckPrivileges(); err != nil {
		return err
	}
	if a.cfg.CgroupRoot == "" {
		root, err := datapath.FindCgroupRoot()
		if err != nil {
			return err
		}
		a.cfg.CgroupRoot = root
	}
	moved, err := host.JoinCgroup(a.cfg.CgroupRoot)
	if err != nil {
		return err
	}
	if moved {
		a.log.Info("the agent was outside --cgroup-root and has moved itself below it", "cgroup", a.cfg.CgroupRoot+"/"+host.OwnCgroup)
	}
	return errors.Join(host.EnsureStateDir(a.cfg.StateDir), host.EnsureNetnsDir(a.cfg.NetnsDir))
}

func (a *Agent) datapathConfig() datapath.Config {
	return DatapathConfig(a.cfg, a.log)
}

// DatapathConfig is what the settings mean for the kernel's part.
func DatapathConfig(cfg config.Config, log *slog.Logger) datapath.Config {
	return datapath.Config{
		CgroupRoot: cfg.CgroupRoot, BPFFS: cfg.BPFFS,
		Acceleration: cfg.Acceleration == config.AccelerationAuto, Services: cfg.Services,
		OriginalDstSockopt: cfg.OriginalDstSockopt, AcceleratePods: cfg.AcceleratePods, FailClosed: cfg.FailMode == config.FailClosed,
		Logger: log.With("component", "datapath"),
	}
}

func (a *Agent) originalDst(fd int) (proxy.Origin, error) {
	addr, accelerated, err := a.datapath.OriginalDst(fd)
	return proxy.Origin{Addr: addr, Accelerated: accelerated}, err
}

// proxyAdapter gives pods to the engine.
type proxyAdapter struct {
	engine *proxy.Engine
	log    *slog.Logger
}

// AddPod implements proxyPods.
func (p proxyAdapter) AddPod(in pod.Pod) error {
	defer in.Netns.Close() // the engine has made its own
	for i, fd := range in.Listeners {
		in.Listeners[i] = raiseFD(fd)
	}
	return p.engine.AddPod(proxy.Pod{
		Key: in.Cookie, Namespace: in.Namespace, Name: in.Name, UID: in.UID, ServiceAccount: in.ServiceAccount, IPs: in.IPs, Netns: in.Netns,
	}, in.Listeners)
}

// RemovePod implements proxyPods.
func (p proxyAdapter) RemovePod(cookie uint64) { p.engine.RemovePod(cookie) }

// listenersFrom is the lowest descriptor of a listening socket inside a pod: above what connections use, but not so high
// that the process' table of descriptors grows large.
var listenersFrom = sync.OnceValue(func() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return int(min(limit.Cur-limit.Cur/8, 1<<16))
})

// raiseFD gives a listening socket a descriptor above those of connections. When a process is killed, the kernel lets
// go of its sockets from the highest descriptor down (close_files queues them, task_work_run takes the last first).
// The listeners must go first: a client whose connection broke comes again at once, and must meet no listener, so
// that the hooks fail open, rather than the queue of a process that is gone.
func raiseFD(fd int) int {
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, listenersFrom())
	if err != nil {
		return fd // no room up there (RLIMIT_NOFILE): only the order at death suffers
	}
	_ = unix.Close(fd)
	return high
}

// newSource makes the source of Kubernetes objects; nil: there is none.
func newSource(cfg config.Config, h kube.Handler, log *slog.Logger) (kube.Source, error) {
	policy, err := kube.ParseEnrollPolicy(cfg.Enroll)
	if err != nil {
		return nil, err
	}
	kc := kube.Config{NodeName: cfg.NodeName, Enroll: policy, Handler: h, Logger: log.With("component", "kubernetes")}
	switch {
	case cfg.Manifests != "":
		return kube.NewManifests(kc, cfg.Manifests)
	case cfg.HasKubernetes(config.InCluster()):
		rc, err := kube.RESTConfig(cfg.Kubeconfig, cfg.APIServer)
		if err != nil {
			return nil, err
		}
		return kube.NewAPI(kc, rc)
	}
	return nil, nil
}

// Run works until ctx ends, and then drains: connections that are open may finish within --drain-time. It returns early
// with an error if a part that nothing works without fails. force ends the drain at once.
func (a *Agent) Run(ctx, force context.Context) error {
	defer a.close()
	// Parts outlive ctx: while connections drain, their endpoints and pods must still be known.
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer a.parts.Wait()
	defer stop()
	if err := a.start(work); err != nil {
		return err
	}
	var failure error
	select {
	case <-ctx.Done():
		a.log.Info("shutting down", "drain_time", a.cfg.DrainTime)
	case failure = <-a.failed:
		a.log.Error("shutting down because a part failed", "error", failure)
	}
	a.drain(force)
	return failure
}

// start brings the parts up, those first that others lean on.
func (a *Agent) start(ctx context.Context) error {
	info := version.Get()
	a.log.Info("sockmesh-agent starts", "version", info.Version, "revision", info.Revision, "node", a.cfg.NodeName,
		"cgroup", a.cfg.CgroupRoot, "bpffs", a.cfg.BPFFS, "loops", a.cfg.Concurrency)
	rec := a.datapath.Reconciler()
	a.engine.Start()
	var writing context.Context
	writing, a.stopWriting = context.WithCancel(ctx)
	a.part("datapath", writing, rec.Run)
	a.part("publisher", ctx, func(ctx context.Context) error { a.publisher.run(ctx); return nil })
	if err := a.startCanary(); err != nil {
		return err
	}
	path, err := config.SocketPath(a.cfg.Admin)
	if err != nil {
		return err
	}
	if a.admin, err = admin.Listen(path, admin.Handler(a), a.log); err != nil {
		return err
	}
	a.part("succession", ctx, func(ctx context.Context) error { a.awaitSuccessor(ctx); return nil })
	if a.cfg.Metrics != config.Off {
		if a.web, err = listenWeb(a.cfg.Metrics, a.registry(), a.notReady, a.log); err != nil {
			return err
		}
	}
	if a.xds == nil {
		// Nothing is claimed, and nothing will be: what an earlier agent's control plane claimed must go.
		a.publisher.Publish(emptySnapshot())
	} else {
		a.part("xds", ctx, a.runControl)
	}
	a.part("pods", ctx, a.servePods)
	if a.source == nil {
		rec.Synced(datapath.SourceServices)
		rec.Synced(datapath.SourcePods)
	} else {
		a.part("kubernetes", ctx, a.source.Run)
	}
	a.part("canary", ctx, a.flyCanary)
	return nil
}

// successionPoll is how often an agent looks whether another one has taken over.
const successionPoll = 250 * time.Millisecond

// awaitSuccessor stops this agent from writing to the kernel's tables as soon as another agent has taken the admin
// socket's name: at an upgrade the new agent starts beside the old one, and two writers with their own views (of
// pods, at least of their canaries) would undo each other's work. Connections are served until SIGTERM comes.
func (a *Agent) awaitSuccessor(ctx context.Context) {
	defer a.stopWriting()
	tick := time.NewTicker(successionPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if a.admin.Replaced() {
			a.succeeded.Store(true)
			a.log.Warn("another agent has taken over: this one only serves what it has, and waits for SIGTERM", "admin", a.cfg.Admin)
			return
		}
	}
}

// part runs a piece in a goroutine; its error ends the agent.
func (a *Agent) part(name string, ctx context.Context, run func(context.Context) error) {
	a.parts.Go(func() {
		if err := run(ctx); err != nil && ctx.Err() == nil {
			select {
			case a.failed <- fmt.Errorf("%s: %w", name, err):
			default:
			}
		}
	})
}

// startCanary makes the canary's namespace a pod like any other, for kernel and proxy.
func (a *Agent) startCanary() error {
	fds := a.canary.Listeners
	a.canary.Listeners = nil
	err := a.engine.AddPod(proxy.Pod{
		Key: a.canary.Cookie, Namespace: "sockmesh", Name: canary.Name, UID: canary.Name, IPs: a.canary.IPs, Netns: a.canary.Netns,
	}, fds)
	if err != nil {
		return err
	}
	a.objects.setInternal(datapath.Pod{Namespace: "sockmesh", Name: canary.Name, Cookie: a.canary.Cookie, IPs: a.canary.IPs, Enrolled: true})
	return nil
}

// servePods looks for pods once the proxy knows what to do with their connections. As soon as its listeners exist in a
// pod, claims that are pinned from before take effect there; until then they fail open (or closed, as configured).
func (a *Agent) servePods(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-a.publisher.first:
	}
	a.awaitWarm(ctx)
	a.datapath.Reconciler().Synced(datapath.SourceClaims)
	a.serving.Store(true)
	return a.pods.Run(ctx)
}

// How long pods may wait for listeners and clusters that were announced but lack routes or endpoints. It is Envoy's
// initial_fetch_timeout, after which pkg/xds goes on without them anyway.
const warmWait, warmPoll = 15 * time.Second, 10 * time.Millisecond

// awaitWarm waits until the first configuration is whole. Without the one kept on disk it comes in pieces, and a
// listener that an earlier agent's pinned claims send connections to may not be among the first.
func (a *Agent) awaitWarm(ctx context.Context) {
	for end := time.Now().Add(warmWait); a.xds != nil && time.Now().Before(end) && ctx.Err() == nil; time.Sleep(warmPoll) {
		if len(a.xds.Status().Warming) == 0 {
			return
		}
	}
}

// flyCanary waits for the first configuration, which the canary's own listener is a part of.
func (a *Agent) flyCanary(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-a.publisher.first:
		a.canaryLoop.run(ctx, a.succeeded.Load)
	}
	return nil
}

// How long the kernel's list of pods is kept from shrinking after Kubernetes was listed, while the network
// namespaces of those pods are looked for.
const podsWait, podsPoll = 3 * time.Second, 20 * time.Millisecond

// podsKnown waits until every pod that Kubernetes named has been found or given up on for now, and then lets the
// kernel forget the pods of an earlier agent.
func (a *Agent) podsKnown() {
	a.parts.Go(func() {
		for end := time.Now().Add(podsWait); time.Now().Before(end) && !a.podsSettled(); {
			time.Sleep(podsPoll)
		}
		a.datapath.Reconciler().Synced(datapath.SourcePods)
	})
}

func (a *Agent) podsSettled() bool {
	if !a.serving.Load() {
		return false
	}
	looked := map[string]bool{}
	for _, s := range a.pods.Status() {
		looked[s.UID] = s.Ready || s.Reason != ""
	}
	for _, p := range a.objects.podList() {
		if !looked[p.UID] && !p.HostNetwork && !p.Terminal {
			return false
		}
	}
	return true
}

// drain stops taking connections and lets the open ones finish. Programs and maps stay: from the moment the
// listeners close, new connections go where the in-kernel load balancer sends them, or to the agent that was
// started beside this one.
func (a *Agent) drain(force context.Context) {
	a.draining.Store(true)
	if a.web != nil {
		a.web.close() // its port is the next agent's
		a.web = nil
	}
	if a.cfg.DrainTime == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(force, a.cfg.DrainTime)
	defer cancel()
	start := time.Now()
	if err := a.engine.Drain(ctx); err != nil {
		a.log.Warn("connections are cut off: they did not end within --drain-time", "waited", time.Since(start), "error", err)
		return
	}
	a.log.Info("every connection has ended", "waited", time.Since(start))
}

// close lets go of everything, in reverse. The pins stay.
func (a *Agent) close() {
	if a.admin != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_ = a.admin.Close(ctx)
		cancel()
	}
	if a.web != nil {
		a.web.close()
	}
	if a.engine != nil {
		a.engine.Close()
	}
	if a.canary != nil {
		_ = a.canary.Close()
	}
	if a.logs != nil {
		_ = a.logs.Close()
	}
	if a.datapath != nil {
		if err := a.datapath.Close(); err != nil {
			a.log.Warn("closing the kernel's part", "error", err)
		}
	}
	a.log.Info("sockmesh-agent has ended; programs and maps stay in the kernel", "pid", os.Getpid())
}

// ReopenLogs makes access logs open their files again, after rotation.
func (a *Agent) ReopenLogs() { a.logs.Reopen() }

// CheckGone says so if an agent still answers at the admin socket.
func CheckGone(cfg config.Config) error {
	client, err := api.NewClient(cfg.Admin)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if _, err := client.Get(ctx, "/logging"); err == nil {
		return fmt.Errorf("an agent still runs (%s answers): end it first", cfg.Admin)
	}
	return nil
}
