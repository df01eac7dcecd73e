package xds

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/grpc/backoff"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Bootstrap is an Envoy bootstrap as far as it concerns this data plane: node, static resources, and where
// dynamic ones come from.
type Bootstrap struct {
	name  string // file, for errors
	proto *bootstrapv3.Bootstrap
	// Ignored lists the fields that mean nothing here (admin, stats sinks, tracing…).
	Ignored []mesh.Warning
}

// bootstrapFields are acted upon; every other one is reported as ignored.
var bootstrapFields = map[protoreflect.Name]bool{"node": true, "static_resources": true, "dynamic_resources": true}

// LoadBootstrap reads a bootstrap file, YAML or JSON. Unknown fields are errors that name them.
func LoadBootstrap(file string) (*Bootstrap, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("bootstrap: %w", err)
	}
	return ParseBootstrap(file, data)
}

// ParseBootstrap is LoadBootstrap for a file that was read already.
func ParseBootstrap(name string, data []byte) (*Bootstrap, error) {
	m := &bootstrapv3.Bootstrap{}
	if err := unmarshalYAML(data, m); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	b := &Bootstrap{name: name, proto: m}
	m.ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !bootstrapFields[fd.Name()] {
			b.ignore(string(fd.Name()))
		}
		return true
	})
	if len(m.GetStaticResources().GetSecrets()) > 0 {
		b.ignore("static_resources.secrets")
	}
	for _, unsupported := range []struct {
		set   bool
		field string
	}{
		{m.GetDynamicResources().GetLdsResourcesLocator() != "", "dynamic_resources.lds_resources_locator"},
		{m.GetDynamicResources().GetCdsResourcesLocator() != "", "dynamic_resources.cds_resources_locator"},
	} {
		if unsupported.set {
			return nil, fmt.Errorf("%s: %s: xdstp names are not supported", name, unsupported.field)
		}
	}
	return b, nil
}

func (b *Bootstrap) ignore(field string) {
	b.Ignored = append(b.Ignored, mesh.Warning{Type: "bootstrap", Name: b.name, Field: field})
}

// BootstrapForServer is the shorthand --xds: plaintext ADS, delta, at "host:port" or "unix:///path".
func BootstrapForServer(address string) (*Bootstrap, error) {
	if path, isUnix := cutUnix(address); isUnix {
		if path == "" {
			return nil, fmt.Errorf("--xds %q: the socket's path is missing", address)
		}
	} else if err := checkHostPort(address); err != nil {
		return nil, fmt.Errorf("--xds %q: expected host:port or unix:///path: %w", address, err)
	}
	ads := &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
	return &Bootstrap{name: "--xds " + address, proto: &bootstrapv3.Bootstrap{
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			AdsConfig: &corev3.ApiConfigSource{
				ApiType: corev3.ApiConfigSource_DELTA_GRPC, TransportApiVersion: corev3.ApiVersion_V3,
				GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_GoogleGrpc_{GoogleGrpc: &corev3.GrpcService_GoogleGrpc{TargetUri: address}}}},
			},
			LdsConfig: ads, CdsConfig: ads,
		},
	}}, nil
}

func checkHostPort(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return fmt.Errorf("%q is not a port", port)
	}
	if host == "" {
		return errors.New("the host is missing")
	}
	return nil
}

func cutUnix(address string) (path string, ok bool) {
	if path, ok = strings.CutPrefix(address, "unix://"); ok {
		return path, true
	}
	return strings.CutPrefix(address, "unix:")
}

// Node is the node message's id and cluster, for display.
func (b *Bootstrap) Node() (id, cluster string) {
	return b.proto.GetNode().GetId(), b.proto.GetNode().GetCluster()
}

func (b *Bootstrap) node(id, version string) *corev3.Node {
	node := &corev3.Node{}
	if b.proto.GetNode() != nil {
		node = proto.Clone(b.proto.GetNode()).(*corev3.Node)
	}
	if node.Id == "" {
		node.Id = id
	}
	if node.Cluster == "" {
		node.Cluster = "sockmesh"
	}
	node.UserAgentName = "sockmesh"
	if version != "" {
		node.UserAgentVersionType = &corev3.Node_UserAgentVersion{UserAgentVersion: version}
	}
	return node
}

func (b *Bootstrap) adsConfig() *corev3.ApiConfigSource {
	return b.proto.GetDynamicResources().GetAdsConfig()
}

// serverClusters are the static clusters that only say where a control plane is.
func (b *Bootstrap) serverClusters() map[string]bool {
	names := map[string]bool{}
	add := func(api *corev3.ApiConfigSource) {
		for _, service := range api.GetGrpcServices() {
			if name := service.GetEnvoyGrpc().GetClusterName(); name != "" {
				names[name] = true
			}
		}
	}
	dynamic := b.proto.GetDynamicResources()
	add(dynamic.GetAdsConfig())
	add(dynamic.GetCdsConfig().GetApiConfigSource())
	add(dynamic.GetLdsConfig().GetApiConfigSource())
	for _, cluster := range b.proto.GetStaticResources().GetClusters() {
		add(cluster.GetEdsClusterConfig().GetEdsConfig().GetApiConfigSource())
	}
	return names
}

