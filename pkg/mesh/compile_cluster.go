package mesh

import (
	"math"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	dnsclusterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dns/v3"
	commonlbv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/common/v3"
	leastv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/least_request/v3"
	randomv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/random/v3"
	roundv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/round_robin/v3"
	wrrv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/wrr_locality/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	defaultConnectTimeout   = 5 * time.Second
	defaultOverprovisioning = 140
	defaultPanicThreshold   = 50
	defaultDNSRefresh       = 5 * time.Second
)

// CompileCluster turns a Cluster into its runtime form. EDS endpoints are joined by a Builder; those of
// load_assignment are there already, except names, which are in Cluster.DNS.
func CompileCluster(m *clusterv3.Cluster, version string) (*Cluster, []Warning, error) {
	c := newCompiler("cluster", m.GetName())
	c.begin(m)
	var root *path
	limits := Limits{MaxConnections: 1024, MaxPendingRequests: 1024, MaxRequests: 1024, MaxRetries: 3}
	cluster := &Cluster{
		Name:             m.GetName(),
		StatName:         m.GetAltStatName(),
		Version:          version,
		ChoiceCount:      uint32Or(m.GetLeastRequestLbConfig().GetChoiceCount(), 2),
		Overprovisioning: defaultOverprovisioning,
		PanicThreshold:   defaultPanicThreshold,
		ConnectTimeout:   c.duration(root.field("connect_timeout"), m.GetConnectTimeout(), defaultConnectTimeout),
		BufferLimit:      uint32Or(m.GetPerConnectionBufferLimitBytes(), defaultBufferLimit),
		Limits:           [2]Limits{limits, limits},
		IdleTimeout:      time.Hour,
	}
	if cluster.StatName == "" {
		cluster.StatName = cluster.Name
	}
	if t := m.GetCommonLbConfig().GetHealthyPanicThreshold(); t != nil {
		cluster.PanicThreshold = t.GetValue()
	}
	cluster.LocalityWeighted = m.GetCommonLbConfig().GetLocalityWeightedLbConfig() != nil
	c.discovery(m, cluster)
	c.policy(m, cluster)
	c.circuitBreakers(root.field("circuit_breakers").field("thresholds"), m.GetCircuitBreakers().GetThresholds(), cluster)
	c.keepalive(root.field("upstream_connection_options").field("tcp_keepalive"), m.GetUpstreamConnectionOptions().GetTcpKeepalive(), cluster)
	c.plainTransport(root.field("transport_socket"), m.GetTransportSocket())
	for i, match := range m.GetTransportSocketMatches() {
		c.plainTransport(root.field("transport_socket_matches").at(i).field("transport_socket"), match.GetTransportSocket())
	}
	c.upstreamHTTP(m, cluster)
	if err := c.err(); err != nil {
		return nil, c.warnings, err
	}
	return cluster, c.warnings, nil
}

