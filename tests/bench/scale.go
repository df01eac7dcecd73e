package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/controlplane"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// One agent in a large cluster: 10,000 Services with 250,000 endpoints from a real API server. What is measured: memory, the
// time from the arrival of the lists to maps that hold everything, the time from one endpoint's change to the kernel's
// map, and what connections notice of an agent that is killed and started again.
//
// Services are of three sizes, as in real clusters: most have few endpoints and some have hundreds.

// scaleSizes says how many Services have how many endpoints.
var scaleSizes = []struct{ services, endpoints int }{{9000, 10}, {900, 100}, {100, 700}}

const (
	scaleSmall   = 100              // Services of the small cluster
	scaleStream  = 50               // changes a second
	scaleChanges = 1000             // of a round
	scaleSync    = 3 * time.Minute  // how long an agent may take to sync
	scaleRestart = 25 * time.Second // connects around a restart
	// slicePods is how many endpoints a slice has at most, as the EndpointSlice controller's default.
	slicePods = 100
)

// scaleResult is what a round saw.
type scaleResult struct {
	list, sync         time.Duration // from the agent's start to the lists' arrival, and from there to maps that hold everything
	fromEvent, fromAPI []time.Duration
	missed             int // changes that did not reach the map in time
	synced, busy       memory
	restart            sample
	restartSync        time.Duration
}

// memory is what an agent holds, in bytes.
type memory struct{ rss, anonymous, peak, heap, heapIdle int64 }

// sample is the round for the report.
func (x *scaleResult) sample() sample {
	const mib = 1 << 20
	p := func(of []time.Duration, percent int) float64 {
		if len(of) == 0 {
			return 0
		}
		slices.Sort(of)
		return of[(len(of)-1)*percent/100].Seconds() * 1000
	}
	return sample{
		rps: x.restart.rps, p50: x.restart.p50, p99: x.restart.p99, p999: x.restart.p999, requests: x.restart.requests,
		// A change that never came and a connection that failed are what disqualifies.
		errors: x.restart.errors + int64(x.missed), rss: x.busy.rss,
		more: map[string]float64{
			"list_seconds": x.list.Seconds(), "sync_seconds": x.sync.Seconds(), "restart_sync_seconds": x.restartSync.Seconds(),
			"event_to_map_p50_ms": p(x.fromEvent, 50), "event_to_map_p99_ms": p(x.fromEvent, 99),
			"write_to_map_p50_ms": p(x.fromAPI, 50), "write_to_map_p99_ms": p(x.fromAPI, 99), "changes": float64(len(x.fromAPI)), "changes_with_event": float64(len(x.fromEvent)), "changes_lost": float64(x.missed),
			"synced_rss_mib": float64(x.synced.rss) / mib, "synced_anonymous_mib": float64(x.synced.anonymous) / mib,
			"rss_mib": float64(x.busy.rss) / mib, "anonymous_mib": float64(x.busy.anonymous) / mib, "peak_rss_mib": float64(x.busy.peak) / mib,
			"heap_mib": float64(x.busy.heap) / mib, "heap_idle_mib": float64(x.busy.heapIdle) / mib,
			"connects": float64(x.restart.requests), "failed_connects": float64(x.restart.errors),
		},
	}
}

// more is a column of one such measurement.
func more(title, name, format string) column {
	return column{title, func(x result, _ *result) string { return fmt.Sprintf(format, x.More[name].Median) }}
}

var scaleColumns = []column{
	more("sync s", "sync_seconds", "%.2f"), more("restart sync s", "restart_sync_seconds", "%.2f"),
	more("event to map p50 ms", "event_to_map_p50_ms", "%.1f"), more("p99", "event_to_map_p99_ms", "%.1f"),
	more("write to map p50 ms", "write_to_map_p50_ms", "%.1f"), more("p99", "write_to_map_p99_ms", "%.1f"),
	more("RSS MiB", "rss_mib", "%.0f"), more("of it anonymous", "anonymous_mib", "%.0f"), more("peak RSS", "peak_rss_mib", "%.0f"), more("heap in use", "heap_mib", "%.0f"),
	more("connects over a restart", "connects", "%.0f"), more("failed", "failed_connects", "%.0f"),
}

