package mesh

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

const edsCluster = `{name: %, type: EDS, eds_cluster_config: {eds_config: {ads: {}}}}`

func eds(t testing.TB, name string) *Cluster {
	t.Helper()
	return cluster(t, strings.ReplaceAll(edsCluster, "%", name))
}

func loadAssignment(t testing.TB, name, ip string) *Endpoints {
	t.Helper()
	return endpoints(t, `{cluster_name: `+name+`, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: `+ip+`, port_value: 80}}}}]}]}`)
}

func routeTo(t testing.TB, cluster string) *RouteConfig {
	t.Helper()
	return routes(t, `{name: r, virtual_hosts: [{name: v, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: `+cluster+`}}]}]}`)
}

var epoch = time.Unix(1_000_000, 0)

func build(b *Builder) *Snapshot {
	s, _, _ := b.Build(epoch)
	return s
}

func target(s *Snapshot) string {
	l := s.Listener("l")
	if l == nil || l.Chains[0].HTTP.Routes == nil || len(l.Chains[0].HTTP.Routes.Hosts) == 0 {
		return ""
	}
	return l.Chains[0].HTTP.Routes.Hosts[0].Routes[0].Action.Clusters[0].Name
}

func TestAClusterWarmsUntilItsEndpointsAndAListenerUntilItsRoutes(t *testing.T) {
	b := NewBuilder()
	b.SetListener(listener(t, httpListener(filters)))
	b.SetCluster(eds(t, "a"))
	if s := build(b); len(s.Listeners) != 0 || len(s.Clusters) != 0 {
		t.Fatalf("nothing is warm, but: %+v", s)
	}
	b.SetRoutes(routeTo(t, "a"))
	if s := build(b); len(s.Listeners) != 0 {
		t.Fatal("the listener's routes name a cluster that is not warm")
	}
	if w := b.Warming(); w["cluster a"] != "endpoints a" || w["route r"] != "cluster a" {
		t.Errorf("warming: %v", w)
	}
	b.SetEndpoints(loadAssignment(t, "a", "192.0.2.1"))
	if s := build(b); target(s) != "a" || s.Clusters["a"].Endpoints[0].Addr.Addr().String() != "192.0.2.1" {
		t.Errorf("all is here, but: %+v", s)
	}
	if len(b.Warming()) != 0 {
		t.Errorf("warming: %v", b.Warming())
	}
}

func TestTimeOutsEndTheWarming(t *testing.T) {
	b := NewBuilder()
	b.SetListener(listener(t, httpListener(filters)))
	b.SetCluster(eds(t, "a"))
	build(b)
	b.EndpointsTimedOut("a")
	b.RoutesTimedOut("r")
	s := build(b)
	if s.Clusters["a"] == nil || s.Listener("l") == nil || s.Listener("l").Chains[0].HTTP.Routes.Match(&request{path: "/"}) != nil {
		t.Errorf("%+v", s)
	}
}

func TestMakeBeforeBreak(t *testing.T) {
	b := NewBuilder()
	b.SetListener(listener(t, httpListener(filters)))
	b.SetCluster(eds(t, "old"))
	b.SetEndpoints(loadAssignment(t, "old", "192.0.2.1"))
	b.SetRoutes(routeTo(t, "old"))
	before := build(b)
	b.SetCluster(eds(t, "new"))
	b.SetRoutes(routeTo(t, "new"))
	b.DeleteCluster("old", epoch)
	s := build(b)
	if target(s) != "old" || s.Clusters["old"] == nil || s.Clusters["old"] != before.Clusters["old"] {
		t.Fatalf("the old route and cluster must stay until the new ones are warm: %s, %v", target(s), s.Clusters)
	}
	b.SetEndpoints(loadAssignment(t, "new", "192.0.2.2"))
	if s = build(b); target(s) != "new" || s.Clusters["new"] == nil || s.Clusters["old"] != nil {
		t.Errorf("%s, %v", target(s), s.Clusters)
	}
	manager := before.Listener("l").Chains[0].HTTP
	if rc := s.Routes(manager); rc.Hosts[0].Routes[0].Action.Clusters[0].Name != "new" {
		t.Error("a connection of the old snapshot does not see the new routes")
	}
}

func TestARemovedClusterLingersOnlySoLong(t *testing.T) {
	b := NewBuilder()
	b.SetListener(listener(t, httpListener(filters)))
	b.SetCluster(eds(t, "a"))
	b.SetEndpoints(loadAssignment(t, "a", "192.0.2.1"))
	b.SetRoutes(routeTo(t, "a"))
	build(b)
	b.DeleteCluster("a", epoch)
	s, _, next := b.Build(epoch)
	if s.Clusters["a"] == nil || !next.Equal(epoch.Add(linger)) {
		t.Fatalf("%v, next %v", s.Clusters, next)
	}
	if s, _, _ = b.Build(next); s.Clusters["a"] != nil {
		t.Error("still there")
	}
}