// discovery compiles where endpoints come from, given by the enum or by the typed cluster_type.
func (c *compiler) discovery(m *clusterv3.Cluster, cluster *Cluster) {
	var root *path
	if custom := m.GetClusterType(); custom != nil {
		c.customDiscovery(root.field("cluster_type"), m, custom, cluster)
	} else {
		switch m.GetType() {
		case clusterv3.Cluster_STATIC:
			cluster.Discovery = Static
		case clusterv3.Cluster_EDS:
			cluster.Discovery = EDS
		case clusterv3.Cluster_STRICT_DNS:
			cluster.Discovery = StrictDNS
		case clusterv3.Cluster_LOGICAL_DNS:
			cluster.Discovery = LogicalDNS
		case clusterv3.Cluster_ORIGINAL_DST:
			cluster.Discovery = OriginalDst
		default:
			c.refuse(root.field("type"), "%d is not known", m.GetType())
		}
		if cluster.Discovery == StrictDNS || cluster.Discovery == LogicalDNS {
			c.dns(root, cluster, m.GetDnsRefreshRate(), m.GetDnsFailureRefreshRate().GetBaseInterval(), int32(m.GetDnsLookupFamily()))
		}
	}
	switch cluster.Discovery {
	case EDS:
		cluster.ServiceName = m.GetEdsClusterConfig().GetServiceName()
		if cluster.ServiceName == "" {
			cluster.ServiceName = m.GetName()
		}
		at := root.field("eds_cluster_config")
		if m.GetEdsClusterConfig() == nil {
			c.refuse(at, "is needed for EDS")
		} else {
			c.configSource(at.field("eds_config"), m.GetEdsClusterConfig().GetEdsConfig())
		}
	case OriginalDst:
		if m.GetLoadAssignment() != nil {
			c.refuse(root.field("load_assignment"), "ORIGINAL_DST has no endpoints")
		}
	default:
		if m.GetLoadAssignment() != nil {
			e := c.endpoints(root.field("load_assignment"), m.GetLoadAssignment(), cluster.Discovery != Static)
			cluster.setEndpoints(e)
		}
		if cluster.Discovery == LogicalDNS && cluster.DNS != nil && len(cluster.Endpoints) != 1 {
			c.refuse(root.field("load_assignment"), "LOGICAL_DNS needs exactly one endpoint, there are %d", len(cluster.Endpoints))
		}
	}
}

func (c *compiler) customDiscovery(at *path, m *clusterv3.Cluster, custom *clusterv3.Cluster_CustomClusterType, cluster *Cluster) {
	name := typeName(custom.GetTypedConfig())
	switch {
	case name == "envoy.extensions.clusters.dns.v3.DnsCluster":
		config := &dnsclusterv3.DnsCluster{}
		if !c.unpack(at.field("typed_config"), custom.GetTypedConfig(), config) {
			return
		}
		cluster.Discovery = StrictDNS
		if config.GetAllAddressesInSingleEndpoint() {
			cluster.Discovery = LogicalDNS
		}
		family := int32(config.GetDnsLookupFamily()) - 1 // this enum begins with UNSPECIFIED
		if family < 0 {
			family = int32(m.GetDnsLookupFamily())
		}
		c.dns(at.field("typed_config"), cluster, config.GetDnsRefreshRate(), config.GetDnsFailureRefreshRate().GetBaseInterval(), family)
	case custom.GetName() == "envoy.cluster.static":
		cluster.Discovery = Static
	case custom.GetName() == "envoy.cluster.eds":
		cluster.Discovery = EDS
	case custom.GetName() == "envoy.cluster.original_dst" || custom.GetName() == "envoy.clusters.original_dst":
		cluster.Discovery = OriginalDst
	case custom.GetName() == "envoy.cluster.strict_dns" || custom.GetName() == "envoy.cluster.logical_dns":
		cluster.Discovery = StrictDNS
		if custom.GetName() == "envoy.cluster.logical_dns" {
			cluster.Discovery = LogicalDNS
		}
		c.dns((*path)(nil), cluster, m.GetDnsRefreshRate(), m.GetDnsFailureRefreshRate().GetBaseInterval(), int32(m.GetDnsLookupFamily()))
	default:
		c.refuse(at, "%q (%s) is not supported", custom.GetName(), name)
	}
}

func (c *compiler) dns(at *path, cluster *Cluster, refresh, failure *durationpb.Duration, family int32) {
	d := &DNS{Family: DNSFamily(family)}
	d.Refresh = max(c.duration(at.field("dns_refresh_rate"), refresh, defaultDNSRefresh), 10*time.Millisecond)
	d.FailureRefresh = c.duration(at.field("dns_failure_refresh_rate").field("base_interval"), failure, d.Refresh)
	if family < 0 || family > int32(DNSAll) {
		c.refuse(at.field("dns_lookup_family"), "%d is not known", family)
	}
	cluster.DNS = d
}