// dial prepares the connection to a control plane.
func (b *Bootstrap) dial(service *corev3.GrpcService) (*server, error) {
	pause := backoff.Config{BaseDelay: defaultBackoffBase, Multiplier: 2, Jitter: 0.2, MaxDelay: defaultBackoffMax}
	switch target := service.GetTargetSpecifier().(type) {
	case *corev3.GrpcService_GoogleGrpc_:
		google := target.GoogleGrpc
		if google.GetChannelCredentials() != nil && google.GetChannelCredentials().GetSslCredentials() != nil {
			return nil, errors.New("google_grpc.channel_credentials: use envoy_grpc with a static cluster for TLS")
		}
		address := strings.TrimPrefix(strings.TrimPrefix(google.GetTargetUri(), "dns:///"), "dns:")
		if _, isUnix := cutUnix(address); !isUnix {
			if err := checkHostPort(address); err != nil {
				return nil, fmt.Errorf("google_grpc.target_uri: %q: expected host:port or unix:///path: %w", google.GetTargetUri(), err)
			}
		}
		return newServer(address, []string{address}, nil, pause)
	case *corev3.GrpcService_EnvoyGrpc_:
		name := target.EnvoyGrpc.GetClusterName()
		for _, cluster := range b.proto.GetStaticResources().GetClusters() {
			if cluster.GetName() == name {
				return dialCluster(cluster, pause)
			}
		}
		return nil, fmt.Errorf("envoy_grpc.cluster_name: %q is not in static_resources.clusters", name)
	}
	return nil, errors.New("envoy_grpc or google_grpc is needed")
}

func dialCluster(cluster *clusterv3.Cluster, pause backoff.Config) (*server, error) {
	var addresses []string
	for i, group := range cluster.GetLoadAssignment().GetEndpoints() {
		for j, lb := range group.GetLbEndpoints() {
			address, err := endpointAddress(lb.GetEndpoint())
			if err != nil {
				return nil, fmt.Errorf("cluster %q: load_assignment.endpoints[%d].lb_endpoints[%d]: %w", cluster.GetName(), i, j, err)
			}
			addresses = append(addresses, address)
		}
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("cluster %q: load_assignment: no endpoint", cluster.GetName())
	}
	tlsConfig, err := clientTLS(cluster.GetTransportSocket())
	if err != nil {
		return nil, fmt.Errorf("cluster %q: transport_socket: %w", cluster.GetName(), err)
	}
	return newServer(cluster.GetName(), addresses, tlsConfig, pause)
}

func endpointAddress(e *endpointv3.Endpoint) (string, error) {
	if path := e.GetAddress().GetPipe().GetPath(); path != "" {
		return "unix:" + path, nil
	}
	socket := e.GetAddress().GetSocketAddress()
	if socket.GetAddress() == "" || socket.GetPortValue() == 0 {
		return "", errors.New("address: a socket_address with a port, or a pipe, is needed")
	}
	return net.JoinHostPort(socket.GetAddress(), strconv.Itoa(int(socket.GetPortValue()))), nil
}

// clientTLS is TLS towards a control plane with certificates from files or inline; nil for plain text.
func clientTLS(ts *corev3.TransportSocket) (*tls.Config, error) {
	if ts == nil || ts.GetName() == "envoy.transport_sockets.raw_buffer" {
		return nil, nil
	}
	context := &tlsv3.UpstreamTlsContext{}
	if err := ts.GetTypedConfig().UnmarshalTo(context); err != nil {
		return nil, fmt.Errorf("only UpstreamTlsContext is supported towards a control plane: %w", err)
	}
	common := context.GetCommonTlsContext()
	if len(common.GetTlsCertificateSdsSecretConfigs()) > 0 || common.GetValidationContextSdsSecretConfig() != nil || common.GetCombinedValidationContext() != nil {
		return nil, errors.New("common_tls_context: secrets by SDS are not supported yet; name files")
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: context.GetSni(), NextProtos: []string{"h2"}}
	for i, certificate := range common.GetTlsCertificates() {
		chain, err := readData(certificate.GetCertificateChain())
		if err != nil {
			return nil, fmt.Errorf("tls_certificates[%d].certificate_chain: %w", i, err)
		}
		key, err := readData(certificate.GetPrivateKey())
		if err != nil {
			return nil, fmt.Errorf("tls_certificates[%d].private_key: %w", i, err)
		}
		pair, err := tls.X509KeyPair(chain, key)
		if err != nil {
			return nil, fmt.Errorf("tls_certificates[%d]: %w", i, err)
		}
		config.Certificates = append(config.Certificates, pair)
	}
	ca := common.GetValidationContext().GetTrustedCa()
	if ca == nil {
		return nil, errors.New("common_tls_context.validation_context.trusted_ca: is needed, or the control plane could be anyone")
	}
	pem, err := readData(ca)
	if err != nil {
		return nil, fmt.Errorf("trusted_ca: %w", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, errors.New("trusted_ca: no PEM certificate in it")
	}
	if config.ServerName == "" {
		return nil, errors.New("sni: is needed, it is the name that the certificate is checked against")
	}
	return config, nil
}

func readData(d *corev3.DataSource) ([]byte, error) {
	switch spec := d.GetSpecifier().(type) {
	case *corev3.DataSource_Filename:
		return os.ReadFile(spec.Filename)
	case *corev3.DataSource_InlineBytes:
		return spec.InlineBytes, nil
	case *corev3.DataSource_InlineString:
		return []byte(spec.InlineString), nil
	}
	return nil, errors.New("filename, inline_bytes or inline_string is needed")
}
