package agent

import (
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// mapsAge is how old the maps' fill may be in a scrape: counting a map's entries walks it.
const mapsAge = time.Minute

// registry gathers everybody's metrics.
func (a *Agent) registry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		a.metrics, &agentCollector{a: a},
	)
	return r
}

// agentCollector turns the agent's state into metrics at each scrape.
type agentCollector struct {
	a *Agent

	mu     sync.Mutex
	status datapath.Status // guarded by mu: of asked
	asked  time.Time       // guarded by mu
}

// datapathStatus is at most mapsAge old.
func (c *agentCollector) datapathStatus() datapath.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.asked) > mapsAge {
		c.status, c.asked = c.a.datapath.Status(), time.Now()
	}
	return c.status
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("sockmesh_"+name, help, labels, nil)
}

// Metrics of the agent. Units are in the names, counters end in _total.
var (
	descBuild       = desc("build_info", "Version of the agent.", "version", "revision", "goversion")
	descReady       = desc("agent_ready", "1 if a canary connection went through and every source is known.")
	descInCharge    = desc("agent_in_charge", "1 if this agent writes the kernel's part; 0: another one has taken over.")
	descCanary      = desc("canary_connections_total", "Canary connections through the real hooks.", "result")
	descConnections = desc("connections_total", "Connections of pods by what became of them at connect.", "outcome")
	descOutside     = desc("outside_connections_total", "First packets of clients outside this node by what became of them.", "outcome")
	descOutsideNow  = desc("outside_connections", "Connections of clients outside.", "state")
	descOutsideOn   = desc("outside_active", "1 if clients outside this node are served.")
	descOutsideICMP = desc("outside_icmp_errors_total", "ICMP errors translated for clients outside and their backends.")
	descRefused     = desc("proxy_refused_connections_total", "Connections that the proxy closed unserved.", "reason")
	descActive      = desc("proxy_connections", "Connections that the proxy serves now.")
	descSilent      = desc("proxy_loop_silent_seconds", "How long a loop of the proxy has not answered; 0: it does.", "loop")
	descAccelerated = desc("acceleration_active", "1 if sockets are redirected.")
	descBytes       = desc("acceleration_bytes_total", "Bytes sent on sockets that the datapath watches, by the way that they took.", "path")
	descProbe       = desc("probe_ok", "1 if the kernel does what this probe or self-test asks of it.", "probe")
	descAside       = desc("step_aside_connections_total", "Connections through the proxy whose bytes have skipped it.")
	descAsideBytes  = desc("step_aside_bytes_total", "Bytes that have skipped the proxy; they are among the redirected ones.")
	descAsideBack   = desc("step_aside_returned_total", "Directions that came back to the proxy because their receiver was slow.")
	descBodies      = desc("step_aside_bodies_total", "Bodies of HTTP messages of which a part has skipped the proxy.")
	descBodyBytes   = desc("step_aside_body_bytes_total", "Their bytes that have; they are among sockmesh_step_aside_bytes_total.")
	descAsideOpen   = desc("step_aside_connections", "Open connections whose bytes may skip the proxy.")
	descSkipped     = desc("acceleration_skipped_sockets_total", "Sockets that were not redirected.", "reason")
	descBindRefused = desc("bind_refused_total", "Attempts of pods' processes to bind the proxy's port beside its listener.")
	descPods        = desc("pods", "Pods of this node.", "state")
	descKube        = desc("kubernetes_objects", "Kubernetes objects that are known.", "kind")
	descKubeSynced  = desc("kubernetes_synced", "1 once every kind has been listed in full.")
	descGeneration  = desc("config_generation", "Configuration snapshots published since start.")
	descXDSUp       = desc("xds_connected", "1 while the control plane is connected.", "server")
	descXDSRes      = desc("xds_resources", "xDS resources in force.", "type")
	descXDSRejected = desc("xds_rejected_resources", "xDS resources whose last version was refused.")
	descXDSIgnored  = desc("xds_ignored_fields", "xDS fields that are accepted but not acted upon.")
	descWrites      = desc("datapath_map_writes_total", "Entries written to BPF maps.")
	descDeletes     = desc("datapath_map_deletes_total", "Entries deleted from BPF maps.")
	descDrift       = desc("datapath_drift_repaired_total", "Entries that somebody else had changed.")
	descEnded       = desc("datapath_sockets_ended_total", "Sockets that were ended because their backend was gone.", "protocol")
	descRepairs     = desc("datapath_repairs_total", "Pins and attachments that somebody had removed and the agent has put back.", "kind")
	descMapEntries  = desc("datapath_map_entries", "Entries of a BPF map.", "map")
	descMapMax      = desc("datapath_map_max_entries", "Entries that a BPF map has room for.", "map")
	descRefusedMap  = desc("datapath_entries_refused", "Entries that are wanted now and that a map has no room for; what is in it keeps working.", "map")
	descWaiting     = desc("datapath_sources_waiting", "Sources whose first full list has not come: nothing that they may want is deleted before.")
	descErrors      = desc("datapath_entry_errors", "Entries that could not be written.")
)

