package xds

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

func TestSotWSendsTheNodeOnTheFirstMessageOnly(t *testing.T) {
	s := newScripted(t, "")
	run(t, Config{Bootstrap: bootstrapFor(t, s.address, false), Version: "1.2"})
	stream := s.stream()
	first := receive(t, stream.world, "a request")
	if first.GetNode().GetId() != "test-node" || first.GetNode().GetUserAgentName() != "sockmesh" || first.GetNode().GetUserAgentVersion() != "1.2" {
		t.Errorf("node: %v", first.GetNode())
	}
	if first.GetTypeUrl() != Clusters.TypeURL() || len(first.GetResourceNames()) != 0 {
		t.Errorf("clusters come first, by the legacy wildcard: %v", first)
	}
	if second := receive(t, stream.world, "a request"); second.GetNode() != nil || second.GetTypeUrl() != Listeners.TypeURL() {
		t.Errorf("second: %v", second)
	}
}

func TestSotWACKCarriesVersionAndNonce(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.request(Clusters)
	nonce := stream.send(Clusters, "v1", staticClusterYAML("a", 80))
	if ack := stream.request(Clusters); ack.GetVersionInfo() != "v1" || ack.GetResponseNonce() != nonce || ack.GetErrorDetail() != nil {
		t.Errorf("%v", ack)
	}
	stream.send(Listeners, "v1")
	h.until("cluster a", hasCluster("a"))
}

func TestSotWNACKCarriesTheLastGoodVersionAndNamesResourceAndField(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.request(Clusters)
	stream.send(Listeners, "1")
	stream.send(Clusters, "v1", staticClusterYAML("a", 80))
	stream.request(Clusters)
	nonce := stream.send(Clusters, "v2", staticClusterYAML("b", 80), badClusterYAML("a"))
	nack := stream.request(Clusters)
	if nack.GetVersionInfo() != "v1" || nack.GetResponseNonce() != nonce || nack.GetErrorDetail().GetCode() != int32(codes.InvalidArgument) {
		t.Errorf("%v", nack)
	}
	if detail := nack.GetErrorDetail().GetMessage(); !strings.Contains(detail, `cluster "a"`) || !strings.Contains(detail, "lb_policy: MAGLEV") {
		t.Errorf("detail %q", detail)
	}
	// gRFC A46: the good one of a bad response applies, the last good version of the bad one stays.
	snapshot := h.until("cluster b", hasCluster("b"))
	if snapshot.Clusters["a"] == nil {
		t.Error("the refused cluster's last good version is gone")
	}
	rejected := h.client.Status().Rejected
	if len(rejected) != 1 || rejected[0].Name != "a" || rejected[0].Type != "cluster" || !rejected[0].InForce {
		t.Errorf("rejected %+v", rejected)
	}
	stream.send(Clusters, "v3", staticClusterYAML("a", 81), staticClusterYAML("b", 80))
	if ack := stream.request(Clusters); ack.GetErrorDetail() != nil || ack.GetVersionInfo() != "v3" || len(h.client.Status().Rejected) != 0 {
		t.Errorf("%v, %+v", ack, h.client.Status().Rejected)
	}
}

func TestSotWAbsenceDeletesClustersAndListenersButNotEndpoints(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.send(Listeners, "1")
	stream.send(Clusters, "1", clusterYAML("a"), clusterYAML("b"))
	if r := stream.request(Endpoints); !slices.Equal(sorted(r.GetResourceNames()), []string{"a", "b"}) {
		t.Errorf("names %v", r.GetResourceNames())
	}
	stream.send(Endpoints, "1", endpointsYAML("a", "192.0.2.1"), endpointsYAML("b", "192.0.2.2"))
	h.until("both clusters", func(s *mesh.Snapshot) bool { return len(s.Clusters) == 2 })
	stream.send(Endpoints, "2", endpointsYAML("a", "192.0.2.3"))
	snapshot := h.until("the change of a", func(s *mesh.Snapshot) bool {
		return s.Clusters["a"] != nil && s.Clusters["a"].Endpoints[0].Addr.Addr().String() == "192.0.2.3"
	})
	if len(snapshot.Clusters["b"].Endpoints) != 1 {
		t.Error("b's endpoints are gone")
	}
	stream.send(Clusters, "2", clusterYAML("a"))
	h.until("b to go", func(s *mesh.Snapshot) bool { return len(s.Clusters) == 1 })
	for names := []string(nil); !slices.Equal(names, []string{"a"}); {
		names = stream.request(Endpoints).GetResourceNames()
	}
}

