package explain

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// endpoints is a cluster of one locality.
func endpoints(name string, list ...mesh.Endpoint) *mesh.Cluster {
	return &mesh.Cluster{
		Name: name, Discovery: mesh.EDS, PanicThreshold: 50, Overprovisioning: 140,
		Endpoints: list, Localities: []mesh.Locality{{N: len(list)}},
	}
}

func ep(s string, weight uint32) mesh.Endpoint { return mesh.Endpoint{Addr: addr(s), Weight: weight} }

// world has an enrolled pod and one that isn't, an HTTP canary at web, an offloaded TCP canary at db, a wildcard
// port, and Services.
func world(t *testing.T) *World {
	t.Helper()
	canary := &mesh.HeaderMatcher{Name: "x-canary", Kind: mesh.MatchString, String: &mesh.StringMatcher{Value: "always"}}
	routes := &mesh.RouteConfig{Name: "web-routes", Hosts: []*mesh.VirtualHost{
		{Name: "web", Domains: []string{"web.shop", "*.example.com"}, Routes: []*mesh.Route{
			{Name: "canary", Match: mesh.RouteMatch{Path: "/", Headers: []*mesh.HeaderMatcher{canary}}, Action: &mesh.RouteAction{
				Clusters: []mesh.WeightedCluster{{Name: "v2", Weight: 1}}, TotalWeight: 1}},
			{Match: mesh.RouteMatch{Kind: mesh.PathExact, Path: "/health"}, Direct: &mesh.DirectResponse{Status: 200, Body: []byte("ok")}},
			{Match: mesh.RouteMatch{Kind: mesh.PathRegex, Regex: regexp.MustCompile(`^(?:/old/.*)$`)}, Redirect: &mesh.Redirect{Code: 301, HTTPS: true}},
			{Match: mesh.RouteMatch{Path: "/"}, Action: &mesh.RouteAction{Timeout: 15 * time.Second, TotalWeight: 100,
				Clusters: []mesh.WeightedCluster{{Name: "v1", Weight: 90}, {Name: "v2", Weight: 10}}}},
		}},
	}}
	if err := routes.Init(); err != nil {
		t.Fatal(err)
	}
	tcp := func(clusters ...mesh.WeightedCluster) *mesh.FilterChain {
		p := &mesh.TCPProxy{Clusters: clusters}
		for _, c := range clusters {
			p.TotalWeight += uint64(c.Weight)
		}
		return &mesh.FilterChain{TCP: p}
	}
	listeners := []*mesh.Listener{
		{Name: "web", Addresses: []netip.AddrPort{addr("10.96.0.10:80"), addr("[fd00::10]:80")}, OffloadReason: "filter_chains: http_connection_manager",
			Chains: []*mesh.FilterChain{{HTTP: &mesh.HTTPConnectionManager{StatPrefix: "web", Routes: routes}}}},
		{Name: "db", Addresses: []netip.AddrPort{addr("10.96.0.20:5432")},
			Chains: []*mesh.FilterChain{tcp(mesh.WeightedCluster{Name: "db1", Weight: 75}, mesh.WeightedCluster{Name: "db2", Weight: 25})}},
		{Name: "port", Addresses: []netip.AddrPort{addr("0.0.0.0:9000")}, OffloadReason: "access_log",
			Chains: []*mesh.FilterChain{tcp(mesh.WeightedCluster{Name: "v1", Weight: 1})}},
		{Name: "rest", UseOriginalDst: true, Addresses: []netip.AddrPort{addr("0.0.0.0:15001")},
			Chains: []*mesh.FilterChain{tcp(mesh.WeightedCluster{Name: "passthrough", Weight: 1})}},
	}
	for _, l := range listeners {
		if err := l.Init(); err != nil {
			t.Fatal(err)
		}
	}
	clusters := map[string]*mesh.Cluster{}
	for _, c := range []*mesh.Cluster{
		endpoints("v1", ep("10.0.1.1:8080", 1), ep("10.0.1.2:8080", 3), mesh.Endpoint{Addr: addr("10.0.1.3:8080"), Weight: 1, Health: mesh.HealthUnhealthy}),
		endpoints("v2", ep("10.0.2.1:8080", 1)),
		endpoints("db1", ep("10.0.3.1:5432", 1), ep("10.0.3.2:5432", 1)), endpoints("db2", ep("10.0.3.3:5432", 1)),
		{Name: "passthrough", Discovery: mesh.OriginalDst},
	} {
		clusters[c.Name] = c
	}
	svc := func(name, ip string, proto service.Protocol, backends ...string) *service.Service {
		f := service.Frontend{Addr: addr(ip), Protocol: proto, PortName: "main"}
		for _, b := range backends {
			f.Backends = append(f.Backends, service.Backend{Addr: addr(b)})
		}
		return &service.Service{Name: service.Name{Namespace: "shop", Name: name}, Frontends: []service.Frontend{f}}
	}
	plain := svc("plain", "10.96.0.30:80", service.TCP, "10.0.4.1:80", "10.0.4.2:80")
	plain.Excluded = []service.Excluded{{Addr: addr("10.0.4.3:80"), Reason: "not ready"}}
	return &World{
		Snapshot: mesh.NewSnapshot(1, listeners, clusters),
		Services: []*service.Service{
			svc("web", "10.96.0.10:80", service.TCP, "10.0.1.1:8080"), plain, svc("empty", "10.96.0.40:80", service.TCP),
			svc("dns", "10.96.0.53:53", service.UDP, "10.0.5.1:53"),
		},
		Pods: []Pod{
			{Namespace: "shop", Name: "client", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Enrolled: true, Rule: "namespace label", Listening: true},
			{Namespace: "shop", Name: "v1", IPs: []netip.Addr{netip.MustParseAddr("10.0.1.1")}, Enrolled: true, Listening: false, NotListening: "waiting"},
			{Namespace: "shop", Name: "free", Rule: "no label"},
		},
		ServicesOn: true, UDP: true, Outside: true, Acceleration: true,
	}
}

