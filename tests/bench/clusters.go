package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Ten thousand clusters and ten thousand routes: a thousand virtual hosts with ten prefixes each, every route to a cluster of
// its own with one endpoint, the server. Load goes to a hundred of them, as a node's pods call few of what a mesh has. What
// is looked at is resident memory once the configuration is in force, and after load.

const (
	manyClusters    = 10000
	routesPerHost   = 10
	clustersInUse   = 100
	clusterTemplate = "cluster-%d"
)

var clusterScenarios = []scenario{{
	name: "clusters", what: fmt.Sprintf("%d clusters and as many routes, load on %d of them, 128 bytes", manyClusters, clustersInUse),
	clusters: manyClusters, cases: only("sockmesh/sockmap", "sockmesh/iptables", "envoy/iptables"),
	measure: (*world).manyClusters, columns: clusterColumns, maxRounds: 3,
}}

var clusterColumns = append([]column{
	{"RSS MiB configured", func(x result, _ *result) string { return fmt.Sprintf("%.0f", float64(x.Configured)/(1<<20)) }},
	{"after load", func(x result, _ *result) string { return fmt.Sprintf("%.0f", float64(x.RSS)/(1<<20)) }},
}, loadColumns[:7]...)

func (w *world) manyClusters(ctx context.Context, s scenario, set setup) (sample, error) {
	configured, err := settledRSS(ctx, set)
	if err != nil {
		return sample{}, err
	}
	result, err := w.closedLoop(ctx, s, set)
	result.configured = configured
	if err == nil {
		result.rss, err = settledRSS(ctx, set)
	}
	return result, err
}

// call is what a request is addressed to.
type call struct{ host, path string }

// calls that the client makes in turn: to clusters all over the configuration. None where there is one cluster.
func (s scenario) calls() []call {
	var calls []call
	for i := 0; i < s.clusters; i += manyClusters/clustersInUse + 1 {
		calls = append(calls, call{hostOf(i / routesPerHost), prefixOf(i%routesPerHost) + "x"})
	}
	return calls
}

func hostOf(i int) string   { return fmt.Sprintf("service-%d.shop", i) }
func prefixOf(i int) string { return fmt.Sprintf("/r%d/", i) }

// virtualHosts are those of a route configuration, as YAML: JSON is YAML, and much faster to read.
func (s scenario) virtualHosts() string {
	if s.clusters == 0 {
		return `[{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "server"}}]}]`
	}
	var hosts []string
	for h := range s.clusters / routesPerHost {
		var routes []string
		for r := range routesPerHost {
			routes = append(routes, fmt.Sprintf(`{"match": {"prefix": %q}, "route": {"cluster": %q}}`, prefixOf(r), fmt.Sprintf(clusterTemplate, h*routesPerHost+r)))
		}
		hosts = append(hosts, fmt.Sprintf(`{"name": %q, "domains": [%q], "routes": [%s]}`, hostOf(h), hostOf(h), strings.Join(routes, ", ")))
	}
	return "[" + strings.Join(hosts, ",\n") + "]"
}

// clusterNames are all of the configuration.
func (s scenario) clusterNames() []string {
	if s.clusters == 0 {
		return []string{"server"}
	}
	names := make([]string, s.clusters)
	for i := range names {
		names[i] = fmt.Sprintf(clusterTemplate, i)
	}
	return names
}

// resources are the scenario's clusters, endpoints and routes as a control plane serves them.
func (s scenario) resources(server netip.AddrPort) []lab.Resource {
	var all []lab.Resource
	for _, name := range s.clusterNames() {
		all = append(all, lab.Cluster(name).WithoutLimits())
		if !s.dynamic {
			all = append(all, lab.Endpoints(name, server))
		}
	}
	if !s.dynamic {
		all = append(all, lab.RoutesOf("bench", s.virtualHosts()))
	}
	return all
}