func TestSotWAfterExplicitNamesEmptyMeansNone(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.send(Listeners, "1")
	stream.send(Clusters, "1", clusterYAML("a"))
	stream.request(Endpoints)
	stream.send(Endpoints, "1", endpointsYAML("a", "192.0.2.1"))
	h.until("a", hasCluster("a"))
	stream.request(Endpoints) // ACK
	stream.send(Clusters, "2")
	if r := stream.request(Endpoints); len(r.GetResourceNames()) != 0 || r.GetResponseNonce() == "" {
		t.Errorf("%v", r)
	}
	// On a new stream an empty list would be a wildcard: nothing may be said of endpoints there.
	stream.close <- status.Error(codes.Unavailable, "bye")
	stream = s.stream()
	stream.request(Clusters)
	stream.request(Listeners)
	stream.send(Clusters, "3", staticClusterYAML("c", 80))
	stream.request(Clusters)
	for len(stream.world) > 0 {
		if r := <-stream.world; r.GetTypeUrl() == Endpoints.TypeURL() {
			t.Errorf("%v", r)
		}
	}
}

func TestResourcesNotAskedForAreIgnored(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.send(Listeners, "1")
	stream.send(Clusters, "1", clusterYAML("a"))
	stream.request(Endpoints)
	nonce := stream.send(Endpoints, "1", endpointsYAML("a", "192.0.2.1"), endpointsYAML("stranger", "192.0.2.2"))
	if ack := stream.request(Endpoints); ack.GetErrorDetail() != nil || ack.GetResponseNonce() != nonce {
		t.Errorf("%v", ack)
	}
	h.until("a", hasCluster("a"))
	if n := h.client.Status().Resources["endpoint"]; n != 1 {
		t.Errorf("%d endpoints kept", n)
	}
}

func TestDuplicatesInOneResponseAreAnError(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.request(Clusters)
	stream.send(Listeners, "1")
	stream.send(Clusters, "1", staticClusterYAML("a", 80), staticClusterYAML("a", 81), staticClusterYAML("b", 80))
	if nack := stream.request(Clusters); !strings.Contains(nack.GetErrorDetail().GetMessage(), `"a": is in the response more than once`) {
		t.Errorf("%v", nack)
	}
	h.until("b", func(s *mesh.Snapshot) bool { return s.Clusters["b"] != nil && s.Clusters["a"] == nil })
}

func TestMakeBeforeBreakAcrossCDSAndRDS(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.send(Clusters, "1", clusterYAML("old"))
	stream.send(Listeners, "1", listenerYAML("l", "r"))
	stream.request(Endpoints)
	stream.send(Endpoints, "1", endpointsYAML("old", "192.0.2.1"))
	if r := stream.request(Routes); !slices.Equal(r.GetResourceNames(), []string{"r"}) {
		t.Errorf("%v", r)
	}
	stream.send(Routes, "1", routeYAML("r", "old"))
	h.until("the first route", routed("old"))
	stream.send(Clusters, "2", clusterYAML("new"))
	stream.send(Routes, "2", routeYAML("r", "new"))
	h.eventually("the second route's ACK", func() bool { return len(h.client.Status().Warming) > 0 })
	if s := h.client.Snapshot(); !routed("old")(s) || s.Clusters["old"] == nil {
		t.Error("the old route must stay until the new cluster is warm")
	}
	for names := []string(nil); !slices.Contains(names, "new"); {
		names = stream.request(Endpoints).GetResourceNames()
	}
	stream.send(Endpoints, "2", endpointsYAML("new", "192.0.2.2"))
	h.until("the second route", routed("new"))
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, snapshot := range h.snapshots {
		if l := snapshot.Listener("l"); l != nil {
			name := l.Chains[0].HTTP.Routes.Hosts[0].Routes[0].Action.Clusters[0].Name
			if snapshot.Clusters[name] == nil {
				t.Errorf("snapshot %d has a route to %s, which is not in it", snapshot.Generation, name)
			}
		}
	}
}