// scaleWorld is the node and its cluster.
type scaleWorld struct {
	*kubeNode
	o   options
	api *kubeAPI
	// endpoints of each Service, in slices.
	services [][]netip.Addr
}

// runScale is the whole scenario.
func runScale(ctx context.Context, o options, s scenario, r *report) (err error) {
	w := &scaleWorld{o: o}
	w.kubeNode, err = newKubeNode(ctx, o)
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil {
		return err
	}
	if w.api, err = newKubeAPI(o, w.kubeNode); err != nil {
		return err
	}
	if err := w.api.createNode(ctx); err != nil {
		return err
	}
	small := testCase{proxy: "sockmesh", path: "connect", variant: fmt.Sprintf("%d Services", scaleSmall), services: scaleSmall}
	large := testCase{proxy: "sockmesh", path: "connect"}
	for i, size := range scaleSizes {
		for range size.services {
			w.services = append(w.services, scaleEndpoints(len(w.services), size.endpoints))
		}
		large.services += scaleSizes[i].services
	}
	rand.New(rand.NewPCG(1, 1)).Shuffle(len(w.services), func(i, j int) { w.services[i], w.services[j] = w.services[j], w.services[i] })
	w.services[0] = []netip.Addr{serverAddr} // the one that connections go to
	total := 0
	for _, e := range w.services {
		total += len(e)
	}
	large.variant = fmt.Sprintf("%d Services, %d endpoints", large.services, total)

	rounds := o.rounds
	if s.maxRounds > 0 {
		rounds = min(rounds, s.maxRounds)
	}
	for _, c := range []testCase{small, large} {
		progress("%s: storing %s", s.name, c.variant)
		if err := w.fill(ctx, c.services); err != nil {
			return err
		}
		for round := range rounds {
			progress("%s, round %d of %d: %s", s.name, round+1, rounds, c.variant)
			x, err := w.scaleRound(ctx, c.services)
			r.add(s, c, x.sample(), err)
		}
	}
	return nil
}

// scaleEndpoints are a Service's addresses, which no other has.
func scaleEndpoints(i, n int) []netip.Addr {
	var all []netip.Addr
	for e := range n {
		v := uint32(i)<<10 | uint32(e) // 700 at most
		all = append(all, netip.AddrFrom4([4]byte{11 + byte(v>>24), byte(v >> 16), byte(v >> 8), byte(v)}))
	}
	return all
}

// fill stores Services up to a number.
func (w *scaleWorld) fill(ctx context.Context, count int) error {
	var objects []runtime.Object
	for i, endpoints := range w.services[:count] {
		objects = append(objects, serviceObject(i))
		for n, some := range slices.Collect(slices.Chunk(endpoints, slicePods)) {
			objects = append(objects, sliceObject(i, n, tcpPort, some...))
		}
	}
	return w.api.store(ctx, objects)
}

// scaleRound is one agent's life: first sync, a stream of changes, and a restart under connections.
func (w *scaleWorld) scaleRound(ctx context.Context, count int) (x scaleResult, err error) {
	agent, err := w.startAgent(w.api)
	if err != nil {
		return x, err
	}
	defer func() {
		_ = agent.Stop(5 * time.Second)
		out, e := exec.Command(filepath.Join(w.o.build, "bin/sockmesh-agent"), "cleanup", "--cgroup-root", w.lab.Cgroup, "--bpffs", w.lab.BPFFS()).CombinedOutput()
		if e != nil {
			err = errors.Join(err, fmt.Errorf("cleanup: %w: %s", e, out))
		}
	}()
	if x.list, x.sync, err = w.awaitSync(ctx, agent); err != nil {
		return x, err
	}
	if x.synced, err = w.memory(ctx, agent); err != nil {
		return x, err
	}
	if err := w.stream(ctx, count, &x); err != nil {
		return x, err
	}
	if x.busy, err = w.memory(ctx, agent); err != nil {
		return x, err
	}
	w.profile(ctx, count)
	next, err := w.restart(ctx, agent, &x)
	if next != nil {
		agent = next
	}
	return x, err
}