// policy compiles the load-balancing policy; the typed one wins over the enum.
func (c *compiler) policy(m *clusterv3.Cluster, cluster *Cluster) {
	var root *path
	at := root.field("lb_policy")
	switch {
	case m.GetLoadBalancingPolicy() != nil:
		cluster.LocalityWeighted = false
		c.typedPolicy(root.field("load_balancing_policy"), m.GetLoadBalancingPolicy(), cluster)
	case m.GetLbPolicy() == clusterv3.Cluster_ROUND_ROBIN:
		cluster.Policy = RoundRobin
	case m.GetLbPolicy() == clusterv3.Cluster_LEAST_REQUEST:
		cluster.Policy = LeastRequest
	case m.GetLbPolicy() == clusterv3.Cluster_RANDOM:
		cluster.Policy = Random
	case m.GetLbPolicy() == clusterv3.Cluster_CLUSTER_PROVIDED:
		cluster.Policy = ClusterProvided
	case m.GetLbPolicy() == clusterv3.Cluster_LOAD_BALANCING_POLICY_CONFIG:
		c.refuse(root.field("load_balancing_policy"), "is needed for lb_policy LOAD_BALANCING_POLICY_CONFIG")
	default:
		c.refuse(at, "%s is not supported yet", m.GetLbPolicy())
	}
	switch {
	case cluster.Discovery == OriginalDst && m.GetLoadBalancingPolicy() == nil && m.GetLbPolicy() != clusterv3.Cluster_CLUSTER_PROVIDED && m.GetLbPolicy() != clusterv3.Cluster_ROUND_ROBIN:
		c.refuse(at, "ORIGINAL_DST needs CLUSTER_PROVIDED")
	case cluster.Discovery == OriginalDst:
		cluster.Policy = ClusterProvided
	case cluster.Policy == ClusterProvided && len(c.refused) == 0:
		c.refuse(at, "CLUSTER_PROVIDED is for ORIGINAL_DST")
	}
}

// typedPolicy takes the first policy of the list that it knows, as Envoy does.
func (c *compiler) typedPolicy(at *path, m *clusterv3.LoadBalancingPolicy, cluster *Cluster) {
	var names []string
	for i, p := range m.GetPolicies() {
		config := p.GetTypedExtensionConfig().GetTypedConfig()
		here := at.field("policies").at(i).field("typed_extension_config").field("typed_config")
		name := typeName(config)
		names = append(names, name)
		switch strings.TrimPrefix(name, "envoy.extensions.load_balancing_policies.") {
		case "round_robin.v3.RoundRobin":
			typed := &roundv3.RoundRobin{}
			if c.unpack(here, config, typed) {
				cluster.Policy = RoundRobin
				cluster.setLocality(typed.GetLocalityLbConfig())
			}
		case "least_request.v3.LeastRequest":
			typed := &leastv3.LeastRequest{}
			if c.unpack(here, config, typed) {
				cluster.Policy, cluster.ChoiceCount = LeastRequest, uint32Or(typed.GetChoiceCount(), 2)
				cluster.setLocality(typed.GetLocalityLbConfig())
			}
		case "random.v3.Random":
			typed := &randomv3.Random{}
			if c.unpack(here, config, typed) {
				cluster.Policy = Random
				cluster.setLocality(typed.GetLocalityLbConfig())
			}
		case "wrr_locality.v3.WrrLocality":
			typed := &wrrv3.WrrLocality{}
			if c.unpack(here, config, typed) {
				c.typedPolicy(here.field("endpoint_picking_policy"), typed.GetEndpointPickingPolicy(), cluster)
				cluster.LocalityWeighted = true
			}
		case "cluster_provided.v3.ClusterProvided":
			cluster.Policy = ClusterProvided
		default:
			continue
		}
		return
	}
	c.refuse(at.field("policies"), "none of %s is supported yet", strings.Join(names, ", "))
}

func (cluster *Cluster) setLocality(m *commonlbv3.LocalityLbConfig) {
	if m.GetLocalityWeightedLbConfig() != nil {
		cluster.LocalityWeighted = true
	}
}