func TestRoutesWaitAMomentForAClusterThatWasNotSent(t *testing.T) {
	b := NewBuilder()
	b.SetListener(listener(t, httpListener(filters)))
	b.SetRoutes(routeTo(t, "unknown"))
	s, _, next := b.Build(epoch)
	if target(s) != "" || !next.Equal(epoch.Add(grace)) {
		t.Fatalf("%q, next %v", target(s), next)
	}
	if s, _, _ = b.Build(next); target(s) != "unknown" {
		t.Error("the control plane never sent the cluster: the route has to come into force (NC)")
	}
}

func TestUnchangedValuesKeepTheirPointers(t *testing.T) {
	b := NewBuilder()
	b.SetListener(listener(t, httpListener(filters)))
	b.SetListener(listener(t, tcpListener("tcp", "10.96.0.11", "", "      cluster: b")))
	for _, name := range []string{"a", "b"} {
		b.SetCluster(eds(t, name))
		b.SetEndpoints(loadAssignment(t, name, "192.0.2.1"))
	}
	b.SetRoutes(routeTo(t, "a"))
	first := build(b)
	if again, changed, _ := b.Build(epoch); changed || again != first {
		t.Error("nothing changed, but there is a new snapshot")
	}
	b.SetEndpoints(loadAssignment(t, "a", "192.0.2.9"))
	second := build(b)
	if second.Clusters["a"] == first.Clusters["a"] || second.Clusters["b"] != first.Clusters["b"] ||
		second.Listener("l") != first.Listener("l") || second.Listener("tcp") != first.Listener("tcp") {
		t.Error("only cluster a may have a new pointer")
	}
	if second.Generation != first.Generation+1 {
		t.Errorf("generations %d, %d", first.Generation, second.Generation)
	}
}

