package xds

import (
	"context"
	"fmt"
	"net"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	typeurl "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	xdsserver "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

type sameNode struct{}

func (sameNode) ID(*corev3.Node) string { return "all" }

// referenceServer is go-control-plane's server with a snapshot cache.
func referenceServer(t *testing.T) (cache.SnapshotCache, string) {
	t.Helper()
	snapshots := cache.NewSnapshotCache(true, sameNode{}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	s := xdsserver.NewServer(ctx, snapshots, xdsserver.CallbackFuncs{})
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	clusterservice.RegisterClusterDiscoveryServiceServer(g, s)
	endpointservice.RegisterEndpointDiscoveryServiceServer(g, s)
	listenerservice.RegisterListenerDiscoveryServiceServer(g, s)
	routeservice.RegisterRouteDiscoveryServiceServer(g, s)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(l) }()
	t.Cleanup(func() { cancel(); g.Stop() })
	return snapshots, l.Addr().String()
}

func setReference(t *testing.T, snapshots cache.SnapshotCache, version, cluster, ip string) {
	t.Helper()
	message := func(kind Kind, text string) types.Resource {
		m := kind.newMessage()
		if err := unmarshalYAML([]byte(text), m); err != nil {
			t.Fatal(err)
		}
		return m
	}
	s, err := cache.NewSnapshot(version, map[typeurl.Type][]types.Resource{
		typeurl.ClusterType:  {message(Clusters, clusterYAML(cluster))},
		typeurl.EndpointType: {message(Endpoints, endpointsYAML(cluster, ip))},
		typeurl.ListenerType: {message(Listeners, listenerYAML("l", "r"))},
		typeurl.RouteType:    {message(Routes, routeYAML("r", cluster))},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := snapshots.SetSnapshot(context.Background(), "all", s); err != nil {
		t.Fatal(err)
	}
}

// TestGoControlPlane follows go-control-plane's own server through changes of everything, in all variants.
func TestGoControlPlane(t *testing.T) {
	bootstraps := map[string]func(t *testing.T, address string) *Bootstrap{
		"SotW ADS":  func(t *testing.T, a string) *Bootstrap { return bootstrapFor(t, a, false) },
		"delta ADS": func(t *testing.T, a string) *Bootstrap { return bootstrapFor(t, a, true) },
		"--xds": func(t *testing.T, a string) *Bootstrap {
			b, err := BootstrapForServer(a)
			if err != nil {
				t.Fatal(err)
			}
			return b
		},
	}
	for name, bootstrap := range bootstraps {
		t.Run(name, func(t *testing.T) {
			snapshots, address := referenceServer(t)
			setReference(t, snapshots, "1", "one", "192.0.2.1")
			h := run(t, Config{Bootstrap: bootstrap(t, address), NodeID: "n"})
			h.until("the first set", routed("one"))
			for i := range 5 {
				cluster, ip := fmt.Sprintf("c%d", i), fmt.Sprintf("192.0.2.%d", 10+i)
				setReference(t, snapshots, fmt.Sprint(i+2), cluster, ip)
				h.until("set "+cluster, func(s *mesh.Snapshot) bool {
					return routed(cluster)(s) && len(s.Clusters) == 1 && s.Clusters[cluster].Endpoints[0].Addr.Addr().String() == ip
				})
			}
			h.mu.Lock()
			defer h.mu.Unlock()
			for _, s := range h.snapshots {
				if l := s.Listener("l"); l != nil {
					if name := l.Chains[0].HTTP.Routes.Hosts[0].Routes[0].Action.Clusters[0].Name; s.Clusters[name] == nil {
						t.Errorf("snapshot %d has a route to %s, which is not in it", s.Generation, name)
					}
				}
			}
			if st := h.client.Status(); len(st.Rejected)+len(st.Warming) != 0 || !st.Synced {
				t.Errorf("%+v", st)
			}
		})
	}
}
