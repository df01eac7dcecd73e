package mesh

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

func parse[M proto.Message](t testing.TB, text string, m M) M {
	t.Helper()
	data, err := yaml.YAMLToJSONStrict([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := protojson.Unmarshal(data, m); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return m
}

func listener(t testing.TB, text string) *Listener {
	t.Helper()
	l, _, err := CompileListener(parse(t, text, &listenerv3.Listener{}), "1")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func cluster(t testing.TB, text string) *Cluster {
	t.Helper()
	c, _, err := CompileCluster(parse(t, text, &clusterv3.Cluster{}), "1")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func routes(t testing.TB, text string) *RouteConfig {
	t.Helper()
	rc, _, err := CompileRouteConfig(parse(t, text, &routev3.RouteConfiguration{}), "1")
	if err != nil {
		t.Fatal(err)
	}
	return rc
}

func endpoints(t testing.TB, text string) *Endpoints {
	t.Helper()
	e, _, err := CompileEndpoints(parse(t, text, &endpointv3.ClusterLoadAssignment{}), "1")
	if err != nil {
		t.Fatal(err)
	}
	return e
}

const routerFilter = `[{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]`

// httpListener is a listener whose connection manager has the given fields besides its routes.
func httpListener(extra string) string {
	return `
name: l
address: {socket_address: {address: 10.96.0.10, port_value: 80}}
bind_to_port: false
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: x
      rds: {route_config_name: r, config_source: {ads: {}}}
` + extra
}

const filters = "      http_filters: " + routerFilter + "\n"

func tcpListener(name, address, extra, tcp string) string {
	return `
name: ` + name + `
address: {socket_address: {address: "` + address + `", port_value: 80}}
bind_to_port: false
` + extra + `
filter_chains:
- filters:
  - name: tcp
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
      stat_prefix: x
` + tcp
}

func TestConnectionManagerDefaultsAreEnvoys(t *testing.T) {
	h := listener(t, httpListener(filters)).Chains[0].HTTP
	h.place = ""
	want := &HTTPConnectionManager{
		StatPrefix: "x", RouteConfigName: "r", ServerName: "envoy", GenerateRequestID: true, AllowAbsoluteURL: true,
		Upgrades: map[string]bool{}, MaxRequestHeadersBytes: 60 << 10, MaxHeadersCount: 100, IdleTimeout: time.Hour,
		StreamIdleTimeout: 5 * time.Minute, DrainTimeout: 5 * time.Second, DelayedCloseTimeout: time.Second,
	}
	if !reflect.DeepEqual(h, want) {
		t.Errorf("got  %+v\nwant %+v", h, want)
	}
}

func TestClusterDefaultsAreEnvoys(t *testing.T) {
	c := cluster(t, `{name: c, type: STATIC}`)
	limits := Limits{1024, 1024, 1024, 3}
	want := &Cluster{
		Name: "c", StatName: "c", Version: "1", ChoiceCount: 2, Overprovisioning: 140, PanicThreshold: 50,
		ConnectTimeout: 5 * time.Second, BufferLimit: 1 << 20, Limits: [2]Limits{limits, limits}, IdleTimeout: time.Hour,
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestRouteActionCompiles(t *testing.T) {
	rc := routes(t, `
name: r
virtual_hosts:
- name: v
  domains: ["*"]
  retry_policy: {retry_on: "5xx,connect-failure,unavailable", num_retries: 2}
  routes:
  - match: {prefix: /a}
    route:
      weighted_clusters: {clusters: [{name: v1, weight: 90}, {name: v2, weight: 10}]}
      regex_rewrite: {pattern: {regex: "^/a/(.*)$"}, substitution: "/b$/\\1"}
      timeout: 0s
  - match: {safe_regex: {regex: "/b|/c"}}
    redirect: {https_redirect: true, response_code: PERMANENT_REDIRECT}
  - match: {prefix: /}
    direct_response: {status: 418, body: {inline_string: tea}}
`)
	a := rc.Hosts[0].Routes[0].Action
	if a.Timeout != 0 || a.TotalWeight != 100 || a.ClusterNotFoundCode != 503 || a.Retry.Retries != 2 ||
		a.Retry.On != Retry5xx|RetryConnectFailure || a.Retry.BackOffBase != 25*time.Millisecond || a.Retry.BackOffMax != 250*time.Millisecond {
		t.Errorf("action %+v, retry %+v", a, a.Retry)
	}
	if got := a.RegexRewrite.Regex.ReplaceAllString("/a/x", a.RegexRewrite.Substitution); got != "/b$/x" {
		t.Errorf("rewritten to %q", got)
	}
	for path, want := range map[string]int{"/a/x": 0, "/c": 1, "/cc": 2, "/b?x": 1} {
		if got := rc.Match(&request{path: path}); got == nil || got.Index != want {
			t.Errorf("%s: %+v", path, got)
		}
	}
}

func TestRefusalsNameTheField(t *testing.T) {
	refused := func(m proto.Message) error {
		var err error
		switch m := m.(type) {
		case *listenerv3.Listener:
			_, _, err = CompileListener(m, "")
		case *clusterv3.Cluster:
			_, _, err = CompileCluster(m, "")
		case *routev3.RouteConfiguration:
			_, _, err = CompileRouteConfig(m, "")
		case *endpointv3.ClusterLoadAssignment:
			_, _, err = CompileEndpoints(m, "")
		}
		return err
	}
	const hcm = "filter_chains[0].filters[0].typed_config."
	host := func(route string) string {
		return "{name: r, virtual_hosts: [{name: v, domains: [\"*\"], routes: [" + route + "]}]}"
	}
	tests := []struct {
		name    string
		message proto.Message
		text    string
		want    string
	}{
		{"TLS", &listenerv3.Listener{}, httpListener(filters + "  transport_socket: {name: tls, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext}}\n"), "filter_chains[0].transport_socket: "},
		{"unknown HTTP filter", &listenerv3.Listener{}, httpListener("      http_filters: [{name: auth, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz}}, " + routerFilter[1:] + "\n"), hcm + `http_filters[0].typed_config: HTTP filter "auth"`},
		{"no router", &listenerv3.Listener{}, httpListener(""), hcm + "http_filters: no envoy.filters.http.router"},
		{"HTTP/2 codec", &listenerv3.Listener{}, httpListener(filters + "      codec_type: HTTP2\n"), hcm + "codec_type: "},
		{"unsupported field", &listenerv3.Listener{}, httpListener(filters + "      local_reply_config: {}\n"), hcm + "local_reply_config: "},
		{"validation inside Any", &listenerv3.Listener{}, httpListener(filters + "      stream_idle_timeout: -1s\n"), hcm + "stream_idle_timeout: "},
		{"validation rule", &clusterv3.Cluster{}, `{name: c, type: STATIC, connect_timeout: 0s}`, "connect_timeout: "},
		{"UDP listener", &listenerv3.Listener{}, `{name: l, address: {socket_address: {protocol: UDP, address: "::", port_value: 1}}}`, "address.socket_address.protocol: "},
		{"host name as listener address", &listenerv3.Listener{}, `{name: l, address: {socket_address: {address: host, port_value: 1}}}`, "address.socket_address.address: "},
		{"INBOUND", &listenerv3.Listener{}, tcpListener("l", "10.0.0.1", "traffic_direction: INBOUND", "      cluster: c"), "traffic_direction: INBOUND"},
		{"HTTP/2 upstream", &clusterv3.Cluster{}, `{name: c, type: STATIC, typed_extension_protocol_options: {x: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}}`, "typed_extension_protocol_options[x].explicit_http_config.http2_protocol_options: "},
		{"ring hash", &clusterv3.Cluster{}, `{name: c, type: STATIC, lb_policy: RING_HASH}`, "lb_policy: "},
		{"unknown typed policy", &clusterv3.Cluster{}, `{name: c, type: STATIC, load_balancing_policy: {policies: [{typed_extension_config: {name: m, typed_config: {"@type": type.googleapis.com/envoy.extensions.load_balancing_policies.maglev.v3.Maglev}}}]}}`, "load_balancing_policy.policies: "},
		{"name in EDS", &endpointv3.ClusterLoadAssignment{}, `{cluster_name: c, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: example.com, port_value: 80}}}}]}]}`, "endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address: "},
		{"gap in priorities", &endpointv3.ClusterLoadAssignment{}, `{cluster_name: c, endpoints: [{priority: 1}]}`, "endpoints: priorities"},
		{"bad regex", &routev3.RouteConfiguration{}, host(`{match: {safe_regex: {regex: "("}}, route: {cluster: c}}`), "virtual_hosts[0].routes[0].match.safe_regex.regex: "},
		{"regex that breaks out", &routev3.RouteConfiguration{}, host(`{match: {safe_regex: {regex: "a)|(b"}}, route: {cluster: c}}`), "match.safe_regex.regex: "},
		{"back reference", &routev3.RouteConfiguration{}, host(`{match: {prefix: /}, route: {cluster: c, regex_rewrite: {pattern: {regex: a}, substitution: "\\1"}}}`), "route.regex_rewrite.substitution: "},
		{"pseudo header", &routev3.RouteConfiguration{}, host(`{match: {prefix: /}, route: {cluster: c}, request_headers_to_add: [{header: {key: ":path", value: x}}]}`), "routes[0].request_headers_to_add[0].header.key: "},
		{"mirror", &routev3.RouteConfiguration{}, host(`{match: {prefix: /}, route: {cluster: c, request_mirror_policies: [{cluster: d}]}}`), "routes[0].route.request_mirror_policies: "},
		{"filter switched on per route", &routev3.RouteConfiguration{}, host(`{match: {prefix: /}, route: {cluster: c}, typed_per_filter_config: {auth: {"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, config: {}}}}`), "typed_per_filter_config[auth]: "},
		{"duplicate domain", &routev3.RouteConfiguration{}, `{name: r, virtual_hosts: [{name: a, domains: [x]}, {name: b, domains: [X]}]}`, "virtual_hosts[1].domains[0]: "},
		{"weights of zero", &routev3.RouteConfiguration{}, host(`{match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: c, weight: 0}]}}}`), "route.weighted_clusters: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := refused(parse(t, tt.text, tt.message))
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestHarmlessFieldsAreReportedOnceAndWithoutIndices(t *testing.T) {
	_, warnings, err := CompileRouteConfig(parse(t, `
name: r
virtual_hosts:
- name: v
  domains: ["*"]
  routes:
  - {match: {prefix: /a}, route: {cluster: c}, metadata: {}, stat_prefix: a}
  - {match: {prefix: /b}, route: {cluster: c}, metadata: {}}
`, &routev3.RouteConfiguration{}), "")
	want := []Warning{{"route", "r", "virtual_hosts.routes.metadata"}, {"route", "r", "virtual_hosts.routes.stat_prefix"}}
	if err != nil || !slices.Equal(warnings, want) {
		t.Errorf("%v, %v", warnings, err)
	}
}

func TestOptionalAndDisabledFiltersAreSkippedAndReported(t *testing.T) {
	_, warnings, err := CompileListener(parse(t, httpListener(`      http_filters:
      - {name: opt, is_optional: true, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz}}
      - {name: aside, disabled: true, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua}}
      - `+routerFilter[1:len(routerFilter)-1]), &listenerv3.Listener{}), "")
	if err != nil || len(warnings) != 2 || !strings.HasSuffix(warnings[1].Field, "http_filters[opt]") {
		t.Errorf("%v, %v", warnings, err)
	}
}

func TestAnAccessLogThatCannotBeWrittenDoesNotRefuseTheListener(t *testing.T) {
	l, warnings, err := CompileListener(parse(t, httpListener(filters+`
access_log:
- name: als
  typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig, common_config: {log_name: x, grpc_service: {envoy_grpc: {cluster_name: als}}}}
- name: file
  filter: {and_filter: {filters: [{status_code_filter: {comparison: {op: GE, value: {default_value: 500, runtime_key: k}}}}, {response_flag_filter: {}}]}}
  typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/stdout}
`), &listenerv3.Listener{}), "")
	if err != nil || len(l.AccessLog) != 1 || len(warnings) != 2 || !strings.HasPrefix(warnings[1].Field, "access_log: als") {
		t.Fatalf("%v, %v", warnings, err)
	}
	log := l.AccessLog[0]
	if log.Format != DefaultAccessLogFormat || log.Filter.And[0].StatusCode.Value != 500 || log.Filter.And[1].ResponseFlags == nil {
		t.Errorf("%+v", log)
	}
}

func TestTypedClusterTypeAndPolicyEqualTheEnums(t *testing.T) {
	enums := cluster(t, `{name: c, type: STRICT_DNS, lb_policy: LEAST_REQUEST, dns_lookup_family: V4_ONLY, dns_refresh_rate: 9s, common_lb_config: {locality_weighted_lb_config: {}},
 load_assignment: {cluster_name: c, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: example.com, port_value: 80}}}}]}]}}`)
	typed := cluster(t, `{name: c, cluster_type: {name: envoy.clusters.dns, typed_config: {"@type": type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster, dns_lookup_family: V4_ONLY, dns_refresh_rate: 9s}},
 load_balancing_policy: {policies: [{typed_extension_config: {name: x, typed_config: {"@type": type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest, locality_lb_config: {locality_weighted_lb_config: {}}}}}]},
 load_assignment: {cluster_name: c, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: example.com, port_value: 80}}}}]}]}}`)
	if !reflect.DeepEqual(enums, typed) {
		t.Errorf("enums %+v\ntyped %+v", enums, typed)
	}
	resolved := typed.WithAddresses(func(host string) []netip.Addr {
		return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}
	})
	if len(resolved.Endpoints) != 2 || resolved.Localities[0].N != 2 || resolved.Endpoints[1].Hostname != "example.com" || resolved.Endpoints[1].Addr.Port() != 80 {
		t.Errorf("%+v", resolved)
	}
}

func TestOriginalDestinationClusterNeedsNoEndpoints(t *testing.T) {
	c := cluster(t, `{name: c, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED}`)
	if c.Discovery != OriginalDst || c.Policy != ClusterProvided {
		t.Errorf("%+v", c)
	}
}

func FuzzCompile(f *testing.F) {
	f.Add(httpListener(filters))
	f.Add(tcpListener("l", "10.0.0.1", "", "      cluster: c"))
	f.Add(`{name: r, virtual_hosts: [{name: v, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: c}}]}]}`)
	f.Add(`{name: c, type: STRICT_DNS, load_assignment: {cluster_name: c, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: example.com, port_value: 80}}}}]}]}}`)
	f.Fuzz(func(_ *testing.T, text string) {
		data, err := yaml.YAMLToJSONStrict([]byte(text))
		if err != nil {
			return
		}
		lenient := protojson.UnmarshalOptions{DiscardUnknown: true, AllowPartial: true}
		if m := (&listenerv3.Listener{}); lenient.Unmarshal(data, m) == nil {
			if l, _, err := CompileListener(m, ""); err == nil {
				b := NewBuilder()
				b.SetListener(l)
				s, _, _ := b.Build(time.Now())
				s.Claims()
				l.Chain(&ChainInput{})
			}
		}
		if m := (&clusterv3.Cluster{}); lenient.Unmarshal(data, m) == nil {
			_, _, _ = CompileCluster(m, "")
		}
		if m := (&endpointv3.ClusterLoadAssignment{}); lenient.Unmarshal(data, m) == nil {
			_, _, _ = CompileEndpoints(m, "")
		}
		if m := (&routev3.RouteConfiguration{}); lenient.Unmarshal(data, m) == nil {
			if rc, _, err := CompileRouteConfig(m, ""); err == nil {
				rc.Match(&request{authority: "a", path: "/"})
			}
		}
	})
}
