package agent

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/agent/admin"
	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/agent/describe"
	"github.com/sockmesh/sockmesh/agent/explain"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/datapath"
)

var _ admin.Source = (*Agent)(nil)

// Status implements admin.Source.
func (a *Agent) Status() api.Status {
	d := a.datapath.Status()
	reasons := a.notReady()
	s := api.Status{
		Node: a.cfg.NodeName, Version: version.String(), Ready: len(reasons) == 0, NotReadyReasons: reasons,
		UptimeSeconds: int64(time.Since(a.started).Seconds()), Draining: a.draining.Load(),
		Acceleration: api.Acceleration{
			Mode: a.cfg.Acceleration, Active: d.Acceleration.Active, Reason: d.Acceleration.Reason, Pairs: uint64(d.Acceleration.Pairs),
			RedirectedBytes: d.Acceleration.RedirectedBytes, PassedBytes: d.Acceleration.PassedBytes, Probes: []api.Probe{},
			StepAside: api.StepAside(d.Acceleration.StepAside),
		},
		Datapath: api.Datapath{
			Programs: []api.Program{}, Maps: mapRows(d.Datapath.Maps), Waiting: d.Reconciler.Waiting, TimedOut: d.Reconciler.TimedOut,
			DriftRepaired: d.Reconciler.DriftRepaired, EndedTCP: d.Reconciler.EndedTCP, EndedUDP: d.Reconciler.EndedUDP, Warnings: d.Datapath.Warnings, Errors: reconcilerErrors(d.Reconciler),
		},
		Kubernetes:  a.kubernetesStatus(),
		XDS:         a.xdsStatus(),
		Connections: a.connections(),
		Proxy:       a.proxyStatus(),
		Outside:     a.outsideStatus(d.Outside),
		Canary:      a.canaryLoop.status(),
	}
	s.Datapath.Repairs, s.Datapath.RepairProblem = d.Guard.Repairs, d.Guard.Problem
	if d.Guard.Last != "" {
		s.Datapath.LastRepair = d.Guard.Last + " at " + d.Guard.LastAt.UTC().Format(time.RFC3339)
	}
	for _, p := range d.Acceleration.Probes {
		s.Acceleration.Probes = append(s.Acceleration.Probes, api.Probe{Name: p.Name, OK: p.OK, Detail: p.Detail})
	}
	for _, p := range d.Datapath.Programs {
		s.Datapath.Programs = append(s.Datapath.Programs, api.Program{Name: p.Name, Attach: p.Attach, ID: p.ID, Pinned: p.Pinned})
	}
	for _, p := range a.Pods() {
		if p.State == podReady || p.State == podSkipped && p.Reason == "host network" {
			s.Pods.Local++
		}
		if p.State == podReady && p.Enrolled {
			s.Pods.Enrolled++
		}
	}
	return s
}

// notReady is why the agent is not ready; empty, never nil: it is. (JSON readers expect a list.)
func (a *Agent) notReady() []string {
	reasons := []string{}
	add := func(format string, args ...any) { reasons = append(reasons, fmt.Sprintf(format, args...)) }
	if a.draining.Load() {
		add("draining: the agent is shutting down")
	}
	if a.succeeded.Load() {
		add("succeeded: another agent has taken over")
	}
	if a.source != nil {
		if k := a.source.Status(); !k.Synced {
			add("kubernetes: %s has not been listed in full (waiting for %s)", k.Source, strings.Join(k.Waiting, ", "))
		}
	}
	if a.xds != nil && a.publisher.current.Load() == nil {
		add("xds: no configuration has come yet%s", a.xdsTrouble())
	}
	if c := a.canaryLoop.status(); !c.OK {
		add("canary: %s", c.Error)
	}
	return reasons
}

func (a *Agent) kubernetesStatus() api.Kubernetes {
	if a.source == nil {
		return api.Kubernetes{Source: "none"}
	}
	k := a.source.Status()
	return api.Kubernetes{
		Source: k.Source, Synced: k.Synced, Services: k.Services, Endpoints: k.Endpoints, Pods: k.Pods, Waiting: k.Waiting, Errors: k.Errors,
	}
}

func (a *Agent) connections() api.Connections {
	c, err := a.datapath.Counters()
	if err != nil {
		a.log.Warn("the connection counters can't be read", "error", err)
	}
	return api.Connections{
		Proxied: c.Proxied, Offloaded: c.Offloaded, Service: c.Service, Passed: c.Passed, Refused: c.Refused, FailedOpen: c.FailOpen,
		SteppedAside: c.SteppedAside,
	}
}

func (a *Agent) outsideStatus(d datapath.OutsideStatus) api.Outside {
	c, err := a.datapath.Counters()
	if err != nil {
		a.log.Warn("the counters of clients outside can't be read", "error", err)
	}
	o := api.Outside{
		Active: d.Active, Reason: d.Reason, Devices: []api.Device{}, Connections: d.Connections, Unanswered: d.Unanswered,
		Accepted: c.Outside, Refused: c.OutsideRefused, Silent: c.OutsideSilent, Denied: c.OutsideDenied, Stray: c.OutsideStray,
		Full: c.OutsideFull, NoPort: c.OutsideNoPort + c.OutsideNoSource,
	}
	for _, dev := range d.Devices {
		o.Devices = append(o.Devices, api.Device{Name: dev.Name, Mode: dev.Mode, Clients: dev.Clients, Reason: dev.Reason})
	}
	return o
}