func TestInitialFetchTimeoutEndsTheWarming(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.send(Listeners, "1")
	stream.send(Clusters, "1", `{name: a, type: EDS, eds_cluster_config: {eds_config: {ads: {}, initial_fetch_timeout: 0.05s}}}`, clusterYAML("b"))
	snapshot := h.until("a", hasCluster("a"))
	if len(snapshot.Clusters["a"].Endpoints) != 0 || snapshot.Clusters["b"] != nil {
		t.Errorf("%+v", snapshot.Clusters)
	}
}

func TestDeltaSubscribesACKsAndNACKsByNonce(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, true)})
	stream := s.stream()
	if r := stream.deltaRequest(Clusters); r.GetNode().GetId() != "test-node" || len(r.GetResourceNamesSubscribe()) != 0 {
		t.Errorf("%v", r)
	}
	stream.sendDelta(Listeners, "1", nil)
	nonce := stream.sendDelta(Clusters, "1", nil, clusterYAML("a"), badClusterYAML("b"))
	nack := stream.deltaRequest(Clusters)
	if nack.GetResponseNonce() != nonce || !strings.Contains(nack.GetErrorDetail().GetMessage(), `cluster "b": lb_policy`) {
		t.Errorf("%v", nack)
	}
	if r := stream.deltaRequest(Endpoints); !slices.Equal(r.GetResourceNamesSubscribe(), []string{"a"}) || r.GetResponseNonce() != "" {
		t.Errorf("a spontaneous request has no nonce: %v", r)
	}
	nonce = stream.sendDelta(Endpoints, "1", nil, endpointsYAML("a", "192.0.2.1"))
	if ack := stream.deltaRequest(Endpoints); ack.GetResponseNonce() != nonce || ack.GetErrorDetail() != nil {
		t.Errorf("%v", ack)
	}
	h.until("a", hasCluster("a"))
}

func TestDeltaRemovedResourcesDelete(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, true)})
	stream := s.stream()
	stream.sendDelta(Listeners, "1", nil)
	stream.sendDelta(Clusters, "1", nil, staticClusterYAML("a", 80), staticClusterYAML("b", 80))
	h.until("both", func(s *mesh.Snapshot) bool { return len(s.Clusters) == 2 })
	stream.sendDelta(Clusters, "2", []string{"a", "never-heard-of"})
	h.until("a to go", func(s *mesh.Snapshot) bool { return len(s.Clusters) == 1 && s.Clusters["b"] != nil })
}

func TestDeltaRemovalOfANameThatWasNeverThereEndsTheWarming(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, true)})
	stream := s.stream()
	stream.sendDelta(Listeners, "1", nil)
	stream.sendDelta(Clusters, "1", nil, clusterYAML("a"))
	stream.deltaRequest(Endpoints)
	stream.sendDelta(Endpoints, "1", []string{"a"})
	h.until("a", hasCluster("a"))
}

func TestDeltaReconnectSendsInitialResourceVersions(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, true)})
	stream := s.stream()
	stream.sendDelta(Listeners, "1", nil)
	stream.sendDelta(Clusters, "c1", nil, clusterYAML("a"))
	stream.deltaRequest(Endpoints)
	stream.sendDelta(Endpoints, "e1", nil, endpointsYAML("a", "192.0.2.1"))
	before := h.until("a", hasCluster("a"))
	stream.close <- status.Error(codes.Unavailable, "restarting")
	stream = s.stream()
	if r := stream.deltaRequest(Clusters); r.GetInitialResourceVersions()["a"] != "c1" || r.GetNode() == nil {
		t.Errorf("%v", r)
	}
	if r := stream.deltaRequest(Endpoints); r.GetInitialResourceVersions()["a"] != "e1" || !slices.Equal(r.GetResourceNamesSubscribe(), []string{"a"}) {
		t.Errorf("%v", r)
	}
	// The server says only what is new.
	stream.sendDelta(Clusters, "c2", nil, staticClusterYAML("b", 80))
	after := h.until("b", hasCluster("b"))
	if after.Clusters["a"] != before.Clusters["a"] {
		t.Error("a did not change, its pointer did")
	}
}