// Describe implements prometheus.Collector: unchecked, as some labels come and go.
func (c *agentCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *agentCollector) Collect(ch chan<- prometheus.Metric) {
	a := c.a
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	v := version.Get()
	gauge(descBuild, 1, v.Version, v.Revision, v.Go)
	gauge(descReady, one(len(a.notReady()) == 0))
	gauge(descInCharge, one(a.datapath.InCharge()))
	canary := a.canaryLoop.status()
	count(descCanary, canary.Successes, "ok")
	count(descCanary, canary.Failures, "failed")

	if k, err := a.datapath.Counters(); err == nil {
		for outcome, n := range map[string]uint64{
			"proxied": k.Proxied, "offloaded": k.Offloaded, "service": k.Service, "passed": k.Passed, "refused": k.Refused,
			"failed_open": k.FailOpen, "failed_closed": k.FailClosed,
		} {
			count(descConnections, n, outcome)
		}
		for outcome, n := range map[string]uint64{
			"accepted": k.Outside, "refused": k.OutsideRefused, "silent": k.OutsideSilent, "denied": k.OutsideDenied, "stray": k.OutsideStray,
			"full": k.OutsideFull, "no_port": k.OutsideNoPort, "no_source": k.OutsideNoSource,
		} {
			count(descOutside, n, outcome)
		}
		count(descOutsideICMP, k.OutsideErrors)
		count(descBytes, k.RedirectedBytes, "redirected")
		count(descBytes, k.PassedBytes, "passed")
		count(descAside, k.SteppedAside)
		count(descAsideBytes, k.AsideBytes)
		count(descAsideBack, k.AsideReturned)
		count(descBodies, k.AsideBodies)
		count(descBodyBytes, k.AsideBodyBytes)
		count(descSkipped, k.SkippedBlocking, "blocking")
		count(descSkipped, k.SkippedMptcp, "mptcp")
		count(descSkipped, k.SkippedSplicing, "splicing")
		count(descBindRefused, k.BindRefused)
	} else {
		ch <- prometheus.NewInvalidMetric(descConnections, err)
	}
	d := c.datapathStatus()
	gauge(descAccelerated, one(d.Acceleration.Active))
	gauge(descAsideOpen, float64(d.Acceleration.StepAside.Open))
	gauge(descOutsideOn, one(d.Outside.Active))
	gauge(descOutsideNow, float64(d.Outside.Connections), "established")
	gauge(descOutsideNow, float64(d.Outside.Unanswered), "unanswered")
	for _, p := range d.Acceleration.Probes {
		gauge(descProbe, one(p.OK), p.Name)
	}
	for _, m := range d.Datapath.Maps {
		gauge(descMapEntries, float64(m.Entries), m.Name)
		gauge(descMapMax, float64(m.MaxEntries), m.Name)
	}
	r := a.datapath.Reconciler().Status()
	count(descWrites, r.Writes)
	count(descDeletes, r.Deletes)
	count(descDrift, r.DriftRepaired)
	count(descEnded, r.EndedTCP, "tcp")
	count(descEnded, r.EndedUDP, "udp")
	for kind, n := range a.datapath.Repairs() {
		count(descRepairs, n, kind)
	}
	gauge(descErrors, float64(len(r.Errors)))
	gauge(descWaiting, float64(len(r.Waiting)))
	refused := map[string]int{}
	for _, m := range d.Datapath.Maps {
		refused[m.Name] = 0
	}
	for _, e := range r.Errors {
		if e.Map != "" {
			refused[e.Map]++
		}
	}
	for name, n := range refused {
		gauge(descRefusedMap, float64(n), name)
	}

	e := a.engine.Stats()
	gauge(descActive, float64(e.Active))
	for i, silent := range a.engine.Silent() {
		gauge(descSilent, silent.Seconds(), strconv.Itoa(i))
	}
	for reason, n := range map[string]uint64{
		"no_original_dst": e.Refused.NoOriginalDst, "no_listener": e.Refused.NoListener, "no_filter_chain": e.Refused.NoChain,
		"global_limit": e.Refused.GlobalLimit, "pod_limit": e.Refused.PodLimit, "shutting_down": e.Refused.ShuttingDown,
	} {
		count(descRefused, n, reason)
	}
	states := map[string]int{podReady: 0, podWaiting: 0, podSkipped: 0}
	for _, p := range a.Pods() {
		states[p.State]++
	}
	for state, n := range states {
		gauge(descPods, float64(n), state)
	}
	k := a.kubernetesStatus()
	gauge(descKubeSynced, one(k.Synced))
	for kind, n := range map[string]int{"service": k.Services, "endpoint": k.Endpoints, "pod": k.Pods} {
		gauge(descKube, float64(n), kind)
	}
	if s := a.publisher.current.Load(); s != nil {
		gauge(descGeneration, float64(s.Generation))
	}
	c.collectXDS(gauge)
}

func (c *agentCollector) collectXDS(gauge func(*prometheus.Desc, float64, ...string)) {
	x := c.a.xdsStatus()
	for _, s := range x.Servers {
		gauge(descXDSUp, one(s.Connected), s.Name)
	}
	for kind, n := range map[string]int{
		"listener": x.Resources.Listener, "route": x.Resources.Route, "cluster": x.Resources.Cluster,
		"endpoint": x.Resources.Endpoint, "secret": x.Resources.Secret,
	} {
		gauge(descXDSRes, float64(n), kind)
	}
	gauge(descXDSRejected, float64(len(x.Rejected)))
	gauge(descXDSIgnored, float64(len(x.Ignored)))
}

func one(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (a *Agent) proxyStatus() api.Proxy {
	e := a.engine.Stats()
	p := api.Proxy{Loops: len(e.Loops), Connections: int(e.Active), Accepted: e.Accepted, Refused: e.Refused.Sum()}
	for _, l := range e.Listeners {
		p.Listeners = append(p.Listeners, api.NodeListener{Name: l.Name, Address: l.Address.String(), Error: l.Error})
	}
	if s := a.publisher.current.Load(); s != nil {
		p.Generation = s.Generation
	}
	return p
}
