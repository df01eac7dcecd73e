package mesh

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
)

const (
	defaultBufferLimit            = 1 << 20
	defaultListenerFiltersTimeout = 15 * time.Second
	defaultTCPIdleTimeout         = time.Hour
)

// CompileListener turns a Listener into its runtime form. Where routes come by RDS, HTTP.Routes is nil until a
// Builder joins them.
func CompileListener(m *listenerv3.Listener, version string) (*Listener, []Warning, error) {
	c := newCompiler("listener", m.GetName())
	c.begin(m)
	l := &Listener{
		Name:                   m.GetName(),
		Version:                version,
		Direction:              Direction(m.GetTrafficDirection()),
		BindToPort:             boolOr(m.GetBindToPort(), true),
		UseOriginalDst:         boolOr(m.GetUseOriginalDst(), false),
		BufferLimit:            uint32Or(m.GetPerConnectionBufferLimitBytes(), defaultBufferLimit),
		ListenerFiltersTimeout: c.duration((*path)(nil).field("listener_filters_timeout"), m.GetListenerFiltersTimeout(), defaultListenerFiltersTimeout),
	}
	var root *path
	if m.GetName() == "" {
		c.refuse(root.field("name"), "must not be empty")
	}
	if l.UseOriginalDst {
		// The catch-all takes what others do not claim; where Envoy would listen for iptables' redirects, the
		// sockets are already there, inside each pod.
		l.BindToPort = false
	}
	if l.Direction == DirectionInbound && !l.BindToPort {
		c.refuse(root.field("traffic_direction"), "INBOUND without bind_to_port: taking connections to pods is not supported yet")
	}
	l.Addresses = c.address(root.field("address"), m.GetAddress(), l.Addresses)
	for i, additional := range m.GetAdditionalAddresses() {
		l.Addresses = c.address(root.field("additional_addresses").at(i).field("address"), additional.GetAddress(), l.Addresses)
	}
	l.AccessLog = c.accessLogs(root.field("access_log"), m.GetAccessLog())
	c.listenerFilters(l, m.GetListenerFilters())
	for i, fc := range m.GetFilterChains() {
		at := root.field("filter_chains").at(i)
		if chain := c.filterChain(at, fc); chain != nil {
			chain.Match = c.chainMatch(at.field("filter_chain_match"), fc.GetFilterChainMatch())
			l.Chains = append(l.Chains, chain)
		}
	}
	if m.GetDefaultFilterChain() != nil {
		l.Default = c.filterChain(root.field("default_filter_chain"), m.GetDefaultFilterChain())
	}
	if len(m.GetFilterChains()) == 0 && m.GetDefaultFilterChain() == nil {
		c.refuse(root.field("filter_chains"), "no filter chain")
	}
	if len(c.refused) == 0 {
		if err := l.Init(); err != nil {
			c.refuseError(root, err)
		}
	}
	l.OffloadReason = l.whyNotOffloaded(m)
	if err := c.err(); err != nil {
		return nil, c.warnings, err
	}
	return l, c.warnings, nil
}

// address appends a listener address; ipv4_compat adds the IPv4 wildcard to the IPv6 one.
func (c *compiler) address(at *path, a *corev3.Address, list []netip.AddrPort) []netip.AddrPort {
	socket := a.GetSocketAddress()
	if socket == nil {
		if a == nil {
			c.refuse(at, "an IP address and a port are needed")
		}
		return list
	}
	at = at.field("socket_address")
	if socket.GetProtocol() != corev3.SocketAddress_TCP {
		c.refuse(at.field("protocol"), "%s is not supported, only TCP", socket.GetProtocol())
	}
	ip, err := netip.ParseAddr(socket.GetAddress())
	if err != nil {
		c.refuse(at.field("address"), "%q is not an IP address", socket.GetAddress())
		return list
	}
	list = append(list, netip.AddrPortFrom(ip.Unmap(), uint16(socket.GetPortValue())))
	if socket.GetIpv4Compat() && ip.Is6() && ip.IsUnspecified() {
		list = append(list, netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(socket.GetPortValue())))
	}
	return list
}

