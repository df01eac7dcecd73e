package lab

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
)

// Resource is an xDS resource as it stands in sockmesh-control's folder: the JSON form with its @type.
type Resource map[string]any

type object = map[string]any
type list = []any

const typeURL = "type.googleapis.com/envoy."

// WriteXDS puts resources into the control plane's folder as NAME.yaml, in one step.
func (l *Lab) WriteXDS(name string, resources ...Resource) error {
	documents := make([]any, len(resources))
	for i, r := range resources {
		documents[i] = r
	}
	return l.write("xds", name, documents...)
}

// RemoveXDS deletes NAME.yaml.
func (l *Lab) RemoveXDS(name string) error {
	return os.Remove(filepath.Join(l.Dir, "xds", name+".yaml"))
}

// HTTPListener claims connections to the addresses and routes their requests by the route configuration of that name.
func HTTPListener(name, routes string, addrs ...netip.AddrPort) Resource {
	return listener(name, addrs, object{
		"name": "envoy.filters.network.http_connection_manager",
		"typed_config": object{
			"@type":           typeURL + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
			"stat_prefix":     name,
			"rds":             object{"route_config_name": routes, "config_source": adsSource()},
			"upgrade_configs": list{object{"upgrade_type": "websocket"}},
			"http_filters": list{object{
				"name":         "envoy.filters.http.router",
				"typed_config": object{"@type": typeURL + "extensions.filters.http.router.v3.Router"},
			}},
		},
	})
}

// WithoutRequestIDs keeps an HTTPListener from making x-request-id, as benchmarks of proxies do.
func (r Resource) WithoutRequestIDs() Resource {
	chain := r["filter_chains"].(list)[0].(object)
	filter := chain["filters"].(list)[0].(object)
	filter["typed_config"].(object)["generate_request_id"] = false
	return r
}

// TCPListener claims connections to the addresses and splits them over clusters by weight. Without more it can be
// offloaded to the kernel; accessLog, a file to log to, keeps it in the proxy.
func TCPListener(name string, weights []Weight, accessLog string, addrs ...netip.AddrPort) Resource {
	var clusters list
	for _, w := range weights {
		clusters = append(clusters, object{"name": w.Cluster, "weight": w.Weight})
	}
	config := object{
		"@type":             typeURL + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
		"stat_prefix":       name,
		"weighted_clusters": object{"clusters": clusters},
	}
	if accessLog != "" {
		config["access_log"] = list{object{
			"name":         "envoy.access_loggers.file",
			"typed_config": object{"@type": typeURL + "extensions.access_loggers.file.v3.FileAccessLog", "path": accessLog},
		}}
	}
	return listener(name, addrs, object{"name": "envoy.filters.network.tcp_proxy", "typed_config": config})
}

func listener(name string, addrs []netip.AddrPort, filter object) Resource {
	l := Resource{
		"@type": typeURL + "config.listener.v3.Listener", "name": name,
		"bind_to_port": false, "traffic_direction": "OUTBOUND",
		"address":       socketAddress(addrs[0]),
		"filter_chains": list{object{"filters": list{filter}}},
	}
	var more list
	for _, a := range addrs[1:] {
		more = append(more, object{"address": socketAddress(a)})
	}
	if more != nil {
		l["additional_addresses"] = more
	}
	return l
}

// Weight is a cluster's share.
type Weight struct {
	Cluster string
	Weight  int
}

// Route is one rule of Routes: the first whose header matches (or that asks for none) wins.
type Route struct {
	// Header and Value: an exact match; empty for any request.
	Header, Value string
	// Retry asks for two retries on connect failures, resets and 5xx.
	Retry    bool
	Clusters []Weight
}

// Routes is a route configuration with one virtual host for every domain.
func Routes(name string, routes ...Route) Resource {
	var rules list
	for _, r := range routes {
		match := object{"prefix": "/"}
		if r.Header != "" {
			match["headers"] = list{object{"name": r.Header, "string_match": object{"exact": r.Value}}}
		}
		action := object{}
		if len(r.Clusters) == 1 {
			action["cluster"] = r.Clusters[0].Cluster
		} else {
			var clusters list
			for _, w := range r.Clusters {
				clusters = append(clusters, object{"name": w.Cluster, "weight": w.Weight})
			}
			action["weighted_clusters"] = object{"clusters": clusters}
		}
		if r.Retry {
			action["retry_policy"] = object{"retry_on": "connect-failure,reset,refused-stream,5xx", "num_retries": 2}
		}
		rules = append(rules, object{"match": match, "route": action})
	}
	return Resource{
		"@type": typeURL + "config.route.v3.RouteConfiguration", "name": name,
		"virtual_hosts": list{object{"name": "all", "domains": list{"*"}, "routes": rules}},
	}
}

// RoutesOf is a route configuration with the virtual hosts that are given as JSON.
func RoutesOf(name, virtualHosts string) Resource {
	return Resource{
		"@type": typeURL + "config.route.v3.RouteConfiguration", "name": name, "virtual_hosts": json.RawMessage(virtualHosts),
	}
}

// Cluster takes its endpoints over EDS, with Envoy's default limits.
func Cluster(name string) Resource {
	return Resource{
		"@type": typeURL + "config.cluster.v3.Cluster", "name": name,
		"type": "EDS", "connect_timeout": "5s",
		"eds_cluster_config": object{"eds_config": adsSource()},
	}
}

// WithoutLimits lifts a cluster's circuit breakers so high that nothing runs into them. A limit is counted by the proxy,
// so it keeps TCP listeners over the cluster out of the kernel.
func (r Resource) WithoutLimits() Resource {
	r["circuit_breakers"] = object{"thresholds": list{object{
		"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000, "max_retries": 1000,
	}}}
	return r
}

// WithIdleTimeout closes pooled connections of a cluster that have had nothing to do for so long ("1s").
func (r Resource) WithIdleTimeout(d string) Resource {
	r["typed_extension_protocol_options"] = object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
		"@type":                        typeURL + "extensions.upstreams.http.v3.HttpProtocolOptions",
		"common_http_protocol_options": object{"idle_timeout": d},
		"explicit_http_config":         object{"http_protocol_options": object{}},
	}}
	return r
}

// Endpoints of a cluster, in one locality.
func Endpoints(cluster string, addrs ...netip.AddrPort) Resource {
	endpoints := list{}
	for _, a := range addrs {
		endpoints = append(endpoints, object{"endpoint": object{"address": socketAddress(a)}})
	}
	return Resource{
		"@type": typeURL + "config.endpoint.v3.ClusterLoadAssignment", "cluster_name": cluster,
		"endpoints": list{object{"lb_endpoints": endpoints}},
	}
}

func socketAddress(a netip.AddrPort) object {
	return object{"socket_address": object{"address": a.Addr().String(), "port_value": int(a.Port())}}
}

func adsSource() object { return object{"ads": object{}, "resource_api_version": "V3"} }
