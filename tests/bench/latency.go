package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"
)

// Latency at half load: each sample first finds out how much its own proxy can do, by closed-loop load, and then sends half
// as much, open loop. Half of their own differs from proxy to proxy, so a second variant sends everybody the same: half of
// what Envoy behind iptables can do.
//
// Under churn (churn.go) the same is measured while endpoints and routes change. Quiet and churn alternate.

const (
	ownLoad  = "half of its own"
	sameLoad = "half of Envoy's"
	quiet    = "quiet"
	churning = "churn"
)

var latencyScenarios = []scenario{
	{
		name: "latency", what: "open loop at half load, 128 bytes, latency from the time at which a request was due", path: "/small",
		cases: latencyCases, measure: (*world).openLoop, columns: latencyColumns,
	},
	{
		name: "churn", what: "open loop at half of its own load, 128 bytes, quiet and with endpoints and routes changing four times a second", path: "/small",
		cases: churnCases, measure: (*world).openLoop, columns: latencyColumns, duration: 4 * time.Second,
	},
}

var latencyColumns = []column{
	{"rate/s", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.RPS.Median) }},
	{"p50 us", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.P50) }},
	{"p99 us", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.P99) }},
	{"(min to max)", func(x result, _ *result) string {
		return fmt.Sprintf("(%.0f to %.0f)", x.P99Spread.Min, x.P99Spread.Max)
	}},
	{"p99.9 us", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.P999) }},
	{"proxy CPU us/request", ofProxies(func(x result) string { return fmt.Sprintf("%.1f", x.CPU.Median) })},
	{"changes in force", func(x result, _ *result) string {
		if x.Variant != churning {
			return "-"
		}
		return fmt.Sprintf("%.0f", x.Changes)
	}},
}

func latencyCases(all []testCase) []testCase {
	chosen := only("none/none", "none/sockmap", "sockmesh/sockmap", "sockmesh/connect", "sockmesh/iptables", "envoy/iptables",
		"haproxy/iptables", "haproxy/sockmap", "nginx/iptables", "floor/sockmap")(all)
	var cases []testCase
	for _, c := range chosen {
		cases = append(cases, c.as(ownLoad, func(*scenario) {}))
	}
	// Envoy first: what half of its load is must be measured while nobody else's hooks are in its way.
	same := slices.Concat(only("envoy/iptables")(slices.Clone(chosen)), only("sockmesh/sockmap", "haproxy/iptables", "nginx/iptables")(chosen))
	for _, c := range same {
		cases = append(cases, c.as(sameLoad, func(s *scenario) { s.sameLoad = true }))
	}
	return cases
}

// openLoop measures latency at half of the load that the proxy can take.
func (w *world) openLoop(ctx context.Context, s scenario, set setup) (sample, error) {
	warm, err := w.warmUp(ctx, s, set)
	if err != nil {
		return sample{}, err
	}
	rate := warm.rps / 2
	if s.sameLoad {
		if set.proxy != nil && set.proxy.Name() == "envoy" {
			w.envoyHalf = rate
		}
		if rate = w.envoyHalf; rate == 0 {
			return sample{}, errors.New("what half of Envoy's load is has not been measured before")
		}
	}
	if rate < 1 {
		return sample{}, errors.New("not one request was answered in the warm-up")
	}
	load := func() (sample, error) { return w.openLoad(ctx, s, set, rate) }
	if s.churn {
		load = w.underChurn(ctx, s, set, load)
	}
	return w.underway(ctx, s, set, warm, load)
}

// openLoad runs the open-loop client in the client pod.
func (w *world) openLoad(ctx context.Context, s scenario, set setup, rate float64) (sample, error) {
	self, err := os.Executable()
	if err != nil {
		return sample{}, err
	}
	return w.run(ctx, []string{self, "open-loop", "-addr", set.target.String(), "-path", s.path, "-c", strconv.Itoa(w.o.connections),
		"-rate", strconv.FormatFloat(rate, 'f', 3, 64), "-d", w.duration(s).String()})
}