// listenerFilters: the original destination is known of every connection already, so original_dst is what we do
// anyway. The inspectors sniff bytes for the filter chain match; without a chain that asks they are idle.
func (c *compiler) listenerFilters(l *Listener, filters []*listenerv3.ListenerFilter) {
	for i, f := range filters {
		at := (*path)(nil).field("listener_filters").at(i)
		name := typeName(f.GetTypedConfig())
		if name == "" {
			name = f.GetName()
		}
		switch {
		case strings.Contains(name, "original_dst"):
		case strings.Contains(name, "tls_inspector"):
			l.TLSInspector = true
		case strings.Contains(name, "http_inspector"):
			l.HTTPInspector = true
		default:
			c.refuse(at.field("typed_config"), "listener filter %q (%s) is not supported", f.GetName(), name)
		}
	}
}

// filterChain compiles a chain's terminal filter; nil after refusing.
func (c *compiler) filterChain(at *path, m *listenerv3.FilterChain) *FilterChain {
	chain := &FilterChain{Name: m.GetName()}
	c.plainTransport(at.field("transport_socket"), m.GetTransportSocket())
	for i, f := range m.GetFilters() {
		here := at.field("filters").at(i).field("typed_config")
		last := i == len(m.GetFilters())-1
		switch name := typeName(f.GetTypedConfig()); {
		case !last && (name == typeHCM || name == typeTCPProxy):
			c.refuse(here, "terminal filter %q must be the last one", f.GetName())
		case name == typeHCM:
			m := &hcmv3.HttpConnectionManager{}
			if c.unpack(here, f.GetTypedConfig(), m) {
				chain.HTTP = c.connectionManager(here, m)
			}
		case name == typeTCPProxy:
			m := &tcpv3.TcpProxy{}
			if c.unpack(here, f.GetTypedConfig(), m) {
				chain.TCP = c.tcpProxy(here, m)
			}
		default:
			c.refuse(here, "network filter %q (%s) is not supported", f.GetName(), name)
		}
	}
	if len(m.GetFilters()) == 0 {
		c.refuse(at.field("filters"), "empty: an http_connection_manager or a tcp_proxy is needed")
	}
	return chain
}

const (
	typeHCM       = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
	typeTCPProxy  = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
	typeRawBuffer = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
)

// plainTransport refuses every transport socket but raw_buffer, which is no transport socket.
func (c *compiler) plainTransport(at *path, ts *corev3.TransportSocket) {
	if ts == nil || typeName(ts.GetTypedConfig()) == typeRawBuffer ||
		ts.GetTypedConfig() == nil && ts.GetName() == "envoy.transport_sockets.raw_buffer" {
		return
	}
	c.refuse(at, "%q (%s) is not supported yet, only plain text", ts.GetName(), typeName(ts.GetTypedConfig()))
}

func (c *compiler) chainMatch(at *path, m *listenerv3.FilterChainMatch) ChainMatch {
	match := ChainMatch{
		DstPort:     uint16(m.GetDestinationPort().GetValue()),
		DstPrefixes: c.prefixes(at.field("prefix_ranges"), m.GetPrefixRanges()),
		DirectSrc:   c.prefixes(at.field("direct_source_prefix_ranges"), m.GetDirectSourcePrefixRanges()),
		SrcPrefixes: c.prefixes(at.field("source_prefix_ranges"), m.GetSourcePrefixRanges()),
		Transport:   m.GetTransportProtocol(),
		ALPN:        m.GetApplicationProtocols(),
		SourceType:  SourceType(m.GetSourceType()),
	}
	// The matcher knows these, but nothing looks into a connection's first bytes yet, so such a chain would never
	// be chosen.
	if len(m.GetServerNames()) > 0 {
		c.refuse(at.field("server_names"), "choosing by SNI is not supported yet")
	}
	if len(m.GetApplicationProtocols()) > 0 {
		c.refuse(at.field("application_protocols"), "choosing by protocol is not supported yet")
	}
	if t := m.GetTransportProtocol(); t != "" && t != "raw_buffer" {
		c.refuse(at.field("transport_protocol"), "%q is not supported yet, only raw_buffer", t)
	}
	for _, port := range m.GetSourcePorts() {
		match.SrcPorts = append(match.SrcPorts, uint16(port))
	}
	for i, name := range m.GetServerNames() {
		name = lowerASCII(name)
		if strings.HasPrefix(name, "*.") {
			name = name[1:]
		}
		if strings.Contains(name, "*") {
			c.refuse(at.field("server_names").at(i), "%q: a wildcard stands only for the first labels", name)
		}
		match.ServerNames = append(match.ServerNames, name)
	}
	return match
}

