package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// sample is one measurement. What a scenario does not measure stays zero and is not printed.
type sample struct {
	rps              float64
	p50, p99, p999   float64 // microseconds
	cpuPerRequest    float64 // microseconds of user and system time of the proxy
	rss              int64
	redirected       float64 // share of the bytes that went from socket to socket, 0 to 1
	aside            float64 // share of the connections that skipped the proxy
	asideBytes       float64 // share of the bytes that did
	requests, errors int64
	calls            map[string]float64 // system calls of the proxy per request, by name
	allocations      float64            // objects allocated per request, of proxies that tell
	changes          float64            // configurations that came into force meanwhile
	perConnection    float64            // bytes of the proxy's resident memory per idle connection
	configured       int64              // bytes of resident memory once configured, before any load
	more             map[string]float64 // what only one scenario measures, by its name in bench.json
}

func (s sample) callsPerRequest() float64 {
	var sum float64
	for _, n := range s.calls {
		sum += n
	}
	return sum
}

// script makes wrk print what it knows as one line of JSON.
const script = `done = function(s, latency, requests)
  local e = s.errors
  io.write(string.format('{"requests":%d,"us":%d,"errors":%d,"p50":%d,"p99":%d,"p999":%d}\n', s.requests, s.duration,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
`

// measure sets one case up, lets the scenario measure it, proves that it measured what its name says, and takes it down.
func (w *world) measure(ctx context.Context, s scenario, c testCase) (result sample, err error) {
	if c.change != nil {
		c.change(&s)
	}
	set, err := c.setUp(ctx, s)
	if set.undo != nil {
		defer func() { err = errors.Join(err, set.undo()) }()
	}
	if err != nil {
		return sample{}, err
	}
	// An answer must be seen before load is: a case that does not work is found out with its reason.
	if err := w.try(ctx, s, set); err != nil {
		return sample{}, err
	}
	take := s.measure
	if take == nil {
		take = (*world).closedLoop
	}
	if result, err = take(w, ctx, s, set); err != nil {
		return sample{}, err
	}
	if set.kernel != nil {
		counts, err := set.kernel(ctx)
		if err == nil {
			err = counts.prove(c.path)
		}
		if err != nil {
			return sample{}, err
		}
		result.redirected = counts.share()
		result.aside, result.asideBytes = counts.asideShares()
	}
	if result.rss == 0 {
		result.rss, err = rss(set)
	}
	return result, err
}

// closedLoop measures with as much load as the client's connections make. System calls are counted under the load before
// it: counting them makes them slower.
func (w *world) closedLoop(ctx context.Context, s scenario, set setup) (sample, error) {
	calls, err := w.warmUp(ctx, s, set)
	if err != nil {
		return sample{}, err
	}
	return w.underway(ctx, s, set, calls, func() (sample, error) { return w.load(ctx, s, set, w.duration(s)) })
}

func (w *world) duration(s scenario) time.Duration {
	if s.duration > 0 {
		return s.duration
	}
	return w.o.duration
}

// warmUp is load that is not measured; it returns what was counted meanwhile.
func (w *world) warmUp(ctx context.Context, s scenario, set setup) (sample, error) {
	counter, err := countSyscalls(set)
	if err != nil {
		return sample{}, err
	}
	warm, err := w.load(ctx, s, set, w.o.warmUp)
	warm.calls, err = counter.perRequest(warm.requests, err)
	return warm, err
}

// underway runs a load and adds what the proxy spent on each request.
func (w *world) underway(ctx context.Context, s scenario, set setup, warm sample, load func() (sample, error)) (sample, error) {
	allocations, err := countAllocations(ctx, set)
	if err != nil {
		return sample{}, err
	}
	before, err := cpuTime(set)
	if err != nil {
		return sample{}, err
	}
	result, err := load()
	if err != nil {
		return sample{}, err
	}
	after, err := cpuTime(set)
	if err != nil {
		return sample{}, err
	}
	if result.requests == 0 {
		return sample{}, errors.New("not one request was answered")
	}
	result.cpuPerRequest = float64((after - before).Microseconds()) / float64(result.requests)
	result.calls = warm.calls
	result.allocations, err = allocations(result.requests)
	return result, err
}

// countAllocations returns what says how many objects the proxy has allocated since, per request. Asking it allocates, too:
// what that costs is seen first and taken off.
func countAllocations(ctx context.Context, set setup) (func(requests int64) (float64, error), error) {
	if set.mallocs == nil {
		return func(int64) (float64, error) { return 0, nil }, nil
	}
	var seen [3]float64
	var err error
	for i := range seen {
		if seen[i], err = set.mallocs(ctx); err != nil {
			return nil, err
		}
	}
	return func(requests int64) (float64, error) {
		now, err := set.mallocs(ctx)
		return max(0, now-seen[2]-(seen[2]-seen[1])) / float64(requests), err
	}, nil
}