// text flattens an explanation for searching.
func text(e api.Explanation) string {
	var b strings.Builder
	for _, s := range e.Steps {
		b.WriteString(s.Stage + ": " + s.Result + " [" + s.Rule + "]")
		for _, r := range s.Rejected {
			b.WriteString(" not:" + r)
		}
		b.WriteByte('\n')
	}
	b.WriteString("=> " + e.Outcome + ": " + e.Verdict + "\n")
	for _, d := range e.Destinations {
		b.WriteString(d.Cluster + " " + d.Address + "\n")
	}
	return b.String()
}

func TestExplain(t *testing.T) {
	const client = "shop/client"
	for _, tt := range []struct {
		name    string
		change  func(*World)
		req     api.ExplainRequest
		outcome string
		want    []string
	}{
		{name: "a request is split by weight", req: api.ExplainRequest{From: client, URL: "http://web.shop/items"}, outcome: Proxied,
			want: []string{"[namespace label]", "listener web [exact address 10.96.0.10:80]", "http_connection_manager", `domain "web.shop"`,
				`not:route 0 "canary": header x-canary exact "always": the request has none`, `not:route 1: path "/health" does not match path "/items"`,
				`not:route 2: safe_regex`, "route 3", "90% v1", "10% v2", "weight 90 of 100", "10.0.1.3:8080: health_status UNHEALTHY", "timeout 15s"}},
		{name: "a header chooses the canary", req: api.ExplainRequest{From: client, URL: "http://web.shop/", Headers: [][2]string{{"X-Canary", "always"}}},
			outcome: Proxied, want: []string{`route 0 "canary"`, "v2 10.0.2.1:8080"}},
		{name: "a Host header chooses the virtual host", req: api.ExplainRequest{From: client, URL: "http://10.96.0.10/health", Headers: [][2]string{{"Host", "a.example.com"}}},
			outcome: Proxied, want: []string{`domain "*.example.com" matches "a.example.com"`, "the proxy answers 200 itself"}},
		{name: "no virtual host", req: api.ExplainRequest{From: client, URL: "http://10.96.0.10/"}, outcome: Failed, want: []string{"NR", `none for "10.96.0.10"`}},
		{name: "a redirect", req: api.ExplainRequest{From: client, URL: "http://web.shop/old/x"}, outcome: Proxied, want: []string{"redirect 301, scheme https"}},
		{name: "IPv6", req: api.ExplainRequest{From: client, URL: "http://[fd00::10]/", Headers: [][2]string{{"Host", "web.shop"}}}, outcome: Proxied, want: []string{"[::1]:15001"}},
		{name: "TCP to an HTTP listener", req: api.ExplainRequest{From: client, URL: "tcp://10.96.0.10:80"}, outcome: Proxied, want: []string{"read as HTTP"}},
		{name: "a TCP canary in the kernel", req: api.ExplainRequest{From: client, URL: "tcp://10.96.0.20:5432"}, outcome: Offloaded,
			want: []string{"75% db1", "25% db2", "no proxy in the path"}},
		{name: "a wildcard port", req: api.ExplainRequest{From: client, URL: "tcp://192.168.7.7:9000"}, outcome: Proxied,
			want: []string{"listener port [wildcard port 0.0.0.0:9000] not:no listener claims the exact address 192.168.7.7:9000", "[access_log]", "the only cluster"}},
		{name: "a catch-all that passes through claims nothing", req: api.ExplainRequest{From: client, URL: "tcp://192.168.7.7:1234"}, outcome: Passed,
			want: []string{"listener rest would only pass it through", "no Service has the TCP address"}},
		{name: "a plain Service", req: api.ExplainRequest{From: client, URL: "tcp://plain.shop.svc.cluster.local:80"}, outcome: Service,
			want: []string{"ClusterIP of Service shop/plain", "port main", "one of 2 endpoints", "not:10.0.4.3:80: not ready", "--accelerate-pods is off"}},
		{name: "a Service without endpoints", req: api.ExplainRequest{From: client, URL: "tcp://empty:80"}, outcome: Refused, want: []string{"refused at once"}},
		{name: "a pod that is not enrolled gets the Service", req: api.ExplainRequest{From: "shop/free", URL: "http://web/"}, outcome: Service,
			want: []string{"not enrolled", "[no label]", "10.0.1.1:8080"}},
		{name: "services off", change: func(w *World) { w.ServicesOn = false }, req: api.ExplainRequest{From: "shop/free", URL: "tcp://10.96.0.30:80"}, outcome: Passed,
			want: []string{"--services=off"}},
		{name: "no listener in the pod, open", req: api.ExplainRequest{From: "shop/v1", URL: "http://web/"}, outcome: Service, want: []string{"waiting; --fail-mode=open"}},
		{name: "no listener in the pod, closed", change: func(w *World) { w.FailClosed = true }, req: api.ExplainRequest{From: "shop/v1", URL: "http://web/"}, outcome: Refused,
			want: []string{"--fail-mode=closed"}},
		{name: "no xDS at all", change: func(w *World) { w.Snapshot = nil }, req: api.ExplainRequest{From: client, URL: "tcp://10.96.0.30:80"}, outcome: Service,
			want: []string{"no xDS configuration"}},
		{name: "acceleration off", change: func(w *World) { w.Acceleration, w.AccelerationReason = false, "--acceleration=off" },
			req: api.ExplainRequest{From: client, URL: "http://web.shop/"}, outcome: Proxied, want: []string{"plain TCP on both legs [acceleration is not active: --acceleration=off]"}},
		{name: "UDP", req: api.ExplainRequest{From: client, URL: "udp://dns.shop:53"}, outcome: Service, want: []string{"a socket stays with its endpoint", "answers show 10.96.0.53:53", "10.0.5.1:53"}},
		{name: "a cluster that is not there", change: func(w *World) { delete(w.Snapshot.Clusters, "v2") },
			req: api.ExplainRequest{From: client, URL: "http://web.shop/", Headers: [][2]string{{"x-canary", "always"}}}, outcome: Failed, want: []string{"NC"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := world(t)
			if tt.change != nil {
				tt.change(w)
			}
			e, err := Explain(w, tt.req)
			if err != nil {
				t.Fatal(err)
			}
			got := text(e)
			if e.Outcome != tt.outcome {
				t.Errorf("outcome %q, expected %q", e.Outcome, tt.outcome)
			}
			for _, want := range tt.want {
				if !strings.Contains(got, want) {
					t.Errorf("no %q", want)
				}
			}
			if t.Failed() {
				t.Log("\n" + got)
			}
		})
	}
}

