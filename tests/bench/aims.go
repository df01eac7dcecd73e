package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// The aims of the project, each a figure or a ratio of two that one run measured, judged below the tables: met or missed. An
// aim of which a row was not measured, or is no result, is not judged. A benchmark prints; no aim fails it.

// subject names a row: scenario, proxy, path and, where rows differ by it, variant.
type subject struct{ scenario, proxy, path, variant string }

func (s subject) String() string {
	name := s.scenario + ": " + s.proxy + " by " + s.path
	if s.variant != "" {
		name += ", " + s.variant
	}
	return name
}

func (s subject) matches(x result) bool {
	return s == subject{x.Scenario, x.Proxy, x.Path, x.Variant}
}

// aim is a figure of one row, divided by the same figure of another where there is one.
type aim struct {
	what    string
	figure  func(result) float64
	of      subject
	against subject // none: the figure itself is judged
	want    float64
	atMost  bool // else at least
}

// verdict is how an aim came out, a row of build/bench.json.
type verdict struct {
	Aim      string  `json:"aim"`
	Of       string  `json:"of"`
	Against  string  `json:"against,omitempty"`
	Want     float64 `json:"want"`
	AtMost   bool    `json:"at_most"`
	Measured float64 `json:"measured"`
	Met      bool    `json:"met"`
}

func requestRate(x result) float64   { return x.RPS.Median }
func cpuPerRequest(x result) float64 { return x.CPU.Median }
func calls(x result) float64         { return x.CallsMedian }
func allocations(x result) float64   { return x.Allocations }
func median(x result) float64        { return x.P50 }
func tail(x result) float64          { return x.P99 }
func perIdle(x result) float64       { return x.PerConnection.Median / 1024 }
func configuredRSS(x result) float64 {
	return float64(x.Configured)
}

// aims are those of "as fast as no proxy at all".
func aims() []aim {
	on := func(scenario, proxy, path string) subject {
		return subject{scenario: scenario, proxy: proxy, path: path}
	}
	as := func(s subject, variant string) subject { s.variant = variant; return s }
	ours := on("http1-small", "sockmesh", "sockmap")
	list := []aim{
		{what: "HTTP/1.1 keep-alive, requests/s", figure: requestRate, of: ours, against: on("http1-small", "envoy", "iptables"), want: 5},
		{what: "HTTP/1.1 keep-alive, requests/s", figure: requestRate, of: ours, against: on("http1-small", "haproxy", "iptables"), want: 1.8},
		{what: "HTTP/1.1 keep-alive, requests/s", figure: requestRate, of: ours, against: on("http1-small", "nginx", "iptables"), want: 1.8},
		{what: "HTTP/1.1 keep-alive, requests/s", figure: requestRate, of: ours, against: on("http1-small", "haproxy", "sockmap"), want: 1},
		{what: "HTTP/1.1 keep-alive, requests/s", figure: requestRate, of: ours, against: on("http1-small", "nginx", "sockmap"), want: 1},
		{what: "HTTP/1.1 keep-alive, requests/s", figure: requestRate, of: ours, against: on("http1-small", "none", "none"), want: 0.95},
		{what: "proxy CPU per request", figure: cpuPerRequest, of: ours, against: on("http1-small", "floor", "sockmap"), want: 1, atMost: true},
		{what: "proxy CPU per request", figure: cpuPerRequest, of: on("http1-small", "sockmesh-epoll", "sockmap"), against: on("http1-small", "floor", "sockmap"), want: 1.15, atMost: true},
		{what: "system calls per request", figure: calls, of: ours, want: 3, atMost: true},
		// What the Go runtime and the agent's timers allocate beside the requests is in the figure.
		{what: "allocations per request", figure: allocations, of: ours, want: 0.05, atMost: true},
		{what: "TCP there and back, median latency", figure: median, of: on("tcp-rr", "sockmesh", "sockmap"), against: on("tcp-rr", "none", "none"), want: 0.7, atMost: true},
		{what: "TCP there and back, proxy CPU us", figure: cpuPerRequest, of: on("tcp-rr", "sockmesh", "sockmap"), want: 0.5, atMost: true},
		{what: "TCP one way in 16 KiB, writes/s", figure: requestRate, of: on("tcp-bulk-16k", "sockmesh", "sockmap"), against: on("tcp-bulk-16k", "none", "none"), want: 1},
		{what: "TCP one way in 1 MiB, writes/s", figure: requestRate, of: on("tcp-bulk-1m", "sockmesh", "sockmap"), against: on("tcp-bulk-1m", "none", "none"), want: 1},
		{what: "a connection per request, requests/s", figure: requestRate, of: on("http1-close", "sockmesh", "sockmap"), against: on("http1-close", "haproxy", "iptables"), want: 1.3},
	}
	for _, load := range []string{ownLoad, sameLoad} {
		list = append(list, aim{what: "open loop, p99", figure: tail, of: as(on("latency", "sockmesh", "sockmap"), load),
			against: as(on("latency", "envoy", "iptables"), load), want: 0.5, atMost: true})
	}
	churned := on("churn", "sockmesh", "sockmap")
	return append(list,
		aim{what: "open loop, p99 under churn", figure: tail, of: as(churned, churning), against: as(churned, quiet), want: 1.3, atMost: true},
		aim{what: "KiB per idle connection", figure: perIdle, of: on("idle", "sockmesh", "sockmap"), want: 4, atMost: true},
		aim{what: "memory with 10,000 clusters", figure: configuredRSS, of: on("clusters", "sockmesh", "sockmap"), against: on("clusters", "envoy", "iptables"), want: 0.5, atMost: true},
		aim{what: "two loops, requests/s", figure: requestRate, of: as(on("loops", "sockmesh", "sockmap"), "2 loops"), against: as(on("loops", "sockmesh", "sockmap"), "1 loops"), want: 1.8},
	)
}

// judge returns the aims whose rows were measured.
func judge(results []result) []verdict {
	find := func(s subject) (result, bool) {
		i := slices.IndexFunc(results, func(x result) bool { return s.matches(x) && x.Valid && x.Rounds > 0 })
		if i < 0 {
			return result{}, false
		}
		return results[i], true
	}
	var verdicts []verdict
	for _, a := range aims() {
		x, ok := find(a.of)
		if !ok {
			continue
		}
		v := verdict{Aim: a.what, Of: a.of.String(), Want: a.want, AtMost: a.atMost, Measured: a.figure(x)}
		if a.against != (subject{}) {
			other, ok := find(a.against)
			if !ok || a.figure(other) == 0 {
				continue
			}
			v.Against = a.against.String()
			v.Measured /= a.figure(other)
		}
		v.Met = v.Measured >= v.Want
		if v.AtMost {
			v.Met = v.Measured <= v.Want
		}
		verdicts = append(verdicts, v)
	}
	return verdicts
}

func printAims(out io.Writer, verdicts []verdict) {
	if len(verdicts) == 0 {
		return
	}
	fmt.Fprintln(out, "\naims, of those of which all rows were measured; ratios are of medians")
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\tof\tagainst\twanted\tmeasured\t")
	for _, v := range verdicts {
		bound, outcome := "at least", "missed"
		if v.AtMost {
			bound = "at most"
		}
		if v.Met {
			outcome = "met"
		}
		against := v.Against
		if against == "" {
			against = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s %g\t%.2f, %s\t\n", v.Aim, v.Of, against, bound, v.Want, v.Measured, outcome)
	}
	t.Flush()
}