// goMallocs reads how many objects a Go program has allocated from its metrics.
func goMallocs(metrics string) (float64, error) {
	const name = "go_memstats_mallocs_total "
	for line := range strings.Lines(metrics) {
		if value, ok := strings.CutPrefix(line, name); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, fmt.Errorf("the metrics have no %s", name)
}

func (w *world) try(ctx context.Context, s scenario, set setup) error {
	if s.tcp {
		_, err := w.tcpLoad(ctx, s, set, 1, time.Second)
		return err
	}
	args := []string{"curl", "-sSf", "-m", "5", "-o", "/dev/null"}
	path := s.path
	if calls := s.calls(); len(calls) > 0 {
		path, args = calls[0].path, append(args, "-H", "Host: "+calls[0].host)
	}
	_, err := w.client.Run(ctx, append(args, fmt.Sprintf("http://%s%s", set.target, path))...)
	return err
}

// load runs the client for a while, in the client pod.
func (w *world) load(ctx context.Context, s scenario, set setup, d time.Duration) (sample, error) {
	if s.tcp {
		return w.tcpLoad(ctx, s, set, w.o.connections, d)
	}
	file := filepath.Join(w.lab.Dir, "tmp", "report.lua")
	if err := os.WriteFile(file, []byte(script+callScript(s.calls())), 0o644); err != nil {
		return sample{}, err
	}
	args := []string{"wrk", "-t1", "-c", strconv.Itoa(w.o.connections), "-d", fmt.Sprintf("%ds", max(1, int(d.Seconds()))), "-s", file}
	for _, h := range s.headers {
		args = append(args, "-H", h)
	}
	return w.run(ctx, append(args, fmt.Sprintf("http://%s%s", set.target, s.path)))
}

// callScript makes wrk call one after the other; nothing where there are none.
func callScript(calls []call) string {
	if len(calls) == 0 {
		return ""
	}
	var list strings.Builder
	for _, c := range calls {
		fmt.Fprintf(&list, "{%q, %q}, ", c.host, c.path)
	}
	return `
local calls, made, at = {` + list.String() + `}, {}, 0
init = function(args)
  for i, c in ipairs(calls) do made[i] = wrk.format("GET", c[2], {Host = c[1]}) end
end
request = function()
  at = at % #made + 1
  return made[at]
end
`
}

// run starts a client whose last line is a JSON object as the script prints it.
func (w *world) run(ctx context.Context, args []string) (sample, error) {
	out, err := w.client.Run(ctx, pinned(clientRole, args...)...)
	if err != nil {
		return sample{}, err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var r clientReport
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil {
		return sample{}, fmt.Errorf("%s printed %q: %w", args[0], out, err)
	}
	return sample{
		rps: float64(r.Requests) / (float64(r.Us) / 1e6), p50: r.P50, p99: r.P99, p999: r.P999, requests: r.Requests, errors: r.Errors,
	}, nil
}

// clientReport is what a client says of one run.
type clientReport struct {
	Requests int64   `json:"requests"`
	Us       int64   `json:"us"`
	Errors   int64   `json:"errors"`
	P50      float64 `json:"p50"`
	P99      float64 `json:"p99"`
	P999     float64 `json:"p999"`
}

// clockTick is the unit of the times in /proc/PID/stat: 1/100 s on every Linux (USER_HZ).
const clockTick = 10 * time.Millisecond

// cpuTime is utime + stime of the proxy's processes.
func cpuTime(set setup) (time.Duration, error) {
	if set.proxy == nil {
		return 0, nil
	}
	var total time.Duration
	err := eachProcess(set.proxy.PID(), func(pid int) error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return err
		}
		// Fields after the command's name, which may hold spaces, in brackets: state is the third.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		for _, f := range fields[11:13] {
			ticks, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return err
			}
			total += time.Duration(ticks) * clockTick
		}
		return nil
	})
	return total, err
}

// rss is the resident memory of the proxy's processes.
func rss(set setup) (int64, error) {
	if set.proxy == nil {
		return 0, nil
	}
	var total int64
	err := eachProcess(set.proxy.PID(), func(pid int) error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			return err
		}
		pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
		total += pages * int64(os.Getpagesize())
		return err
	})
	return total, err
}

// eachProcess visits a process and its children: nginx works in one.
func eachProcess(pid int, visit func(int) error) error {
	if err := visit(pid); err != nil {
		return err
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return err
	}
	for _, t := range tasks {
		text, err := os.ReadFile(t)
		if err != nil {
			continue // the thread is gone
		}
		for child := range strings.FieldsSeq(string(text)) {
			n, err := strconv.Atoi(child)
			if err == nil {
				err = eachProcess(n, visit)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// writeBodies makes files of the given sizes for the server.
func writeBodies(dir string, sizes map[string]int) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, size := range sizes {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strings.Repeat("x", size)), 0o644); err != nil {
			return err
		}
	}
	return nil
}
