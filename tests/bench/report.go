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
		return w.scenario.name == s.name && w.c.proxy == c.proxy && w.c.path == c.path
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
	Scenario    string  `json:"scenario"`
	Proxy       string  `json:"proxy"`
	Path        string  `json:"path"`
	Connections int     `json:"connections"`
	Rounds      int     `json:"rounds"`
	RPS         spread  `json:"rps"`
	P50         float64 `json:"p50_us"`
	P99         float64 `json:"p99_us"`
	P999        float64 `json:"p999_us"`
	CPU         spread  `json:"-"`
	CPUMedian   float64 `json:"cpu_us_per_request"`
	RSS         int64   `json:"rss_bytes"`
	Redirected  float64 `json:"redirected_share"`
	Errors      int64   `json:"errors"`
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
	r := result{Scenario: w.scenario.name, Proxy: w.c.proxy, Path: w.c.path, Connections: o.connections, Rounds: len(w.samples)}
	of := func(f func(sample) float64) spread { return spreadOf(w.samples, f) }
	r.RPS, r.CPU = of(func(s sample) float64 { return s.rps }), of(func(s sample) float64 { return s.cpuPerRequest })
	r.CPUMedian = r.CPU.Median
	r.P50, r.P99 = of(func(s sample) float64 { return s.p50 }).Median, of(func(s sample) float64 { return s.p99 }).Median
	r.P999 = of(func(s sample) float64 { return s.p999 }).Median
	r.RSS = int64(of(func(s sample) float64 { return float64(s.rss) }).Median)
	r.Redirected = of(func(s sample) float64 { return s.redirected }).Median
	for _, s := range w.samples {
		r.Errors += s.errors
	}
	r.Valid = len(w.problems) == 0 && r.Errors == 0
	if len(w.problems) > 0 {
		r.Problem = fmt.Sprintf("%d of %d rounds: %s", len(w.problems), o.rounds, w.problems[0])
	}
	return r
}

func spreadOf(samples []sample, f func(sample) float64) spread {
	if len(samples) == 0 {
		return spread{}
	}
	var values []float64
	for _, s := range samples {
		values = append(values, f(s))
	}
	slices.Sort(values)
	middle := len(values) / 2
	median := values[middle]
	if len(values)%2 == 0 {
		median = (values[middle-1] + values[middle]) / 2
	}
	return spread{median, values[0], values[len(values)-1]}
}

// print writes a table per scenario; ratios are against no proxy at all in the same run.
func (r *report) print(out io.Writer) {
	env := environment()
	fmt.Fprintf(out, "kernel %s, %d cores, %s; %d connections, %d rounds of %s, alternating; medians (min to max); proxies with one worker\n",
		env.Kernel, env.Cores, env.CPU, r.o.connections, r.o.rounds, r.o.duration)
	var last string
	var direct float64
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, w := range r.rows {
		x := w.result(r.o)
		if x.Scenario != last {
			t.Flush()
			fmt.Fprintf(out, "\n%s: %s\n", x.Scenario, w.scenario.what)
			fmt.Fprintln(t, "proxy\tpath\trequests/s\t(min to max)\tof direct\tp50 us\tp99 us\tp99.9 us\tproxy CPU us/request\tRSS MiB\tredirected\t")
			last, direct = x.Scenario, 0
		}
		if x.Proxy == "none" && x.Path == "none" {
			direct = x.RPS.Median
		}
		if !x.Valid {
			fmt.Fprintf(t, "%s\t%s\tno result\t%d errors\t\t\t\t\t\t\t\t\n", x.Proxy, x.Path, x.Errors)
			continue
		}
		ratio := "-"
		if direct > 0 {
			ratio = fmt.Sprintf("%.2f", x.RPS.Median/direct)
		}
		cpu, memory := "-", "-"
		if x.Proxy != "none" {
			cpu, memory = fmt.Sprintf("%.1f (%.1f to %.1f)", x.CPU.Median, x.CPU.Min, x.CPU.Max), fmt.Sprintf("%.0f", float64(x.RSS)/(1<<20))
		}
		redirected := "-"
		if x.Path == "sockmap" {
			redirected = fmt.Sprintf("%.0f %%", 100*x.Redirected)
		}
		fmt.Fprintf(t, "%s\t%s\t%.0f\t(%.0f to %.0f)\t%s\t%.0f\t%.0f\t%.0f\t%s\t%s\t%s\t\n",
			x.Proxy, x.Path, x.RPS.Median, x.RPS.Min, x.RPS.Max, ratio, x.P50, x.P99, x.P999, cpu, memory, redirected)
	}
	t.Flush()
	for _, w := range r.rows {
		if x := w.result(r.o); x.Problem != "" {
			fmt.Fprintf(out, "no result: %s %s by %s: %s\n", x.Scenario, x.Proxy, x.Path, x.Problem)
		}
	}
}

func (r *report) write(file string) error {
	var results []result
	for _, w := range r.rows {
		results = append(results, w.result(r.o))
	}
	text, err := json.MarshalIndent(map[string]any{"environment": environment(), "began": r.began.UTC(), "results": results}, "", "  ")
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