// circuitBreakers: of several thresholds for one priority the first counts.
func (c *compiler) circuitBreakers(at *path, list []*clusterv3.CircuitBreakers_Thresholds, cluster *Cluster) {
	var seen [2]bool
	for i, t := range list {
		priority := int(t.GetPriority())
		if priority > 1 || priority < 0 {
			c.refuse(at.at(i).field("priority"), "%d is not known", priority)
			continue
		}
		if seen[priority] {
			continue
		}
		seen[priority] = true
		l := &cluster.Limits[priority]
		l.MaxConnections = uint32Or(t.GetMaxConnections(), l.MaxConnections)
		l.MaxPendingRequests = uint32Or(t.GetMaxPendingRequests(), l.MaxPendingRequests)
		l.MaxRequests = uint32Or(t.GetMaxRequests(), l.MaxRequests)
		l.MaxRetries = uint32Or(t.GetMaxRetries(), l.MaxRetries)
		if priority == 0 && t.GetMaxConnections() != nil && t.GetMaxConnections().GetValue() < math.MaxUint32 {
			cluster.OffloadReason = "circuit_breakers.thresholds.max_connections"
		}
	}
}

// keepalive: an empty message switches keepalive on with the kernel's own times.
func (c *compiler) keepalive(at *path, m *corev3.TcpKeepalive, cluster *Cluster) {
	if m == nil {
		return
	}
	seconds := func(name string, v uint32) time.Duration {
		if v > 32767 {
			c.refuse(at.field(name), "%d s is more than the kernel takes (32767)", v)
		}
		return time.Duration(v) * time.Second
	}
	cluster.Keepalive = &Keepalive{
		Probes:   int(m.GetKeepaliveProbes().GetValue()),
		Time:     seconds("keepalive_time", m.GetKeepaliveTime().GetValue()),
		Interval: seconds("keepalive_interval", m.GetKeepaliveInterval().GetValue()),
	}
}

const typeHTTPProtocolOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// upstreamHTTP compiles HTTP options of the upstream side: the typed extension's, else the deprecated fields'.
func (c *compiler) upstreamHTTP(m *clusterv3.Cluster, cluster *Cluster) {
	var root *path
	cluster.MaxRequestsPerConn = m.GetMaxRequestsPerConnection().GetValue()
	c.upstreamCommon(root.field("common_http_protocol_options"), m.GetCommonHttpProtocolOptions(), cluster)
	for name, config := range m.GetTypedExtensionProtocolOptions() {
		at := root.field("typed_extension_protocol_options").key(name)
		switch kind := typeName(config); kind {
		case typeHTTPProtocolOptions:
			c.httpProtocolOptions(at, config, cluster)
		case "envoy.extensions.upstreams.tcp.v3.TcpProtocolOptions":
			c.warn(at)
		default:
			c.refuse(at, "%s is not supported", kind)
		}
	}
}

func (c *compiler) httpProtocolOptions(at *path, config *anypb.Any, cluster *Cluster) {
	m := &upstreamhttpv3.HttpProtocolOptions{}
	if !c.unpack(at, config, m) {
		return
	}
	c.upstreamCommon(at.field("common_http_protocol_options"), m.GetCommonHttpProtocolOptions(), cluster)
	c.upstreamFilters(at.field("http_filters"), m.GetHttpFilters())
}

func (c *compiler) upstreamCommon(at *path, m *corev3.HttpProtocolOptions, cluster *Cluster) {
	if m == nil {
		return
	}
	cluster.IdleTimeout = c.duration(at.field("idle_timeout"), m.GetIdleTimeout(), cluster.IdleTimeout)
	cluster.MaxConnDuration = c.duration(at.field("max_connection_duration"), m.GetMaxConnectionDuration(), 0)
	cluster.MaxRequestsPerConn = uint32Or(m.GetMaxRequestsPerConnection(), cluster.MaxRequestsPerConn)
	if m.GetMaxStreamDuration().AsDuration() > 0 {
		c.refuse(at.field("max_stream_duration"), "is supported on routes and listeners, not on clusters")
	}
	if m.GetMaxHeadersCount() != nil {
		c.warn(at.field("max_headers_count"))
	}
}