func reconcilerErrors(r datapath.ReconcilerStatus) []string {
	var out []string
	for _, e := range r.Errors {
		out = append(out, fmt.Sprintf("%s %s %s: %s", e.Kind, e.Name, e.Addr, e.Error))
	}
	return out
}

func mapRows(list []datapath.MapStatus) []api.Map {
	out := make([]api.Map, 0, len(list))
	for _, m := range list {
		out = append(out, api.Map{Name: m.Name, ID: m.ID, Type: m.Type, Entries: uint64(max(m.Entries, 0)), MaxEntries: m.MaxEntries})
	}
	return out
}

// Pods implements admin.Source.
func (a *Agent) Pods() []api.Pod {
	return podRows(a.cfg.Enroll, a.objects.podList(), a.pods.Status(), a.serving.Load())
}

// Services implements admin.Source.
func (a *Agent) Services() []api.Service {
	return describe.Services(a.objects.serviceList(), a.publisher.current.Load(), describe.NodeFacts{Notes: a.notices.of, HealthCheck: a.checks.Open})
}

// Listeners implements admin.Source.
func (a *Agent) Listeners() []api.Listener {
	return describe.Listeners(a.publisher.current.Load(), a.proxyStatus().Listeners)
}

// Routes implements admin.Source.
func (a *Agent) Routes() []api.Route { return describe.Routes(a.publisher.current.Load()) }

// Clusters implements admin.Source.
func (a *Agent) Clusters() []api.Cluster { return describe.Clusters(a.publisher.current.Load()) }

// Endpoints implements admin.Source.
func (a *Agent) Endpoints() []api.Endpoint {
	names := newPodNames(a.objects.placedByUID())
	return describe.Endpoints(a.publisher.current.Load(), func(ip netip.Addr) string { return names.byAddr[ip] })
}

// Sockets implements admin.Source.
func (a *Agent) Sockets() ([]api.Socket, error) {
	list, err := a.datapath.Sockets()
	if err != nil {
		return nil, err
	}
	names := newPodNames(a.objects.placedByUID())
	names.byCookie[a.canary.Cookie] = "(canary)"
	out := make([]api.Socket, 0, len(list))
	for _, s := range list {
		row := api.Socket{
			Cookie: s.Cookie, Netns: s.Netns, Pod: names.byCookie[s.Netns], Role: s.Role, Local: s.Local.String(), Remote: s.Remote.String(),
			TCP: s.TCP, Redirects: s.Sends == "redirect", State: s.State, Reason: s.Reason, Peer: s.Peer,
			Redirected: s.RedirectedBytes, Passed: s.PassedBytes,
			Aside: s.Aside, AsideReason: s.AsideReason, AsideBytes: s.AsideBytes,
		}
		if s.Origin.IsValid() {
			row.Origin = s.Origin.String()
		}
		out = append(out, row)
	}
	slices.SortFunc(out, func(x, y api.Socket) int { return strings.Compare(x.Pod+x.Role+x.Local, y.Pod+y.Role+y.Local) })
	return out, nil
}

// Maps implements admin.Source.
func (a *Agent) Maps() ([]api.Map, error) { return mapRows(a.datapath.Maps()), nil }

// Dump implements admin.Source.
func (a *Agent) Dump(name string) (api.MapDump, error) {
	var out api.MapDump
	for _, m := range mapRows(a.datapath.Maps()) {
		if m.Name == name {
			out.Map = m
		}
	}
	if out.Name == "" {
		return out, fmt.Errorf("map %q: %w: see sockmesh maps", name, admin.ErrNotFound)
	}
	entries, err := a.datapath.Dump(name)
	if err != nil {
		return out, err
	}
	out.Dump = make([]api.MapEntry, 0, len(entries))
	for _, e := range entries {
		key, err := json.Marshal(e.Key)
		if err != nil {
			return out, err
		}
		value, err := json.Marshal(e.Value)
		if err != nil {
			return out, err
		}
		out.Dump = append(out.Dump, api.MapEntry{Key: key, Value: value})
	}
	return out, nil
}

// Explain implements admin.Source.
func (a *Agent) Explain(req api.ExplainRequest) (api.Explanation, error) {
	pods := a.objects.podList()
	rows := podRows(a.cfg.Enroll, pods, a.pods.Status(), a.serving.Load())
	status := a.datapath.Status()
	accel := status.Acceleration
	e, err := explain.Explain(&explain.World{
		Snapshot: a.publisher.current.Load(), Services: a.objects.serviceList(), Pods: explainPods(pods, rows),
		ServicesOn: a.cfg.Services, FailClosed: a.cfg.FailMode == config.FailClosed, AcceleratePods: a.cfg.AcceleratePods,
		Acceleration: accel.Active, AccelerationReason: accel.Reason,
		UDP:     slices.ContainsFunc(status.Datapath.Programs, func(p datapath.ProgramStatus) bool { return strings.Contains(p.Name, "sendmsg") }),
		Outside: DatapathConfig(a.cfg, a.log).Outside,
	}, req)
	if err != nil {
		err = fmt.Errorf("%w: %w", admin.ErrBadRequest, err)
	}
	return e, err
}

// LogLevel implements admin.Source.
func (a *Agent) LogLevel() string { return strings.ToLower(a.level.Level().String()) }

// SetLogLevel implements admin.Source.
func (a *Agent) SetLogLevel(s string) error {
	l, err := config.ParseLevel(s)
	if err != nil {
		return err
	}
	a.level.Set(l)
	a.log.Info("log level changed", "level", s)
	return nil
}