func TestUnsubscribesFromWhatIsNoLongerNeeded(t *testing.T) {
	s := newScripted(t, "")
	run(t, Config{Bootstrap: bootstrapFor(t, s.address, true)})
	stream := s.stream()
	stream.sendDelta(Clusters, "1", nil, clusterYAML("a"))
	stream.deltaRequest(Endpoints)
	stream.sendDelta(Clusters, "2", []string{"a"})
	if r := stream.deltaRequest(Endpoints); !slices.Equal(r.GetResourceNamesUnsubscribe(), []string{"a"}) {
		t.Errorf("%v", r)
	}
}

func TestSeparateStreamsPerTypeAndServer(t *testing.T) {
	one, two := newScripted(t, ""), newScripted(t, "")
	api := func(s *scripted, kind string) string {
		return `{api_config_source: {api_type: ` + kind + `, transport_api_version: V3, grpc_services: [{google_grpc: {target_uri: "` + s.address + `", stat_prefix: x}}]}}`
	}
	b, err := ParseBootstrap("b.yaml", []byte(`
node: {id: node-1, cluster: c}
dynamic_resources:
  cds_config: `+api(one, "GRPC")+`
  lds_config: `+api(two, "DELTA_GRPC")))
	if err != nil {
		t.Fatal(err)
	}
	h := run(t, Config{Bootstrap: b})
	cds, lds := one.stream(), two.stream()
	if cds.method != kindTable[Clusters].method[0] || lds.method != kindTable[Listeners].method[1] {
		t.Errorf("%s, %s", cds.method, lds.method)
	}
	cds.send(Clusters, "1", strings.Replace(clusterYAML("a"), "{ads: {}}", api(two, "DELTA_GRPC"), 1))
	lds.sendDelta(Listeners, "1", nil, strings.Replace(listenerYAML("l", "r"), "{ads: {}}", "{self: {}}", 1))
	var eds, rds *serverStream
	for eds == nil || rds == nil {
		switch stream := two.stream(); stream.method {
		case kindTable[Endpoints].method[1]:
			eds = stream
		case kindTable[Routes].method[1]:
			rds = stream
		default:
			t.Fatal(stream.method)
		}
	}
	if r := eds.deltaRequest(Endpoints); r.GetNode() == nil {
		t.Error("every stream's first message has the node")
	}
	eds.sendDelta(Endpoints, "1", nil, endpointsYAML("a", "192.0.2.1"))
	rds.sendDelta(Routes, "1", nil, routeYAML("r", "a"))
	h.until("the route", routed("a"))
	if n := len(h.client.Status().Servers); n != 4 {
		t.Errorf("%d streams: %+v", n, h.client.Status().Servers)
	}
}

func TestStaticResourcesServeWithoutAnyServer(t *testing.T) {
	b, err := ParseBootstrap("b.yaml", []byte(`
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 9901}}}
static_resources:
  clusters: [`+staticClusterYAML("a", 80)+`, `+badClusterYAML("bad")+`]
`))
	if err != nil {
		t.Fatal(err)
	}
	h := run(t, Config{Bootstrap: b})
	h.until("a", hasCluster("a"))
	st := h.client.Status()
	if len(st.Rejected) != 1 || st.Rejected[0].Name != "bad" || len(st.Ignored) != 1 || st.Ignored[0].Field != "admin" {
		t.Errorf("%+v", st)
	}
}

