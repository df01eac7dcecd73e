package xds

import (
	"fmt"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Kind is a type of resource that this client subscribes to.
type Kind int

// Kinds, in the order in which they have to be applied.
const (
	Clusters Kind = iota
	Endpoints
	Listeners
	Routes
	kinds
)

const typePrefix = "type.googleapis.com/"

var kindTable = [kinds]struct {
	word, message string // "cluster"
	method        [2]string
}{
	Clusters:  {"cluster", "envoy.config.cluster.v3.Cluster", methods("cluster", "Cluster")},
	Endpoints: {"endpoint", "envoy.config.endpoint.v3.ClusterLoadAssignment", methods("endpoint", "Endpoint")},
	Listeners: {"listener", "envoy.config.listener.v3.Listener", methods("listener", "Listener")},
	Routes:    {"route", "envoy.config.route.v3.RouteConfiguration", methods("route", "Route")},
}

// methods are the gRPC methods of a type's own service: state of the world, then delta.
func methods(pkg, word string) [2]string {
	service := "/envoy.service." + pkg + ".v3." + word + "DiscoveryService/"
	return [2]string{service + "Stream" + word + "s", service + "Delta" + word + "s"}
}

// String is the kind's name in statuses and errors.
func (k Kind) String() string { return kindTable[k].word }

// TypeURL is the kind's name on the wire.
func (k Kind) TypeURL() string { return typePrefix + kindTable[k].message }

// wildcard says that the kind is subscribed to as a whole, so that absence from a state-of-the-world response
// means deletion.
func (k Kind) wildcard() bool { return k == Clusters || k == Listeners }

func kindOf(typeURL string) (Kind, bool) {
	for k := range kinds {
		if typeURL == k.TypeURL() {
			return k, true
		}
	}
	return 0, false
}

func (k Kind) newMessage() proto.Message {
	switch k {
	case Clusters:
		return &clusterv3.Cluster{}
	case Endpoints:
		return &endpointv3.ClusterLoadAssignment{}
	case Listeners:
		return &listenerv3.Listener{}
	default:
		return &routev3.RouteConfiguration{}
	}
}

// decode unpacks a resource; strict in its type.
func (k Kind) decode(a *anypb.Any) (proto.Message, error) {
	if got := a.GetTypeUrl(); got != k.TypeURL() {
		return nil, fmt.Errorf("a resource of type %q where %q was asked for", got, k.TypeURL())
	}
	m := k.newMessage()
	if err := proto.Unmarshal(a.GetValue(), m); err != nil {
		return nil, fmt.Errorf("%s: %w", k, err)
	}
	return m, nil
}

// resourceName is the name by which a resource is subscribed to.
func resourceName(m proto.Message) string {
	if e, ok := m.(*endpointv3.ClusterLoadAssignment); ok {
		return e.GetClusterName()
	}
	if n, ok := m.(interface{ GetName() string }); ok {
		return n.GetName()
	}
	return ""
}

// compile turns a message into its runtime form.
func compile(m proto.Message, version string) (any, []mesh.Warning, error) {
	switch m := m.(type) {
	case *clusterv3.Cluster:
		return erase(mesh.CompileCluster(m, version))
	case *endpointv3.ClusterLoadAssignment:
		return erase(mesh.CompileEndpoints(m, version))
	case *listenerv3.Listener:
		return erase(mesh.CompileListener(m, version))
	case *routev3.RouteConfiguration:
		return erase(mesh.CompileRouteConfig(m, version))
	}
	name := strings.TrimPrefix(string(m.ProtoReflect().Descriptor().FullName()), typePrefix)
	return nil, nil, fmt.Errorf("%s is not a resource that this data plane uses", name)
}

func erase[T any](v T, w []mesh.Warning, err error) (any, []mesh.Warning, error) { return v, w, err }
