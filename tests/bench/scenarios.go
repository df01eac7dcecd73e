package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The scenarios, one entry each. A new one needs an entry here and, if it is not plain load, a measure function in a file of
// its own; which proxies it compares, how it measures and what it prints are fields of the entry.

// scenario is one kind of load and what is looked at under it.
type scenario struct {
	name, what string
	// HTTP: path and headers of the request; the server has a body of each size.
	path    string
	headers []string
	// TCP: the client writes size bytes at a time, and reads them back unless it is bulk.
	tcp, bulk bool
	size      int

	// loops of the proxy; 0 is one.
	loops int
	// clusters that the proxy is configured with, and as many routes; 0 is one.
	clusters int
	// dynamic configuration, which changes while load runs if there is churn; sameLoad: see latency.go.
	dynamic, churn, sameLoad bool
	// cases chooses from every proxy on every path, and may make variants of them; nil: all of them.
	cases func(all []testCase) []testCase
	// measure takes one sample; nil: closed-loop load (measure.go).
	measure func(*world, context.Context, scenario, setup) (sample, error)
	// run is the whole scenario where it has nodes of its own; nil: cases, measured in turn, on the node of main.
	run func(ctx context.Context, o options, s scenario, r *report) error
	// columns of the table after proxy and path; nil: those of closed-loop load (report.go).
	columns []column
	// summary prints below the table what compares rows; nil: nothing.
	summary func(out io.Writer, rows []*row)
	// Bounds of long scenarios; 0: as the command line says.
	maxRounds int
	duration  time.Duration
}

// workers is how many threads or processes a proxy gets.
func (s scenario) workers() string { return strconv.Itoa(max(1, s.loops)) }

// bulkCases leaves out what says nothing new about one-way streams, so that four sizes fit into the hour.
var bulkCases = only("none/none", "none/sockmap", "sockmesh/sockmap", "sockmesh/connect", "sockmesh/iptables",
	"envoy/iptables", "haproxy/iptables", "haproxy/sockmap", "nginx/iptables", "floor/iptables", "floor/sockmap")

// mostCases leaves out foreign proxies behind connect() alone: what that does to them, http1-small and http1-close show.
func mostCases(all []testCase) []testCase {
	return slices.DeleteFunc(all, func(c testCase) bool {
		return c.path == "connect" && c.proxy != "none" && !strings.HasPrefix(c.proxy, "sockmesh")
	})
}

// scenarios in the order in which they run: closed-loop load here, the others' entries stand beside how they measure.
var scenarios = slices.Concat(loadScenarios, latencyScenarios, idleScenarios, clusterScenarios, loopScenarios)

var loadScenarios = []scenario{
	{name: "http1-small", what: "HTTP/1.1 keep-alive, 128 bytes", path: "/small"},
	{name: "http1-16k", what: "HTTP/1.1 keep-alive, 16 KiB", path: "/16k", cases: mostCases},
	{name: "http1-1m", what: "HTTP/1.1 keep-alive, 1 MiB", path: "/1m", cases: mostCases},
	{name: "http1-close", what: "HTTP/1.1, a connection per request, 128 bytes", path: "/small", headers: []string{"Connection: close"}},
	{name: "tcp-rr", what: "TCP, 64 bytes there and back", tcp: true, size: 64, cases: mostCases},
	{name: "tcp-bulk-64", what: "TCP, one way, writes of 64 bytes", tcp: true, bulk: true, size: 64, cases: bulkCases},
	{name: "tcp-bulk-1k", what: "TCP, one way, writes of 1 KiB", tcp: true, bulk: true, size: 1 << 10, cases: bulkCases},
	{name: "tcp-bulk-16k", what: "TCP, one way, writes of 16 KiB", tcp: true, bulk: true, size: 16 << 10, cases: bulkCases},
	{name: "tcp-bulk-1m", what: "TCP, one way, writes of 1 MiB", tcp: true, bulk: true, size: 1 << 20, cases: bulkCases},
	{name: "services", what: "a connection per request to one of many Services, 16 at a time", run: runServices, columns: servicesColumns, summary: servicesSummary},
	{name: "scale", what: "one agent among 10,000 Services with 250,000 endpoints", run: runScale, columns: scaleColumns, maxRounds: 2},
}

func scenarioNames() []string {
	var names []string
	for _, s := range scenarios {
		names = append(names, s.name)
	}
	return names
}

func chooseScenarios(list string) ([]scenario, error) {
	if list == "all" {
		return scenarios, nil
	}
	var chosen []scenario
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
		if i < 0 {
			return nil, fmt.Errorf("no scenario %q; there are %s", name, strings.Join(scenarioNames(), ", "))
		}
		chosen = append(chosen, scenarios[i])
	}
	return chosen, nil
}