func TestFilesAreWatchedAndABrokenOneLeavesTheLastGood(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cds.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	typed := func(cluster string) string {
		return `resources: [` + strings.Replace(cluster, "{", `{"@type": type.googleapis.com/envoy.config.cluster.v3.Cluster, `, 1) + `]`
	}
	write(typed(staticClusterYAML("a", 80)))
	b, err := ParseBootstrap("b.yaml", []byte("dynamic_resources: {cds_config: {path_config_source: {path: "+file+"}}}"))
	if err != nil {
		t.Fatal(err)
	}
	h := run(t, Config{Bootstrap: b})
	h.until("a", hasCluster("a"))
	write("resources: [{")
	h.eventually("the error", func() bool { return strings.Contains(h.client.Status().Servers[0].LastError, file) })
	if !hasCluster("a")(h.client.Snapshot()) {
		t.Error("a is gone")
	}
	write(typed(staticClusterYAML("b", 80)))
	h.until("b", func(s *mesh.Snapshot) bool { return s.Clusters["b"] != nil && s.Clusters["a"] == nil })
}

func TestAStreamOfItsOwnIsClosedWithItsLastSubscription(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	ads := s.stream()
	ads.send(Listeners, "1")
	ads.send(Clusters, "1", strings.Replace(clusterYAML("a"), "{ads: {}}",
		`{api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{google_grpc: {target_uri: "`+s.address+`", stat_prefix: x}}]}}`, 1))
	eds := s.stream()
	eds.request(Endpoints)
	eds.send(Endpoints, "1", endpointsYAML("a", "192.0.2.1"))
	h.until("a", hasCluster("a"))
	ads.send(Clusters, "2", staticClusterYAML("b", 80))
	select {
	case <-eds.raw.Context().Done():
	case <-time.After(patience):
		t.Error("the stream stays open")
	}
	if n := len(h.client.Status().Servers); n != 1 {
		t.Errorf("%+v", h.client.Status().Servers)
	}
}

func TestUnixSockets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "xds.sock")
	s := newScripted(t, "unix:"+path)
	b, err := BootstrapForServer("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	h := run(t, Config{Bootstrap: b, NodeID: "node-1"})
	stream := s.stream()
	if r := stream.deltaRequest(Clusters); r.GetNode().GetId() != "node-1" {
		t.Errorf("%v", r)
	}
	stream.sendDelta(Listeners, "1", nil)
	stream.sendDelta(Clusters, "1", nil, staticClusterYAML("a", 80))
	h.until("a", hasCluster("a"))
}

// fakeNames answers look-ups from a table that the test changes.
type fakeNames struct{ addr atomic.Pointer[netip.Addr] }

func (f *fakeNames) LookupNetIP(_ context.Context, network, host string) ([]netip.Addr, error) {
	a := f.addr.Load()
	if a == nil {
		return nil, &net.DNSError{Err: "server misbehaving", Name: host, IsTemporary: true}
	}
	if network == "ip6" {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return []netip.Addr{*a}, nil
}

func TestNamesAreResolvedAgainAndKeepTheLastGoodAnswer(t *testing.T) {
	names := &fakeNames{}
	set := func(ip string) {
		a := netip.MustParseAddr(ip)
		names.addr.Store(&a)
	}
	set("192.0.2.1")
	b, err := ParseBootstrap("b.yaml", []byte(`static_resources: {clusters: [{name: a, type: STRICT_DNS, dns_refresh_rate: 0.01s,
 load_assignment: {cluster_name: a, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: example.com, port_value: 80}}}}]}]}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	h := run(t, Config{Bootstrap: b, Resolver: names})
	at := func(ip string) func(*mesh.Snapshot) bool {
		return func(s *mesh.Snapshot) bool {
			return s.Clusters["a"] != nil && len(s.Clusters["a"].Endpoints) == 1 && s.Clusters["a"].Endpoints[0].Addr.Addr().String() == ip
		}
	}
	h.until("the first answer", at("192.0.2.1"))
	set("192.0.2.2")
	h.until("the second answer", at("192.0.2.2"))
	names.addr.Store(nil)
	time.Sleep(50 * time.Millisecond)
	if !at("192.0.2.2")(h.client.Snapshot()) {
		t.Error("a failed look-up took the last good answer away")
	}
}