func TestSharesAddUp(t *testing.T) {
	for _, url := range []string{"http://web.shop/", "tcp://10.96.0.20:5432", "tcp://10.96.0.30:80", "tcp://1.2.3.4:9000"} {
		e, err := Explain(world(t), api.ExplainRequest{From: "shop/client", URL: url})
		if err != nil {
			t.Fatal(err)
		}
		sum := 0.0
		for _, d := range e.Destinations {
			sum += d.Percent
		}
		if sum < 99.99 || sum > 100.01 {
			t.Errorf("%s: the destinations' shares add up to %f:\n%s", url, sum, text(e))
		}
	}
}

func TestDestinationsNameThisNodesPods(t *testing.T) {
	e, err := Explain(world(t), api.ExplainRequest{From: "shop/client", URL: "http://web.shop/"})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range e.Destinations {
		if local := d.Address == "10.0.1.1:8080"; d.Local != local || local && d.Pod != "shop/v1" {
			t.Errorf("%+v", d)
		}
	}
}

func TestPriorities(t *testing.T) {
	c := &mesh.Cluster{
		Endpoints:  []mesh.Endpoint{{Addr: addr("10.0.0.1:1"), Weight: 1, Health: mesh.HealthUnhealthy}, ep("10.0.0.2:1", 1)},
		Localities: []mesh.Locality{{Priority: 0, First: 0, N: 1}, {Priority: 1, First: 1, N: 1}}, PanicThreshold: 50, Overprovisioning: 140,
	}
	set, note := candidates(c)
	if len(set) != 1 || set[0].index != 1 || !strings.Contains(note, "priority 1") {
		t.Errorf("%v %q", set, note)
	}
	c.Endpoints[1].Health = mesh.HealthUnhealthy
	if set, note := candidates(c); len(set) != 1 || set[0].index != 0 || !strings.Contains(note, "panic") {
		t.Errorf("%v %q", set, note)
	}
}

