package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// patience bounds every wait of these tests; nothing depends on it being short or long.
const patience = 20 * time.Second

// scripted is an xDS server that does exactly what the test says.
type scripted struct {
	t       testing.TB
	address string
	grpc    *grpc.Server
	streams chan *serverStream
}

// serverStream is one stream as the server sees it.
type serverStream struct {
	t      testing.TB
	method string
	raw    grpc.ServerStream
	delta  bool
	world  chan *discoveryv3.DiscoveryRequest
	incr   chan *discoveryv3.DeltaDiscoveryRequest
	close  chan error
	nonce  int
}

func newScripted(t testing.TB, address string) *scripted {
	t.Helper()
	if address == "" {
		address = "127.0.0.1:0"
	}
	network, address := splitAddress(address)
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	s := &scripted{t: t, address: l.Addr().String(), streams: make(chan *serverStream, 16)}
	s.grpc = grpc.NewServer(grpc.UnknownServiceHandler(s.handle))
	go func() { _ = s.grpc.Serve(l) }()
	t.Cleanup(s.grpc.Stop)
	return s
}

func (s *scripted) handle(_ any, raw grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(raw)
	stream := &serverStream{
		t: s.t, method: method, raw: raw, delta: strings.Contains(method, "/Delta"), close: make(chan error, 1),
		world: make(chan *discoveryv3.DiscoveryRequest, 64), incr: make(chan *discoveryv3.DeltaDiscoveryRequest, 64),
	}
	s.streams <- stream
	go func() {
		for {
			if stream.delta {
				r := &discoveryv3.DeltaDiscoveryRequest{}
				if raw.RecvMsg(r) != nil {
					return
				}
				stream.incr <- r
			} else {
				r := &discoveryv3.DiscoveryRequest{}
				if raw.RecvMsg(r) != nil {
					return
				}
				stream.world <- r
			}
		}
	}()
	select {
	case err := <-stream.close:
		return err
	case <-raw.Context().Done():
		return nil
	}
}

// stream waits for the client's next stream.
func (s *scripted) stream() *serverStream {
	s.t.Helper()
	return receive(s.t, s.streams, "a stream")
}

func receive[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// request waits for the next state-of-the-world request of a kind; requests of other kinds are left out.
func (s *serverStream) request(kind Kind) *discoveryv3.DiscoveryRequest {
	s.t.Helper()
	for {
		if r := receive(s.t, s.world, "a request for "+kind.String()); r.GetTypeUrl() == kind.TypeURL() {
			return r
		}
	}
}

func (s *serverStream) deltaRequest(kind Kind) *discoveryv3.DeltaDiscoveryRequest {
	s.t.Helper()
	for {
		if r := receive(s.t, s.incr, "a delta request for "+kind.String()); r.GetTypeUrl() == kind.TypeURL() {
			return r
		}
	}
}

// send answers with resources given as YAML; it returns the nonce.
func (s *serverStream) send(kind Kind, version string, resources ...string) string {
	s.t.Helper()
	s.nonce++
	r := &discoveryv3.DiscoveryResponse{TypeUrl: kind.TypeURL(), VersionInfo: version, Nonce: fmt.Sprint(s.nonce)}
	for _, text := range resources {
		r.Resources = append(r.Resources, resourceAny(s.t, kind, text))
	}
	if err := s.raw.SendMsg(r); err != nil {
		s.t.Fatal(err)
	}
	return r.Nonce
}

func (s *serverStream) sendDelta(kind Kind, version string, removed []string, resources ...string) string {
	s.t.Helper()
	s.nonce++
	r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: kind.TypeURL(), Nonce: fmt.Sprint(s.nonce), RemovedResources: removed}
	for _, text := range resources {
		a := resourceAny(s.t, kind, text)
		m, err := a.UnmarshalNew()
		if err != nil {
			s.t.Fatal(err)
		}
		r.Resources = append(r.Resources, &discoveryv3.Resource{Name: resourceName(m), Version: version, Resource: a})
	}
	if err := s.raw.SendMsg(r); err != nil {
		s.t.Fatal(err)
	}
	return r.Nonce
}