// awaitSync waits until the agent's log says that the maps hold everything. The log says when.
func (w *scaleWorld) awaitSync(ctx context.Context, agent *lab.Process) (list, sync time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, scaleSync)
	defer cancel()
	err = lab.Wait(ctx, func() error {
		var started, listed, synced time.Time
		lines := bufio.NewScanner(strings.NewReader(agent.Output()))
		for lines.Scan() {
			var line struct {
				Time time.Time
				Msg  string
			}
			if json.Unmarshal(lines.Bytes(), &line) != nil {
				continue
			}
			switch line.Msg {
			case "sockmesh-agent starts":
				started = line.Time
			case "every kind of object has been listed":
				listed = line.Time
			case "the maps hold what the sources want":
				synced = line.Time
			}
		}
		if started.IsZero() || listed.IsZero() || synced.Before(listed) {
			return fmt.Errorf("not synced yet: %s", agent.Tail())
		}
		list, sync = listed.Sub(started), synced.Sub(listed)
		return nil
	})
	return list, sync, err
}

// memory asks the kernel and the agent, after a moment's rest.
func (w *scaleWorld) memory(ctx context.Context, agent *lab.Process) (m memory, err error) {
	time.Sleep(5 * time.Second)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", agent.PID()))
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		into := map[string]*int64{"VmRSS": &m.rss, "RssAnon": &m.anonymous, "VmHWM": &m.peak}[name]
		if into == nil {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			return m, err
		}
		*into = kib << 10
	}
	metrics, err := w.lab.Metrics(ctx, "/metrics")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(metrics) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		into := map[string]*int64{"go_memstats_heap_inuse_bytes": &m.heap, "go_memstats_heap_idle_bytes": &m.heapIdle}[name]
		if into != nil {
			f, _ := strconv.ParseFloat(value, 64)
			*into = int64(f)
		}
	}
	return m, nil
}

// profile leaves the agent's heap profile beside the results, for whoever asks what holds the memory.
func (w *scaleWorld) profile(ctx context.Context, count int) {
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", strings.TrimPrefix(w.lab.Admin(), "unix://"))
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/debug/pprof/heap?gc=1", nil)
	if err != nil {
		return
	}
	resp, err := client.Do(req)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	file := filepath.Join(filepath.Dir(w.o.out), fmt.Sprintf("scale-%d.heap.pprof", count))
	if f, err := os.Create(file); err == nil {
		_, _ = f.ReadFrom(resp.Body)
		_ = f.Close()
	}
}

// stream changes one endpoint after another, at a steady rate, and notes when each change is in the kernel's map: an endpoint
// is added to a Service or taken away, so the number of slots tells.
func (w *scaleWorld) stream(ctx context.Context, count int, x *scaleResult) error {
	view, err := datapath.OpenView(w.lab.BPFFS())
	if err != nil {
		return err
	}
	defer view.Close()
	client := w.api.server.Client(controlplane.AdminToken)
	watch, err := watchSlices(ctx, client)
	if err != nil {
		return err
	}
	defer watch.stop()
	pick := rand.New(rand.NewPCG(2, 2))
	order := pick.Perm(count - 1)
	tick := time.NewTicker(time.Second / scaleStream)
	defer tick.Stop()
	var wg sync.WaitGroup
	var mu sync.Mutex // guards x and failed
	var failed error
	for n := range scaleChanges {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		i := 1 + order[n%len(order)]
		wg.Go(func() {
			c := change{service: i, add: n/len(order)%2 == 0}
			err := c.make(ctx, w, client, view)
			event, seen := time.Time{}, false
			if err == nil {
				event, seen = watch.seen(c.version)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = errors.Join(failed, err)
				return
			}
			if c.inMap.IsZero() {
				x.missed++
				return
			}
			x.fromAPI = append(x.fromAPI, c.inMap.Sub(c.written))
			if seen {
				x.fromEvent = append(x.fromEvent, max(0, c.inMap.Sub(event)))
			}
		})
	}
	wg.Wait()
	return failed
}