func TestDNSClusterWarmsUntilEveryNameIsAnswered(t *testing.T) {
	b := NewBuilder()
	b.SetCluster(cluster(t, `{name: c, type: STRICT_DNS, load_assignment: {cluster_name: c, endpoints: [{lb_endpoints: [
 {endpoint: {address: {socket_address: {address: a.example, port_value: 80}}}},
 {endpoint: {address: {socket_address: {address: 192.0.2.7, port_value: 81}}}},
 {endpoint: {address: {socket_address: {address: b.example, port_value: 82}}}}]}]}}`))
	b.SetAddresses(DNSKey{"a.example", DNSAuto}, []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")})
	if s := build(b); len(s.Clusters) != 0 {
		t.Fatal("b.example is not answered yet")
	}
	b.SetAddresses(DNSKey{"b.example", DNSAuto}, nil)
	if s := build(b); len(s.Clusters["c"].Endpoints) != 3 || s.Clusters["c"].Endpoints[2].Addr.String() != "192.0.2.7:81" {
		t.Errorf("%+v", s.Clusters["c"])
	}
}

func TestClaims(t *testing.T) {
	passthrough := tcpListener("catchall", "0.0.0.0", "use_original_dst: true", "      cluster: pass")
	b := NewBuilder()
	b.SetListener(listener(t, passthrough))
	b.SetListener(listener(t, tcpListener("any", "0.0.0.0", "", "      cluster: a\n      access_log: [{name: f, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/null}}]")))
	b.SetListener(listener(t, tcpListener("exact", "10.96.0.1", "additional_addresses: [{address: {socket_address: {address: \"fd00::1\", port_value: 80}}}]", "      weighted_clusters: {clusters: [{name: a, weight: 9}, {name: b, weight: 1}]}")))
	b.SetCluster(cluster(t, `{name: pass, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED}`))
	for _, name := range []string{"a", "b"} {
		b.SetCluster(eds(t, name))
		b.SetEndpoints(loadAssignment(t, name, "192.0.2.1"))
	}
	s := build(b)
	for dst, want := range map[string]string{
		"10.96.0.1:80": "exact", "[fd00::1]:80": "exact", "[::ffff:10.96.0.1]:80": "exact",
		"10.96.0.2:80": "any", "10.96.0.2:81": "catchall",
	} {
		if l := s.Outbound(netip.MustParseAddrPort(dst)); l == nil || l.Name != want {
			t.Errorf("%s: %+v, want %s", dst, l, want)
		}
	}
	if s.Outbound(netip.MustParseAddrPort("[fd00::2]:80")) != nil {
		t.Error("nothing claims IPv6 addresses in general")
	}
	claims := s.Claims()
	if len(claims) != 3 {
		t.Fatalf("a catch-all that only passes through claims nothing: %+v", claims)
	}
	if c := claims[0]; c.Addr.String() != "0.0.0.0:80" || c.Offload != nil || !strings.Contains(c.Reason, "access_log") {
		t.Errorf("%+v", c)
	}
	if c := claims[1]; c.Offload == nil || c.Reason != "" || len(c.Offload.Clusters) != 2 || c.Offload.Clusters[0].Weight != 9 || len(c.Offload.Clusters[0].Endpoints) != 1 {
		t.Errorf("%+v", c)
	}
}

func TestWhatKeepsAListenerInTheProxy(t *testing.T) {
	tests := []struct{ name, extra, tcp, cluster, want string }{
		{"nothing", "", "cluster: a", "", ""},
		{"the default idle time-out", "", "cluster: a", "", ""},
		{"an idle time-out that was set", "", "{cluster: a, idle_timeout: 60s}", "", "idle_timeout"},
		{"an idle time-out switched off", "", "{cluster: a, idle_timeout: 0s}", "", ""},
		{"a maximum duration", "", "{cluster: a, max_downstream_connection_duration: 60s}", "", "max_downstream_connection_duration"},
		{"bind_to_port", "bind_to_port: true", "cluster: a", "", "bind_to_port"},
		{"an inspector", "listener_filters: [{name: envoy.filters.listener.tls_inspector}]", "cluster: a", "", "listener_filters"},
		{"original_dst is what we do anyway", "listener_filters: [{name: envoy.filters.listener.original_dst}]", "cluster: a", "", ""},
		{"an unknown cluster", "", "cluster: nowhere", "", `cluster "nowhere": not known`},
		{"a connection limit", "", "cluster: a", "circuit_breakers: {thresholds: [{max_connections: 5}]}", "max_connections"},
		{"names", "", "cluster: a", "type: STRICT_DNS", "type: names"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			text := strings.Replace(tcpListener("l", "10.0.0.1", "EXTRA", ""), "bind_to_port: false\nEXTRA", "bind_to_port: false\n"+tt.extra, 1)
			if strings.HasPrefix(tt.extra, "bind_to_port") {
				text = strings.Replace(text, "bind_to_port: false\n", "", 1)
			}
			for _, field := range strings.Split(strings.Trim(tt.tcp, "{}"), ", ") {
				text += "      " + field + "\n"
			}
			l := listener(t, text)
			kind := "type: STATIC"
			if strings.HasPrefix(tt.cluster, "type") {
				kind = tt.cluster
			}
			c := `{name: a, ` + kind + `, load_assignment: {cluster_name: a, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 192.0.2.1, port_value: 80}}}}]}]}`
			if tt.cluster != "" && kind != tt.cluster {
				c += ", " + tt.cluster
			}
			clusters := map[string]*Cluster{"a": cluster(t, c+"}")}
			reason := l.OffloadReason
			if reason == "" {
				_, reason = compileOffload(l, clusters)
			}
			if tt.want == "" && reason != "" || !strings.Contains(reason, tt.want) {
				t.Errorf("got %q, want %q in it", reason, tt.want)
			}
		})
	}
}

func TestOffloadedEndpointsCarryTheWeightsOfTheirLocalities(t *testing.T) {
	c := cluster(t, `{name: a, type: STATIC, common_lb_config: {locality_weighted_lb_config: {}}, load_assignment: {cluster_name: a, endpoints: [
 {load_balancing_weight: 3, locality: {zone: west}, lb_endpoints: [
  {load_balancing_weight: 1, endpoint: {address: {socket_address: {address: 192.0.2.1, port_value: 80}}}},
  {load_balancing_weight: 2, endpoint: {address: {socket_address: {address: 192.0.2.2, port_value: 80}}}},
  {health_status: UNHEALTHY, endpoint: {address: {socket_address: {address: 192.0.2.3, port_value: 80}}}}]},
 {load_balancing_weight: 1, locality: {zone: east}, lb_endpoints: [{load_balancing_weight: 50, endpoint: {address: {socket_address: {address: 192.0.2.4, port_value: 80}}}}]}]}}`)
	list, reason := c.offloadEndpoints()
	if reason != "" || len(list) != 3 {
		t.Fatalf("%v %q", list, reason)
	}
	unit := list[0].Weight // a quarter of everything
	if list[1].Weight != 2*unit || list[2].Weight != unit {
		t.Errorf("%v", list)
	}
}
