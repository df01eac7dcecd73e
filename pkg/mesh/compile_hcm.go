package mesh

import (
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

const typeRouter = "envoy.extensions.filters.http.router.v3.Router"

// connectionManager compiles an HttpConnectionManager with Envoy's defaults.
func (c *compiler) connectionManager(at *path, m *hcmv3.HttpConnectionManager) *HTTPConnectionManager {
	common, h1 := m.GetCommonHttpProtocolOptions(), m.GetHttpProtocolOptions()
	commonAt, h1At := at.field("common_http_protocol_options"), at.field("http_protocol_options")
	h := &HTTPConnectionManager{
		StatPrefix:             m.GetStatPrefix(),
		ServerName:             m.GetServerName(),
		ServerHeader:           ServerHeaderMode(m.GetServerHeaderTransformation()),
		UseRemoteAddress:       boolOr(m.GetUseRemoteAddress(), false),
		SkipXFFAppend:          m.GetSkipXffAppend(),
		XFFNumTrustedHops:      m.GetXffNumTrustedHops(),
		Via:                    m.GetVia(),
		GenerateRequestID:      boolOr(m.GetGenerateRequestId(), true),
		PreserveExternalReqID:  m.GetPreserveExternalRequestId(),
		AlwaysSetReqIDInResp:   m.GetAlwaysSetRequestIdInResponse(),
		NormalizePath:          boolOr(m.GetNormalizePath(), false),
		MergeSlashes:           m.GetMergeSlashes(),
		EscapedSlashes:         escapedSlashes(m.GetPathWithEscapedSlashesAction()),
		HeadersUnderscores:     UnderscoresAction(common.GetHeadersWithUnderscoresAction()),
		StripTrailingHostDot:   m.GetStripTrailingHostDot(),
		AcceptHTTP10:           h1.GetAcceptHttp_10(),
		DefaultHostForHTTP10:   h1.GetDefaultHostForHttp_10(),
		AllowAbsoluteURL:       boolOr(h1.GetAllowAbsoluteUrl(), true),
		ProperCaseHeaders:      h1.GetHeaderKeyFormat().GetProperCaseWords() != nil,
		Upgrades:               map[string]bool{},
		MaxRequestHeadersBytes: uint32Or(m.GetMaxRequestHeadersKb(), 60) << 10,
		MaxHeadersCount:        uint32Or(common.GetMaxHeadersCount(), 100),
		IdleTimeout:            c.duration(commonAt.field("idle_timeout"), common.GetIdleTimeout(), time.Hour),
		StreamIdleTimeout:      c.duration(at.field("stream_idle_timeout"), m.GetStreamIdleTimeout(), 5*time.Minute),
		RequestTimeout:         c.duration(at.field("request_timeout"), m.GetRequestTimeout(), 0),
		RequestHeadersTimeout:  c.duration(at.field("request_headers_timeout"), m.GetRequestHeadersTimeout(), 0),
		MaxConnectionDuration:  c.duration(commonAt.field("max_connection_duration"), common.GetMaxConnectionDuration(), 0),
		MaxStreamDuration:      c.duration(commonAt.field("max_stream_duration"), common.GetMaxStreamDuration(), 0),
		MaxRequestsPerConn:     uint32Or(common.GetMaxRequestsPerConnection(), 0),
		DrainTimeout:           c.duration(at.field("drain_timeout"), m.GetDrainTimeout(), 5*time.Second),
		DelayedCloseTimeout:    c.duration(at.field("delayed_close_timeout"), m.GetDelayedCloseTimeout(), time.Second),
		AccessLog:              c.accessLogs(at.field("access_log"), m.GetAccessLog()),
	}
	if h.ServerName == "" {
		h.ServerName = "envoy"
	}
	switch {
	case m.GetStripAnyHostPort() && m.GetStripMatchingHostPort():
		c.refuse(at.field("strip_any_host_port"), "cannot be set together with strip_matching_host_port")
	case m.GetStripAnyHostPort():
		h.StripPort = StripPortAny
	case m.GetStripMatchingHostPort():
		h.StripPort = StripPortMatching
	}
	if t := m.GetCodecType(); t != hcmv3.HttpConnectionManager_AUTO && t != hcmv3.HttpConnectionManager_HTTP1 {
		c.refuse(at.field("codec_type"), "%s is not supported yet, only HTTP/1", t)
	}
	if m.GetForwardClientCertDetails() == hcmv3.HttpConnectionManager_ALWAYS_FORWARD_ONLY {
		c.refuse(at.field("forward_client_cert_details"), "ALWAYS_FORWARD_ONLY is not supported: x-forwarded-client-cert is always removed")
	}
	if h1.GetHeaderKeyFormat().GetStatefulFormatter() != nil {
		c.warn(h1At.field("header_key_format").field("stateful_formatter"))
	}
	for i, u := range m.GetUpgradeConfigs() {
		c.upgrade(at.field("upgrade_configs").at(i), h.Upgrades, u.GetUpgradeType(), boolOr(u.GetEnabled(), true))
	}
	c.requestID(at.field("request_id_extension"), m.GetRequestIdExtension())
	c.routes(at, m, h)
	c.httpFilters(at.field("http_filters"), m.GetHttpFilters(), h)
	return h
}

func escapedSlashes(a hcmv3.HttpConnectionManager_PathWithEscapedSlashesAction) EscapedSlashesAction {
	switch a {
	case hcmv3.HttpConnectionManager_REJECT_REQUEST:
		return EscapedSlashesReject
	case hcmv3.HttpConnectionManager_UNESCAPE_AND_REDIRECT:
		return EscapedSlashesRedirect
	case hcmv3.HttpConnectionManager_UNESCAPE_AND_FORWARD:
		return EscapedSlashesForward
	}
	return EscapedSlashesKeep // Envoy's implementation-specific default too
}

func (c *compiler) upgrade(at *path, upgrades map[string]bool, name string, enabled bool) {
	name = lowerASCII(name)
	if _, twice := upgrades[name]; twice {
		c.refuse(at.field("upgrade_type"), "%q is there twice", name)
	}
	upgrades[name] = enabled
}

// requestID accepts the default generator, which is a random UUID. What it could be told in addition concerns
// tracing.
func (c *compiler) requestID(at *path, e *hcmv3.RequestIDExtension) {
	switch name := typeName(e.GetTypedConfig()); name {
	case "":
	case "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig":
		c.warn(at)
	default:
		c.refuse(at, "%s is not supported", name)
	}
}

func (c *compiler) routes(at *path, m *hcmv3.HttpConnectionManager, h *HTTPConnectionManager) {
	switch {
	case m.GetRds() != nil:
		h.RouteConfigName = m.GetRds().GetRouteConfigName()
		if h.RouteConfigName == "" {
			c.refuse(at.field("rds").field("route_config_name"), "must not be empty")
		}
		c.configSource(at.field("rds").field("config_source"), m.GetRds().GetConfigSource())
	case m.GetRouteConfig() != nil:
		h.Routes = c.routeConfig(at.field("route_config"), m.GetRouteConfig(), "")
	}
}

// configSource checks where routes or endpoints are to come from; pkg/xds then subscribes there.
func (c *compiler) configSource(at *path, s *corev3.ConfigSource) {
	if s.GetConfigSourceSpecifier() == nil {
		c.refuse(at, "ads, self, api_config_source or path_config_source is needed")
	}
	api := s.GetApiConfigSource()
	if api == nil {
		return
	}
	at = at.field("api_config_source")
	if t := api.GetApiType(); t != corev3.ApiConfigSource_GRPC && t != corev3.ApiConfigSource_DELTA_GRPC {
		c.refuse(at.field("api_type"), "%s is not supported, only GRPC and DELTA_GRPC", t)
	}
	if len(api.GetGrpcServices()) == 0 {
		c.refuse(at.field("grpc_services"), "empty")
	}
}

// httpFilters: the router is all there is so far. A filter that the configuration itself can do without is left
// out and reported; any other would silently not protect or change what it was put there for.
func (c *compiler) httpFilters(at *path, filters []*hcmv3.HttpFilter, h *HTTPConnectionManager) {
	hasRouter := false
	for i, f := range filters {
		here := at.at(i)
		if typeName(f.GetTypedConfig()) == typeRouter {
			if i != len(filters)-1 {
				c.refuse(here, "the router must be the last filter")
			}
			m := &routerv3.Router{}
			if c.unpack(here.field("typed_config"), f.GetTypedConfig(), m) {
				hasRouter = true
				h.SuppressEnvoyHeaders = m.GetSuppressEnvoyHeaders()
				h.RespectExpectedRqTime = m.GetRespectExpectedRqTimeout()
				h.UpstreamLog = c.accessLogs(here.field("typed_config").field("upstream_log"), m.GetUpstreamLog())
				c.upstreamFilters(here.field("typed_config").field("upstream_http_filters"), m.GetUpstreamHttpFilters())
			}
			continue
		}
		c.skipFilter(here, f)
	}
	if !hasRouter {
		c.refuse(at, "no envoy.filters.http.router at the end")
	}
}

func (c *compiler) skipFilter(at *path, f *hcmv3.HttpFilter) {
	if f.GetIsOptional() || f.GetDisabled() {
		c.warn(at.key(f.GetName()))
		return
	}
	name := typeName(f.GetTypedConfig())
	if f.GetConfigDiscovery() != nil {
		name = "config_discovery"
	}
	c.refuse(at.field("typed_config"), "HTTP filter %q (%s) is not supported", f.GetName(), name)
}

// upstreamFilters accepts the codec, which ends every upstream filter chain.
func (c *compiler) upstreamFilters(at *path, filters []*hcmv3.HttpFilter) {
	for i, f := range filters {
		if typeName(f.GetTypedConfig()) != "envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec" {
			c.skipFilter(at.at(i), f)
		}
	}
}

// perFilterConfig looks at settings for filters, none of which exist here. One that only switches a filter off,
// or may be left out, changes nothing; any other asks for something that would not happen.
func (c *compiler) perFilterConfig(at *path, configs map[string]*anypb.Any) {
	at = at.field("typed_per_filter_config")
	for name, config := range configs {
		here := at.key(name)
		wrapper := &routev3.FilterConfig{}
		if typeName(config) == "envoy.config.route.v3.FilterConfig" && config.UnmarshalTo(wrapper) == nil {
			if wrapper.GetDisabled() || wrapper.GetIsOptional() {
				c.warn(here)
				continue
			}
			config = wrapper.GetConfig()
		}
		kind := typeName(config)
		if strings.HasSuffix(kind, "PerRoute") && disablesFilter(config) {
			c.warn(here)
			continue
		}
		if kind == "" {
			kind = "switched on here"
		}
		c.refuse(here, "HTTP filter %q (%s) is not supported", name, kind)
	}
}

// disablesFilter says that a …PerRoute message has "disabled: true" and so switches its filter off.
func disablesFilter(config *anypb.Any) bool {
	m, err := config.UnmarshalNew()
	if err != nil {
		return false
	}
	d, ok := m.(interface{ GetDisabled() bool })
	return ok && d.GetDisabled()
}