func TestWrongQuestions(t *testing.T) {
	for _, tt := range []struct{ from, url, want string }{
		{"", "tcp://1.2.3.4:1", "NAMESPACE/POD"},
		{"shop/nobody", "tcp://1.2.3.4:1", "there are client, free, v1"},
		{"void/x", "tcp://1.2.3.4:1", "no pod void/x on this node"},
		{"shop/client", "web:80", "expected tcp://"},
		{"shop/client", "tcp://1.2.3.4", "expected a port"},
		{"shop/client", "tcp://1.2.3.4:0", "expected a port"},
		{"shop/client", "ftp://1.2.3.4:1", "expected tcp, udp or http"},
		{"shop/client", "https://web/", "tcp://web:443"},
		{"shop/client", "tcp://:80", "no host"},
		{"shop/client", "http://www.example.org/", "ask with the address"},
		{"shop/client", "http://nothing/", "no Service shop/nothing"},
	} {
		_, err := Explain(world(t), api.ExplainRequest{From: tt.from, URL: tt.url})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s -> %s: error %v, expected %q", tt.from, tt.url, err, tt.want)
		}
	}
	if _, err := Explain(world(t), api.ExplainRequest{From: "shop/client", URL: "tcp://1.2.3.4:1", Method: "POST"}); err == nil {
		t.Error("a method for tcp:// must be refused")
	}
}
