package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// report collects samples by scenario and case, in the order in which they first came.
type report struct {
	o     options
	rows  []*row
	began time.Time
}

type row struct {
	scenario scenario
	c        testCase
	samples  []sample
	problems []string
}

func newReport(o options) *report { return &report{o: o, began: time.Now()} }

func (r *report) add(s scenario, c testCase, x sample, err error) {
	i := slices.IndexFunc(r.rows, func(w *row) bool {
		return w.scenario.name == s.name && w.c.String() == c.String()
	})
	if i < 0 {
		r.rows = append(r.rows, &row{scenario: s, c: c})
		i = len(r.rows) - 1
	}
	if err != nil {
		r.rows[i].problems = append(r.rows[i].problems, err.Error())
		return
	}
	r.rows[i].samples = append(r.rows[i].samples, x)
}

// result is one row of build/bench.json.
type result struct {
	Scenario string `json:"scenario"`
	Proxy    string `json:"proxy"`
	Path     string `json:"path"`
	Variant  string `json:"variant,omitempty"`
	// Services that were present in the cluster.
	Services    int     `json:"services,omitempty"`
	Connections int     `json:"connections"`
	Rounds      int     `json:"rounds"`
	RPS         spread  `json:"rps"`
	P50         float64 `json:"p50_us"`
	P99         float64 `json:"p99_us"`
	P999        float64 `json:"p999_us"`
	P99Spread   spread  `json:"p99_us_spread"`
	CPU         spread  `json:"cpu_us_per_request_spread"`
	CPUMedian   float64 `json:"cpu_us_per_request"`
	RSS         int64   `json:"rss_bytes"`
	Redirected  float64 `json:"redirected_share"`
	// Aside and AsideBytes are the shares of the connections and of the bytes that skipped the proxy.
	Aside      float64 `json:"stepped_aside_share,omitempty"`
	AsideBytes float64 `json:"stepped_aside_bytes_share,omitempty"`
	Errors     int64   `json:"errors"`
	// Calls are the proxy's system calls per request by name, and CallsMedian their sum.
	Calls       map[string]float64 `json:"syscalls_by_name,omitempty"`
	CallsMedian float64            `json:"syscalls_per_request"`
	// Allocations per request: of proxies that tell, which is ours.
	Allocations float64 `json:"allocations_per_request"`
	// Changes of configuration that came into force under load.
	Changes float64 `json:"changes,omitempty"`
	// PerConnection is resident memory per idle connection.
	PerConnection spread `json:"bytes_per_idle_connection,omitzero"`
	// Configured is resident memory before any load.
	Configured int64 `json:"configured_rss_bytes,omitempty"`
	// More is what only this scenario measures.
	More map[string]spread `json:"more,omitempty"`
	// Valid is false where requests failed or the case could not be set up; Problem says why.
	Valid   bool   `json:"valid"`
	Problem string `json:"problem,omitempty"`
}

type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func (w *row) result(o options) result {
	r := result{Scenario: w.scenario.name, Proxy: w.c.proxy, Path: w.c.path, Variant: w.c.variant, Services: w.c.services, Connections: o.connections, Rounds: len(w.samples)}
	of := func(f func(sample) float64) spread { return spreadOf(w.samples, f) }
	r.RPS, r.CPU = of(func(s sample) float64 { return s.rps }), of(func(s sample) float64 { return s.cpuPerRequest })
	r.CPUMedian = r.CPU.Median
	r.P50, r.P99 = of(func(s sample) float64 { return s.p50 }).Median, of(func(s sample) float64 { return s.p99 }).Median
	r.P999 = of(func(s sample) float64 { return s.p999 }).Median
	r.RSS = int64(of(func(s sample) float64 { return float64(s.rss) }).Median)
	r.Redirected = of(func(s sample) float64 { return s.redirected }).Median
	r.Aside = of(func(s sample) float64 { return s.aside }).Median
	r.AsideBytes = of(func(s sample) float64 { return s.asideBytes }).Median
	r.P99Spread = of(func(s sample) float64 { return s.p99 })
	r.Changes = of(func(s sample) float64 { return s.changes }).Median
	r.PerConnection = of(func(s sample) float64 { return s.perConnection })
	r.Configured = int64(of(func(s sample) float64 { return float64(s.configured) }).Median)
	r.CallsMedian = of(sample.callsPerRequest).Median
	r.Allocations = of(func(s sample) float64 { return s.allocations }).Median
	for _, s := range w.samples {
		r.Errors += s.errors
		for name := range s.more {
			if r.More == nil {
				r.More = map[string]spread{}
			}
			r.More[name] = of(func(s sample) float64 { return s.more[name] })
		}
		for name, n := range s.calls {
			if r.Calls == nil {
				r.Calls = map[string]float64{}
			}
			r.Calls[name] += n / float64(len(w.samples))
		}
	}
	r.Valid = len(w.problems) == 0 && r.Errors == 0
	if len(w.problems) > 0 {
		r.Problem = fmt.Sprintf("%d of %d rounds: %s", len(w.problems), len(w.problems)+len(w.samples), w.problems[0])
	}
	return r
}

func spreadOf(samples []sample, f func(sample) float64) spread {
	var values []float64
	for _, s := range samples {
		values = append(values, f(s))
	}
	return spreadOfValues(values)
}

func spreadOfValues(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	slices.Sort(values)
	middle := len(values) / 2
	median := values[middle]
	if len(values)%2 == 0 {
		median = (values[middle-1] + values[middle]) / 2
	}
	return spread{median, values[0], values[len(values)-1]}
}