// change is one endpoint's.
type change struct {
	service        int
	add            bool
	version        string // of the slice, after it
	written, inMap time.Time
}

// mapPoll is how often the map is looked at, changePatience how long.
const mapPoll, changePatience = 200 * time.Microsecond, 10 * time.Second

// make adds the Service's extra endpoint, or takes it away.
func (c *change) make(ctx context.Context, w *scaleWorld, client kubernetes.Interface, view *datapath.View) error {
	endpoints := w.services[c.service]
	first := endpoints[:min(len(endpoints), slicePods)]
	want := len(endpoints)
	s := sliceObject(c.service, 0, tcpPort, first...)
	if c.add {
		extra := scaleEndpoints(c.service, 1023)[1022]
		s.Endpoints = append(s.Endpoints, endpointObject(c.service, extra))
		want++
	}
	c.written = time.Now()
	done, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Update(ctx, s, metav1.UpdateOptions{})
	if err != nil {
		return err
	}
	c.version = done.ResourceVersion
	for deadline := time.Now().Add(changePatience); time.Now().Before(deadline); time.Sleep(mapPoll) {
		if n, _ := view.Backends(serviceAddr(c.service), service.TCP); n == want {
			c.inMap = time.Now()
			break
		}
	}
	return nil
}

// sliceWatch notes when events come to a watcher like the agent's.
type sliceWatch struct {
	stop func()
	mu   sync.Mutex
	at   map[string]time.Time // guarded by mu: by resource version
}

// watchSlices watches from now on, and again from where it was when a watch ends.
func watchSlices(ctx context.Context, client kubernetes.Interface) (*sliceWatch, error) {
	slices := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	list, err := slices.List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &sliceWatch{stop: cancel, at: map[string]time.Time{}}
	version := list.ResourceVersion
	go func() {
		for ctx.Err() == nil {
			watch, err := slices.Watch(ctx, metav1.ListOptions{ResourceVersion: version})
			if err != nil {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			for e := range watch.ResultChan() {
				slice, ok := e.Object.(*discoveryv1.EndpointSlice)
				if !ok {
					break
				}
				version = slice.ResourceVersion
				s.mu.Lock()
				s.at[version] = time.Now()
				s.mu.Unlock()
			}
			watch.Stop()
		}
	}()
	return s, nil
}

// eventPatience is how long after the map's change the event may come to this watcher.
const eventPatience = 2 * time.Second

// seen is when the event came, which may be around the time at which the map changes; false: this watcher missed it.
func (s *sliceWatch) seen(version string) (time.Time, bool) {
	for deadline := time.Now().Add(eventPatience); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		at, ok := s.at[version]
		s.mu.Unlock()
		if ok || time.Now().After(deadline) {
			return at, ok
		}
	}
}

// restart kills the agent and starts another, while the client pod connects without a pause.
func (w *scaleWorld) restart(ctx context.Context, agent *lab.Process, x *scaleResult) (next *lab.Process, err error) {
	done := make(chan error, 1)
	go func() {
		var err error
		x.restart, err = w.connects(ctx, []netip.AddrPort{serviceAddr(0)}, 4, scaleRestart)
		done <- err
	}()
	time.Sleep(2 * time.Second)
	agent.Kill()
	time.Sleep(time.Second)
	if next, err = w.startAgent(w.api); err == nil {
		_, x.restartSync, err = w.awaitSync(ctx, next)
	}
	return next, errors.Join(err, <-done)
}
