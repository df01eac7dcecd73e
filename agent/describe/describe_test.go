package describe

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

func TestMatchReadsLikeTheConfiguration(t *testing.T) {
	exact := func(v string) *mesh.StringMatcher { return &mesh.StringMatcher{Value: v} }
	for want, m := range map[string]mesh.RouteMatch{
		`prefix "/"`:                         {Path: "/"},
		`path "/a", any case`:                {Kind: mesh.PathExact, Path: "/a", IgnoreCase: true},
		`path_separated_prefix "/a"`:         {Kind: mesh.PathSeparatedPrefix, Path: "/a"},
		`safe_regex "^x$"`:                   {Kind: mesh.PathRegex, Regex: regexp.MustCompile("^x$")},
		`connect_matcher, grpc`:              {Kind: mesh.PathConnect, GRPC: true},
		`prefix "/", runtime_fraction 12.5%`: {Path: "/", FractionIsSet: true, FractionPPM: 125_000},
		`prefix "/", header x exact "1", header y not in [1, 5), header z absent, query q present, query r prefix "v"`: {Path: "/",
			Headers: []*mesh.HeaderMatcher{
				{Name: "x", Kind: mesh.MatchString, String: exact("1")}, {Name: "y", Kind: mesh.MatchRange, RangeStart: 1, RangeEnd: 5, Invert: true},
				{Name: "z", Kind: mesh.MatchPresent, Present: true, Invert: true}},
			Query: []*mesh.QueryMatcher{{Name: "q", Present: true}, {Name: "r", String: &mesh.StringMatcher{Kind: mesh.StringPrefix, Value: "v"}}}},
	} {
		if got := Match(&m); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func TestActionSaysWhere(t *testing.T) {
	two := []mesh.WeightedCluster{{Name: "a", Weight: 2}, {Name: "b", Weight: 1}}
	for want, r := range map[string]*mesh.Route{
		"cluster a":                       {Action: &mesh.RouteAction{Clusters: two[:1], TotalWeight: 2}},
		"66.7% a, 33.3% b":                {Action: &mesh.RouteAction{Clusters: two, TotalWeight: 3}},
		"cluster named by header x-to":    {Action: &mesh.RouteAction{Clusters: []mesh.WeightedCluster{{ClusterHeader: "x-to", Weight: 1}}, TotalWeight: 1}},
		`cluster a; prefix_rewrite "/v2"`: {Action: &mesh.RouteAction{Clusters: two[:1], TotalWeight: 2, HasPrefixRw: true, PrefixRewrite: "/v2"}},
		"direct_response 404 (2 bytes)":   {Direct: &mesh.DirectResponse{Status: 404, Body: []byte("no")}},
		"redirect 308, scheme https, host h, port 8443, path /x, without query": {Redirect: &mesh.Redirect{
			Code: 308, HTTPS: true, Host: "h", Port: 8443, Path: "/x", StripQuery: true}},
	} {
		if got := Action(r); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func TestChainMatch(t *testing.T) {
	m := mesh.ChainMatch{DstPort: 80, ServerNames: []string{".example.com", "a.b"}, SourceType: mesh.SourceLocal,
		SrcPrefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, SrcPorts: []uint16{7}}
	want := "destination_port 80, server_names *.example.com or a.b, source_type SAME_IP_OR_LOOPBACK, source in 10.0.0.0/8, source_port 7"
	if got := ChainMatch(&m); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := ChainMatch(&mesh.ChainMatch{}); got != "any" {
		t.Errorf("got %s", got)
	}
}

func TestListenersSayWhereTheyAreHandled(t *testing.T) {
	tcp := func(cluster string) []*mesh.FilterChain {
		return []*mesh.FilterChain{{TCP: &mesh.TCPProxy{Clusters: []mesh.WeightedCluster{{Name: cluster, Weight: 1}}, TotalWeight: 1}}}
	}
	at := func(s string) []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(s)} }
	ep := mesh.Endpoint{Addr: netip.MustParseAddrPort("10.1.1.1:1"), Weight: 1}
	clusters := map[string]*mesh.Cluster{
		"c":    {Name: "c", Discovery: mesh.EDS, Endpoints: []mesh.Endpoint{ep}, Localities: []mesh.Locality{{N: 1}}, PanicThreshold: 50},
		"orig": {Name: "orig", Discovery: mesh.OriginalDst},
	}
	listeners := []*mesh.Listener{
		{Name: "a", Addresses: at("10.0.0.1:1"), Chains: tcp("c")},
		{Name: "b", Addresses: at("10.0.0.1:1"), Chains: tcp("c")},
		{Name: "c", Addresses: at("10.0.0.2:1"), Chains: tcp("c"), OffloadReason: "access_log"},
		{Name: "d", Addresses: at("0.0.0.0:80"), BindToPort: true, Chains: tcp("c")},
		{Name: "e", Addresses: at("0.0.0.0:15006"), Direction: mesh.DirectionInbound, Chains: tcp("c")},
		{Name: "f", Addresses: at("0.0.0.0:15001"), UseOriginalDst: true, Chains: tcp("orig")},
	}
	for _, l := range listeners {
		if err := l.Init(); err != nil {
			t.Fatal(err)
		}
	}
	bound := []api.NodeListener{{Name: "d", Address: "0.0.0.0:80", Error: "address already in use"}}
	want := []struct{ mode, reason string }{
		{ModeKernel, ""}, {ModeShadowed, "listener a claims 10.0.0.1:1 first"}, {ModeProxy, "access_log"}, {ModeNode, "not bound: address already in use"}, {ModeInbound, ""}, {ModePassthrough, ""},
	}
	for i, row := range Listeners(mesh.NewSnapshot(1, listeners, clusters), bound) {
		if row.Mode != want[i].mode || row.Reason != want[i].reason {
			t.Errorf("%s: %s %q, expected %s %q", row.Name, row.Mode, row.Reason, want[i].mode, want[i].reason)
		}
	}
}

func TestServicesNameTheirListener(t *testing.T) {
	l := &mesh.Listener{Name: "web", Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.96.0.1:80")}, OffloadReason: "http"}
	front := service.Frontend{Addr: l.Addresses[0], Protocol: service.TCP}
	udp := front
	udp.Protocol = service.UDP
	rows := Services([]*service.Service{
		{Name: service.Name{Namespace: "b", Name: "x"}}, {Name: service.Name{Namespace: "a", Name: "y"}, Frontends: []service.Frontend{front, udp}},
	}, mesh.NewSnapshot(1, []*mesh.Listener{l}, nil), NodeFacts{})
	if len(rows) != 2 || rows[0].Name != "y" {
		t.Fatalf("%+v", rows)
	}
	if f := rows[0].Frontends; f[0].Listener != "web" || f[1].Listener != "" {
		t.Errorf("a listener claims TCP only: %+v", f)
	}
}

func TestNothingYet(t *testing.T) {
	if Listeners(nil, nil) != nil || Routes(nil) != nil || Clusters(nil) != nil || Endpoints(nil, nil) != nil || len(Services(nil, nil, NodeFacts{})) != 0 {
		t.Error("before the first configuration there is nothing to list")
	}
}

func TestAServiceSaysWhereEachEndpointStands(t *testing.T) {
	ap := netip.MustParseAddrPort
	used := []service.Backend{{Addr: ap("10.0.0.1:80"), Local: true, Pod: "a/one", Node: "n1", Zone: "z"}, {Addr: ap("10.0.0.2:80"), Terminating: true}}
	excluded := func(addr, reason string, ready, serving, terminating bool) service.Excluded {
		return service.Excluded{Addr: ap(addr), Reason: reason, Endpoint: &service.Endpoint{Pod: "p", Node: "n2", Ready: ready, Serving: serving, Terminating: terminating}}
	}
	rows := Services([]*service.Service{{
		Name: service.Name{Namespace: "a", Name: "web"}, ExternalLocal: true,
		Frontends: []service.Frontend{{Addr: ap("192.0.2.1:30080"), Kind: service.NodePort, Protocol: service.TCP, Backends: used,
			External: &service.External{Local: true, Silent: true}}},
		Loopback: []service.Frontend{{Addr: ap("127.0.0.1:30080"), Kind: service.NodePort, Protocol: service.TCP, Backends: used}},
		Excluded: []service.Excluded{
			excluded("10.0.0.3:80", "terminating, and there are ready ones", false, true, true), excluded("10.0.0.4:80", "no longer serving", false, false, true),
			excluded("10.0.0.5:80", "not ready", false, false, false), excluded("10.0.0.6:80", "its hints are for other zones", true, true, false),
		},
		HealthCheck: &service.HealthCheck{Port: 31000, LocalReady4: 1},
		Problems:    []service.Problem{{Field: "f", Detail: "d", Cure: "c"}},
	}}, nil, NodeFacts{
		Notes:       func(service.Name) []string { return []string{"a map is full"} },
		HealthCheck: func(service.Name) ([]netip.AddrPort, string) { return []netip.AddrPort{ap("192.0.2.1:31000")}, "taken" },
	})
	row := rows[0]
	var got []string
	for _, e := range row.Endpoints {
		got = append(got, fmt.Sprint(e.Address, " ", e.State, " ", e.Used, " ", e.Local, " ", e.Pod, " ", e.Node, " ", e.Zone, " ", e.Reason))
	}
	want := []string{
		"10.0.0.1:80 ready true true a/one n1 z ", "10.0.0.2:80 terminating true false    there is no ready one",
		"10.0.0.3:80 draining false false a/p n2  terminating, and there are ready ones", "10.0.0.4:80 terminating false false a/p n2  no longer serving",
		"10.0.0.5:80 not ready false false a/p n2  not ready", "10.0.0.6:80 ready false false a/p n2  its hints are for other zones",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if x := row.Frontends[0].External; x == nil || x.Policy != "Local" || x.Without != "no answer" || len(x.Backends) != 0 {
		t.Errorf("outside: %+v", x)
	}
	if f := row.Frontends[1]; !f.Loopback || f.External != nil {
		t.Errorf("loopback: %+v", f)
	}
	if h := row.HealthCheck; h == nil || h.Port != 31000 || h.Error != "taken" || len(h.Addresses) != 1 || row.ExternalTrafficPolicy != "Local" {
		t.Errorf("%+v, %s", h, row.ExternalTrafficPolicy)
	}
	if !slices.Equal(row.Problems, []string{"f: d: c", "a map is full"}) {
		t.Errorf("problems %q", row.Problems)
	}
}