// column is one of a table. Its cell may compare with no proxy at all in the same scenario and run (nil: not measured).
type column struct {
	title string
	cell  func(x result, direct *result) string
}

// loadColumns are those of closed-loop load.
var loadColumns = []column{
	{"requests/s", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.RPS.Median) }},
	{"(min to max)", func(x result, _ *result) string { return fmt.Sprintf("(%.0f to %.0f)", x.RPS.Min, x.RPS.Max) }},
	{"of direct", func(x result, direct *result) string {
		if direct == nil || direct.RPS.Median == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f", x.RPS.Median/direct.RPS.Median)
	}},
	{"p50 us", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.P50) }},
	{"p99 us", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.P99) }},
	{"p99.9 us", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.P999) }},
	{"proxy CPU us/request", ofProxies(func(x result) string {
		return fmt.Sprintf("%.1f (%.1f to %.1f)", x.CPU.Median, x.CPU.Min, x.CPU.Max)
	})},
	{"syscalls/request", ofProxies(func(x result) string { return fmt.Sprintf("%.2f", x.CallsMedian) })},
	{"allocations/request", func(x result, _ *result) string {
		if !strings.HasPrefix(x.Proxy, "sockmesh") {
			return "-"
		}
		return fmt.Sprintf("%.2f", x.Allocations)
	}},
	{"RSS MiB", ofProxies(func(x result) string { return fmt.Sprintf("%.0f", float64(x.RSS)/(1<<20)) })},
	{"redirected", func(x result, _ *result) string {
		if x.Path != "sockmap" {
			return "-"
		}
		return fmt.Sprintf("%.0f %%", 100*x.Redirected)
	}},
}

// tcpColumns are those of TCP, where connections skip the proxy.
var tcpColumns = append(slices.Clone(loadColumns),
	column{"stepped aside", ofAsides(func(x result) float64 { return x.Aside })},
	column{"of the bytes", ofAsides(func(x result) float64 { return x.AsideBytes })})

func ofAsides(share func(result) float64) func(result, *result) string {
	return func(x result, _ *result) string {
		if !strings.HasPrefix(x.Proxy, "sockmesh") || x.Path != "sockmap" {
			return "-"
		}
		return fmt.Sprintf("%.0f %%", 100*share(x))
	}
}

// ofProxies is a cell that says nothing where there is no proxy.
func ofProxies(cell func(result) string) func(result, *result) string {
	return func(x result, _ *result) string {
		if x.Proxy == "none" {
			return "-"
		}
		return cell(x)
	}
}

// columns of the scenario's table.
func (s scenario) table() []column {
	switch {
	case s.columns != nil:
		return s.columns
	case s.tcp:
		return tcpColumns
	}
	return loadColumns
}

// print writes a table per scenario; ratios are against no proxy at all in the same run.
func (r *report) print(out io.Writer) {
	env := environment()
	fmt.Fprintf(out, "kernel %s, %d cores, %s; %d connections, %d rounds of %s, alternating; medians (min to max); proxies with one worker\n",
		env.Kernel, env.Cores, env.CPU, r.o.connections, r.o.rounds, r.o.duration)
	for rows := r.rows; len(rows) > 0; {
		n := 1
		for n < len(rows) && rows[n].scenario.name == rows[0].scenario.name {
			n++
		}
		r.printScenario(out, rows[:n])
		rows = rows[n:]
	}
	printAims(out, judge(r.results()))
	for _, w := range r.rows {
		if x := w.result(r.o); x.Problem != "" {
			fmt.Fprintf(out, "no result: %s, %s: %s\n", x.Scenario, w.c, x.Problem)
		}
	}
}

func (r *report) printScenario(out io.Writer, rows []*row) {
	s := rows[0].scenario
	fmt.Fprintf(out, "\n%s: %s\n", s.name, s.what)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	defer func() {
		t.Flush()
		if s.summary != nil {
			s.summary(out, rows)
		}
	}()
	variants := slices.ContainsFunc(rows, func(w *row) bool { return w.c.variant != "" })
	line := func(c testCase, cells []string) {
		names := []string{c.proxy, c.path}
		if variants {
			names = append(names, c.variant)
		}
		fmt.Fprintln(t, strings.Join(append(names, cells...), "\t")+"\t")
	}
	var titles []string
	for _, c := range s.table() {
		titles = append(titles, c.title)
	}
	line(testCase{proxy: "proxy", path: "path", variant: "variant"}, titles)
	var direct *result
	for _, w := range rows {
		x := w.result(r.o)
		if x.Proxy == "none" && x.Path == "none" {
			direct = &x
		}
		cells := make([]string, len(titles))
		if x.Valid {
			for i, c := range s.table() {
				cells[i] = c.cell(x, direct)
			}
		} else {
			cells[0], cells[min(1, len(cells)-1)] = "no result", fmt.Sprintf("%d errors", x.Errors)
		}
		line(w.c, cells)
	}
}

func (r *report) results() []result {
	var results []result
	for _, w := range r.rows {
		results = append(results, w.result(r.o))
	}
	return results
}

func (r *report) write(file string) error {
	results := r.results()
	text, err := json.MarshalIndent(map[string]any{
		"environment": environment(), "began": r.began.UTC(), "results": results, "aims": judge(results),
	}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

type env struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Go     string `json:"go"`
}

func environment() env {
	e := env{Cores: runtime.NumCPU(), Go: runtime.Version(), CPU: "unknown CPU"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		e.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				e.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	return e
}