func resourceAny(t testing.TB, kind Kind, text string) *anypb.Any {
	t.Helper()
	m := kind.newMessage()
	if err := unmarshalYAML([]byte(text), m); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Resources in YAML.

func clusterYAML(name string) string {
	return `{name: ` + name + `, type: EDS, eds_cluster_config: {eds_config: {ads: {}}}}`
}

func badClusterYAML(name string) string {
	return `{name: ` + name + `, type: STATIC, lb_policy: MAGLEV}`
}

func staticClusterYAML(name string, port int) string {
	return fmt.Sprintf(`{name: %s, type: STATIC, load_assignment: {cluster_name: %s, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 192.0.2.1, port_value: %d}}}}]}]}}`, name, name, port)
}

func endpointsYAML(name, ip string) string {
	return `{cluster_name: ` + name + `, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: ` + ip + `, port_value: 80}}}}]}]}`
}

func listenerYAML(name, route string) string {
	return `
name: ` + name + `
address: {socket_address: {address: 10.96.0.10, port_value: 80}}
bind_to_port: false
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: x
      rds: {route_config_name: ` + route + `, config_source: {ads: {}}}
      http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
`
}

func routeYAML(name, cluster string) string {
	return `{name: ` + name + `, virtual_hosts: [{name: v, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: ` + cluster + `}}]}]}`
}

// bootstrapFor is an ADS bootstrap.
func bootstrapFor(t testing.TB, address string, delta bool) *Bootstrap {
	t.Helper()
	api := "GRPC"
	if delta {
		api = "DELTA_GRPC"
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	b, err := ParseBootstrap("bootstrap.yaml", []byte(`
node: {id: test-node, cluster: test-cluster}
dynamic_resources:
  ads_config: {api_type: `+api+`, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
  lds_config: {ads: {}}
  cds_config: {ads: {}}
static_resources:
  clusters:
  - {name: xds, type: STATIC, load_assignment: {cluster_name: xds, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: `+host+`, port_value: `+port+`}}}}]}]}}
`))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// harness runs a client and keeps its snapshots.
type harness struct {
	t      testing.TB
	client *Client
	stop   func()

	mu        sync.Mutex
	snapshots []*mesh.Snapshot
	arrived   chan struct{}
}

func run(t testing.TB, cfg Config) *harness {
	t.Helper()
	h := &harness{t: t, arrived: make(chan struct{}, 1)}
	cfg.OnSnapshot = func(s *mesh.Snapshot) {
		h.mu.Lock()
		h.snapshots = append(h.snapshots, s)
		h.mu.Unlock()
		select {
		case h.arrived <- struct{}{}:
		default:
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
		if os.Getenv("XDS_TEST_LOG") != "" {
			cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}
	}
	if cfg.BackoffBase == 0 {
		cfg.BackoffBase, cfg.BackoffMax = 10*time.Millisecond, 100*time.Millisecond
	}
	client, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h.client = client
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- client.Run(ctx) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := receive(t, done, "the client's end"); !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(h.stop)
	return h
}

// until waits for a snapshot that satisfies the condition.
func (h *harness) until(what string, ok func(*mesh.Snapshot) bool) *mesh.Snapshot {
	h.t.Helper()
	deadline := time.After(patience)
	for {
		if s := h.client.Snapshot(); s != nil && ok(s) {
			return s
		}
		select {
		case <-h.arrived:
		case <-time.After(20 * time.Millisecond):
		case <-deadline:
			h.t.Fatalf("waited in vain for %s; status %+v", what, h.client.Status())
		}
	}
}

// eventually waits for a condition.
func (h *harness) eventually(what string, ok func() bool) {
	h.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("waited in vain for %s; status %+v", what, h.client.Status())
		}
	}
}

func hasCluster(name string) func(*mesh.Snapshot) bool {
	return func(s *mesh.Snapshot) bool { return s.Clusters[name] != nil }
}

func routed(cluster string) func(*mesh.Snapshot) bool {
	return func(s *mesh.Snapshot) bool {
		l := s.Listener("l")
		return l != nil && len(l.Chains[0].HTTP.Routes.Hosts) > 0 &&
			l.Chains[0].HTTP.Routes.Hosts[0].Routes[0].Action.Clusters[0].Name == cluster
	}
}

func sorted(names []string) []string {
	names = slices.Clone(names)
	slices.Sort(names)
	return names
}

// The methods that the client calls must be those of the generated services.
var _ = []string{
	clusterservice.ClusterDiscoveryService_DeltaClusters_FullMethodName,
	endpointservice.EndpointDiscoveryService_DeltaEndpoints_FullMethodName,
	listenerservice.ListenerDiscoveryService_DeltaListeners_FullMethodName,
	routeservice.RouteDiscoveryService_DeltaRoutes_FullMethodName,
}
