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
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sockmesh/sockmesh/agent/admin"
	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/canary"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/agent/host"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/datapath/selftest"
	"github.com/sockmesh/sockmesh/pkg/healthcheck"
	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/nodeaddr"
	"github.com/sockmesh/sockmesh/pkg/pod"
	"github.com/sockmesh/sockmesh/pkg/proxy"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/service"
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

	notices    *notices
	checks     *healthcheck.Services
	nodeHealth *healthcheck.Node // nil: --kube-proxy-healthz is off

	canary     *canary.Canary
	canaryLoop *canaryLoop

	admin     *admin.Server
	web       *webServer
	webSocket net.Listener // web's, bound before it serves

	// serving: pods are being looked for, because the proxy knows what to do with their connections.
	serving  atomic.Bool
	draining atomic.Bool
	// succeeded: another agent has been started beside this one, has taken over, and lives.
	succeeded  atomic.Bool
	turn       atomic.Pointer[turn] // held while this agent starts
	healthOpen atomic.Bool          // load balancers are answered while this agent is in charge
	selfTested bool                 // before Run
	live       chan struct{}        // closed when this build's programs are in charge
	failed     chan error           // the first part that ended with an error
	parts      sync.WaitGroup
}

// New prepares the machine and every part; nothing that pods could notice happens before Run, except that programs
// of an earlier agent are replaced by this build's.
func New(cfg config.Config, log *slog.Logger, level *slog.LevelVar) (_ *Agent, err error) {
	a := &Agent{cfg: cfg, log: log, level: level, started: time.Now(), live: make(chan struct{}), failed: make(chan error, 16)}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if err := a.prepareHost(); err != nil {
		return nil, err
	}
	// What can be wrong with the settings comes before the kernel's part is opened: opening it takes it over from the
	// agent that runs, and one that only came to say that it can't read its bootstrap must not do that.
	if err := a.readSources(); err != nil {
		return nil, err
	}
	if err := a.awaitTurn(); err != nil {
		return nil, err
	}
	if a.datapath, err = datapath.Open(a.datapathConfig()); err != nil {
		return nil, fmt.Errorf("the kernel's part can't be set up: %w", err)
	}
	if a.datapath.Live() { // else awaitLive does it
		if err := selftest.Guard(context.Background(), a.datapath, log); err != nil {
			return nil, err
		}
		a.selfTested = true
	}
	a.logs, a.metrics = telemetry.NewLogs(), telemetry.NewMetrics()
	a.engine, err = proxy.New(proxy.Config{
		Concurrency: cfg.Concurrency, IO: cfg.IO, MaxConnsPerPod: cfg.MaxConnectionsPerPod,
		Own: a.datapath.Own, Leave: a.leaveListener, OriginalDst: a.originalDst, StepAside: a.stepAside,
		PairUp:  aside.PairUp(a.datapath.AsideEnd, a.datapath.PairUp),
		Metrics: a.metrics, Logs: a.logs, Logger: log.With("component", "proxy"),
	})
	if err != nil {
		return nil, fmt.Errorf("the proxy can't be set up: %w", err)
	}
	if a.canary, err = canary.New(datapath.OutboundPort, a.datapath.OwnListener); err != nil {
		return nil, err
	}
	a.canaryLoop = newCanaryLoop(a.canary.Check, log)
	a.newHealth()
	a.objects.health = a.checks
	rec := a.datapath.Reconciler()
	a.publisher = newPublisher(a.engine, rec, log, a.canary.Listener)
	a.objects.datapath, a.objects.proxy = rec, proxyAdapter{a.engine, log}
	return a, nil
}

// readSources makes everything that reads settings, none of which does anything before Run.
func (a *Agent) readSources() (err error) {
	o := newObjects()
	o.log, o.translate, o.synced = a.log, a.cfg.Services, a.podsKnown
	a.objects = o
	if a.pods, err = pod.New(a.podConfig()); err != nil {
		return err
	}
	o.finder = a.pods
	a.notices = &notices{log: a.log, uid: o.serviceUID}
	if a.source, err = newSource(a.cfg, o, a.log); err != nil {
		return err
	}
	if a.source != nil {
		a.notices.warn = a.source.Recorder().Warn
	}
	if a.xds, err = newControl(a.cfg, func(s *mesh.Snapshot) { a.publisher.Publish(s) }, a.log); err != nil {
		return err
	}
	if a.cfg.Metrics != config.Off {
		a.webSocket, err = bindWeb(a.cfg.Metrics)
	}
	return err
}

// podConfig names the datapath, which is there before the pods are looked for.
func (a *Agent) podConfig() pod.Config {
	return pod.Config{
		NetnsDir: a.cfg.NetnsDir, OutboundPort: datapath.OutboundPort, Handler: a.objects, Logger: a.log,
		Own:     func(fd int) error { return a.datapath.OwnListener(fd) },
		Owns:    func(cookie uint64) (bool, error) { return a.datapath.OwnsListener(cookie) },
		Foreign: a.cfg.OriginalDstSockopt,
	}
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
	path, err := config.SocketPath(a.cfg.Admin)
	if err != nil {
		return err
	}
	err = errors.Join(host.EnsureStateDir(a.cfg.StateDir), host.EnsureNetnsDir(a.cfg.NetnsDir), host.EnsureAdminDir(filepath.Dir(path)))
	if err != nil || !a.cfg.DropPrivileges {
		return err
	}
	// Nothing that comes needs more than what is kept, so the moment is now: nothing from outside was read yet.
	left, err := host.DropPrivileges()
	if err == nil {
		a.log.Info("privileges are dropped", "capabilities", strings.Join(left, " "))
	}
	return err
}