func (c *compiler) prefixes(at *path, ranges []*corev3.CidrRange) []netip.Prefix {
	var list []netip.Prefix
	for i, r := range ranges {
		ip, err := netip.ParseAddr(r.GetAddressPrefix())
		if err != nil {
			c.refuse(at.at(i).field("address_prefix"), "%q is not an IP address", r.GetAddressPrefix())
			continue
		}
		prefix, err := ip.Prefix(int(r.GetPrefixLen().GetValue()))
		if err != nil {
			c.refuse(at.at(i).field("prefix_len"), "%d is longer than the address", r.GetPrefixLen().GetValue())
			continue
		}
		if !slices.Contains(list, prefix) {
			list = append(list, prefix)
		}
	}
	return list
}

func (c *compiler) tcpProxy(at *path, m *tcpv3.TcpProxy) *TCPProxy {
	p := &TCPProxy{
		StatPrefix:                      m.GetStatPrefix(),
		IdleTimeout:                     c.duration(at.field("idle_timeout"), m.GetIdleTimeout(), defaultTCPIdleTimeout),
		MaxConnectAttempts:              int(uint32Or(m.GetMaxConnectAttempts(), 1)),
		MaxDownstreamConnectionDuration: c.duration(at.field("max_downstream_connection_duration"), m.GetMaxDownstreamConnectionDuration(), 0),
		AccessLog:                       c.accessLogs(at.field("access_log"), m.GetAccessLog()),
	}
	for i, w := range m.GetWeightedClusters().GetClusters() {
		p.Clusters = append(p.Clusters, WeightedCluster{Name: w.GetName(), Weight: w.GetWeight()})
		p.TotalWeight += uint64(w.GetWeight())
		if w.GetName() == "" {
			c.refuse(at.field("weighted_clusters").field("clusters").at(i).field("name"), "must not be empty")
		}
	}
	if m.GetCluster() != "" {
		p.Clusters, p.TotalWeight = []WeightedCluster{{Name: m.GetCluster(), Weight: 1}}, 1
	}
	if len(p.Clusters) == 0 {
		c.refuse(at, "cluster or weighted_clusters is needed")
	}
	return p
}

// whyNotOffloaded names what in the listener itself needs the proxy; see offload.go.
func (l *Listener) whyNotOffloaded(m *listenerv3.Listener) string {
	switch {
	case l.BindToPort:
		return "bind_to_port: true"
	case l.UseOriginalDst:
		return "use_original_dst: true"
	case l.Direction == DirectionInbound:
		return "traffic_direction: INBOUND"
	case len(l.AccessLog) > 0:
		return "access_log"
	case len(m.GetListenerFilters()) > 0 && (l.TLSInspector || l.HTTPInspector || l.ProxyProtocol):
		return "listener_filters"
	case len(l.Chains)+len(m.GetFilterChains()) == 0 && l.Default == nil:
		return "filter_chains: none"
	case len(m.GetFilterChains()) > 1:
		return "filter_chains: more than one"
	case len(m.GetFilterChains()) == 1 && l.Default != nil:
		return "default_filter_chain"
	}
	chain, field, source := l.Default, "default_filter_chain", m.GetDefaultFilterChain()
	if len(l.Chains) == 1 {
		chain, field, source = l.Chains[0], "filter_chains[0]", m.GetFilterChains()[0]
		for stage := range stages {
			if chain.Match.cares(stage) {
				return field + ".filter_chain_match"
			}
		}
	}
	var tcp tcpv3.TcpProxy
	switch {
	case chain == nil || chain.TCP == nil:
		return field + ".filters: not tcp_proxy"
	case len(chain.TCP.AccessLog) > 0:
		return field + ".filters[0].typed_config.access_log"
	case chain.TCP.MaxDownstreamConnectionDuration > 0:
		return field + ".filters[0].typed_config.max_downstream_connection_duration"
	case source.GetFilters()[0].GetTypedConfig().UnmarshalTo(&tcp) == nil && tcp.GetIdleTimeout().AsDuration() > 0:
		return field + ".filters[0].typed_config.idle_timeout"
	}
	return ""
}