func (a *Agent) datapathConfig() datapath.Config {
	c := DatapathConfig(a.cfg, a.log)
	c.OpenNetns, c.Owners = a.openNetns, agentsDir(a.cfg.StateDir)
	return c
}

// openNetns opens the network namespace of the pod with the cookie.
func (a *Agent) openNetns(cookie uint64) (*os.File, error) {
	for _, p := range a.pods.Status() {
		if p.Cookie == cookie && p.NetnsName != "" {
			return os.Open(filepath.Join(a.cfg.NetnsDir, p.NetnsName))
		}
	}
	return nil, fmt.Errorf("no pod of this node has it below %s", a.cfg.NetnsDir)
}

// DatapathConfig is what the settings mean for the kernel's part.
func DatapathConfig(cfg config.Config, log *slog.Logger) datapath.Config {
	return datapath.Config{
		CgroupRoot: cfg.CgroupRoot, BPFFS: cfg.BPFFS,
		Acceleration: cfg.Acceleration == config.AccelerationAuto, Services: cfg.Services,
		OriginalDstSockopt: cfg.OriginalDstSockopt, AcceleratePods: cfg.AcceleratePods, FailClosed: cfg.FailMode == config.FailClosed,
		Outside: cfg.Outside && cfg.Services, Devices: cfg.DeviceList(), NATPorts: cfg.NATPorts, NATEstablished: cfg.NATEstablished,
		Sizes: cfg.Maps, SyncTimeout: cfg.SyncTimeout, DriftInterval: cfg.DriftInterval, TCPGrace: cfg.TCPGrace,
		Logger: log.With("component", "datapath"),
	}
}

func (a *Agent) originalDst(fd int) (proxy.Origin, error) {
	addr, accelerated, err := a.datapath.OriginalDst(fd)
	return proxy.Origin{Addr: addr, Accelerated: accelerated}, err
}

func (a *Agent) stepAside(down, up int, toServer, toClient uint64) (aside.Handle, error) {
	h, err := a.datapath.StepAside(down, up, toServer, toClient)
	if err != nil { // not a nil *Aside in an interface
		return nil, err
	}
	return h, nil
}

// newSource makes the source of Kubernetes objects; nil: there is none.
func newSource(cfg config.Config, h kube.Handler, log *slog.Logger) (kube.Source, error) {
	policy, err := kube.ParseEnrollPolicy(cfg.Enroll)
	if err != nil {
		return nil, err
	}
	nodePorts, err := service.ParseNodePortAddresses(cfg.NodePortAddresses)
	if err != nil {
		return nil, err
	}
	externalIPs, err := service.ParseExternalIPPolicy(cfg.ExternalIPs)
	if err != nil {
		return nil, err
	}
	kc := kube.Config{
		NodeName: cfg.NodeName, Enroll: policy, NodePorts: nodePorts, ExternalIPs: externalIPs, Outside: cfg.Outside, Handler: h,
		Logger: log.With("component", "kubernetes"),
	}
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
	defer func() {
		a.close()
		a.log.Info("sockmesh-agent has ended; programs and maps stay in the kernel")
	}()
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
	a.part("datapath", ctx, rec.Run)
	a.part("guard", ctx, a.datapath.Guard)
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
	a.part("succession", ctx, a.watchSuccession)
	if a.cfg.Metrics != config.Off {
		a.web = serveWeb(a.webSocket, a.registry(), a.notReady, a.unhealthy, a.log)
	}
	if a.xds == nil {
		// Nothing is claimed, and nothing will be: what an earlier agent's control plane claimed must go.
		a.publisher.Publish(emptySnapshot())
	} else {
		a.part("xds", ctx, a.runControl)
	}
	a.part("live", ctx, a.awaitLive)
	a.part("pods", ctx, a.servePods)
	if a.source == nil {
		rec.Synced(datapath.SourceServices)
		rec.Synced(datapath.SourcePods)
	} else {
		a.part("addresses", ctx, func(ctx context.Context) error { return nodeaddr.Watch(ctx, a.log, a.setAddresses) })
		if a.cfg.Services {
			a.startHealth(ctx)
			a.part("failures", ctx, a.watchFailures)
			a.part("ports", ctx, a.watchPorts)
		}
		a.part("kubernetes", ctx, a.source.Run)
	}
	a.part("canary", ctx, a.flyCanary)
	return nil
}

// setAddresses passes the addresses of the node's devices on.
func (a *Agent) setAddresses(devices []netip.Addr) {
	a.objects.setDevices(devices)
	a.source.SetAddresses(devices)
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

// drain stops taking connections and lets the open ones finish. Programs and maps stay: from the moment the
// listeners close, new connections go where the in-kernel load balancer sends them, or to the agent that was
// started beside this one.
func (a *Agent) drain(force context.Context) {
	a.draining.Store(true)
	a.closeHealth()
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
	a.endTurn()
	if a.admin != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_ = a.admin.Close(ctx)
		cancel()
	}
	a.closeHealth()
	if a.web != nil {
		a.web.close()
	} else if a.webSocket != nil {
		_ = a.webSocket.Close() // closed already where web was: no matter
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
