package mesh

import (
	"net/netip"
	"time"
)

// Direction is config.core.v3.TrafficDirection.
type Direction uint8

// Directions of a listener.
const (
	DirectionUnspecified Direction = iota
	DirectionInbound
	DirectionOutbound
)

// Listener is a compiled envoy.config.listener.v3.Listener.
type Listener struct {
	Name      string
	Version   string // xDS version that it came with
	Direction Direction
	// BindToPort: a real listening socket in the node's network namespace. Otherwise it claims pods' connections.
	BindToPort bool
	// UseOriginalDst: the catch-all for what no other listener claims.
	UseOriginalDst bool
	// Addresses are the address and the additional ones; an unspecified IP is a wildcard.
	Addresses []netip.AddrPort
	// Chains in configuration order; Default may be nil. Use Chain to choose.
	Chains  []*FilterChain
	Default *FilterChain

	// ProxyProtocol: a PROXY protocol header is expected first (listener filter).
	ProxyProtocol bool
	// TLSInspector and HTTPInspector: the listener filters are present (chains may match on what they find).
	TLSInspector, HTTPInspector bool
	// ListenerFiltersTimeout bounds the wait for the listener filters' bytes; 0 disables. Envoy default 15 s.
	ListenerFiltersTimeout time.Duration
	// BufferLimit is per_connection_buffer_limit_bytes. Envoy default 1 MiB.
	BufferLimit uint32
	AccessLog   []*AccessLog

	// OffloadReason is why the kernel can't carry this listener, naming the field; empty if it can.
	OffloadReason string

	matcher *chainMatcher
}

// ChainInput is what a filter chain is chosen by.
type ChainInput struct {
	Dst        netip.AddrPort // original destination
	Src        netip.AddrPort // peer as the application pod's address
	DirectSrc  netip.Addr
	ServerName string // SNI, lower case, empty if none
	Transport  string // "raw_buffer" or "tls"
	ALPN       []string
	SrcIsLocal bool
}

// FilterChain is a compiled filter chain. Exactly one of HTTP and TCP is set.
type FilterChain struct {
	Name string
	// Match is what the chain was configured with, for display; use Listener.Chain to choose.
	Match ChainMatch
	// Filters are the non-terminal network filters, in order (rbac, connection_limit, … : later).
	HTTP *HTTPConnectionManager
	TCP  *TCPProxy
	// TransportSocketConnectTimeout and TLS are for later; a chain with a transport socket is refused today.
}

// TCPProxy is envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.
type TCPProxy struct {
	StatPrefix string
	// Clusters has one entry, or the weighted ones.
	Clusters    []WeightedCluster
	TotalWeight uint64
	// IdleTimeout: 0 disables; Envoy's default is 1 h.
	IdleTimeout time.Duration
	// MaxConnectAttempts: at least 1.
	MaxConnectAttempts int
	// MaxDownstreamConnectionDuration: 0 disables.
	MaxDownstreamConnectionDuration time.Duration
	AccessLog                       []*AccessLog
}

// HTTPConnectionManager is envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.
type HTTPConnectionManager struct {
	StatPrefix string
	// RouteConfigName is set where routes come by RDS; Routes is what was in force when the snapshot that this
	// value is from was published (never nil in a published snapshot). A connection outlives snapshots: for a
	// new request on an old connection ask the current one, Snapshot.Routes.
	RouteConfigName string
	Routes          *RouteConfig

	ServerName             string // "envoy" unless set; what the server header says
	ServerHeader           ServerHeaderMode
	UseRemoteAddress       bool
	SkipXFFAppend          bool
	XFFNumTrustedHops      uint32
	Via                    string
	GenerateRequestID      bool // default true
	PreserveExternalReqID  bool
	AlwaysSetReqIDInResp   bool
	NormalizePath          bool
	MergeSlashes           bool
	EscapedSlashes         EscapedSlashesAction
	HeadersUnderscores     UnderscoresAction
	StripPort              StripPortMode
	StripTrailingHostDot   bool
	AcceptHTTP10           bool
	DefaultHostForHTTP10   string
	AllowAbsoluteURL       bool // default true
	ProperCaseHeaders      bool
	Upgrades               map[string]bool // lower-case upgrade type -> enabled
	MaxRequestHeadersBytes uint32          // default 60 KiB
	MaxHeadersCount        uint32          // default 100
	IdleTimeout            time.Duration   // connection; default 1 h; 0 disables
	StreamIdleTimeout      time.Duration   // default 5 min; 0 disables
	RequestTimeout         time.Duration   // whole request received; 0 disables
	RequestHeadersTimeout  time.Duration   // 0 disables
	MaxConnectionDuration  time.Duration   // 0 disables
	MaxStreamDuration      time.Duration   // 0 disables
	MaxRequestsPerConn     uint32          // 0: unlimited
	DrainTimeout           time.Duration   // default 5 s
	DelayedCloseTimeout    time.Duration   // default 1 s
	AccessLog              []*AccessLog

	// Router filter settings.
	SuppressEnvoyHeaders  bool
	RespectExpectedRqTime bool
	UpstreamLog           []*AccessLog

	// place is listener and chain, by which later versions of the same connection manager are found.
	place string
}

// ServerHeaderMode is server_header_transformation.
type ServerHeaderMode uint8

// Modes of the server response header.
const (
	ServerHeaderOverwrite ServerHeaderMode = iota
	ServerHeaderAppendIfAbsent
	ServerHeaderPassThrough
)

// EscapedSlashesAction is path_with_escaped_slashes_action.
type EscapedSlashesAction uint8

// What happens to %2F and %5C in a path.
const (
	EscapedSlashesKeep EscapedSlashesAction = iota
	EscapedSlashesReject
	EscapedSlashesRedirect
	EscapedSlashesForward
)

// UnderscoresAction is headers_with_underscores_action.
type UnderscoresAction uint8

// What happens to header names with underscores.
const (
	UnderscoresAllow UnderscoresAction = iota
	UnderscoresReject
	UnderscoresDrop
)

// StripPortMode says which port of the Host header is removed.
type StripPortMode uint8

// Port stripping.
const (
	StripPortNone StripPortMode = iota
	StripPortMatching
	StripPortAny
)

// AccessLog is one access log of a listener, connection manager or tcp_proxy.
type AccessLog struct {
	// Path of a file; "/dev/stdout" and "/dev/stderr" mean the agent's own.
	Path string
	// Format is an Envoy format string (text), ending in a newline as Envoy's default does; empty if JSON is set.
	Format string
	// JSON has Envoy command operators in its string leaves (map[string]any, []any, string); nil for text.
	JSON any
	// OmitEmpty is omit_empty_values.
	OmitEmpty bool
	// Filter decides by status, duration, flags…; nil logs everything.
	Filter *AccessLogFilter
}

// AccessLogFilter is the subset of envoy.config.accesslog.v3.AccessLogFilter that is supported. Exactly one
// field group is set.
type AccessLogFilter struct {
	And, Or       []*AccessLogFilter
	StatusCode    *Comparison
	DurationMS    *Comparison
	ResponseFlags []string // any of them; empty slice (non-nil): any flag at all
	Header        *HeaderMatcher
	NotHealth     bool
	FractionPPM   *uint32 // runtime filter, parts per million
}

// Comparison is envoy.config.accesslog.v3.ComparisonFilter.
type Comparison struct {
	Op    byte // '=', '>' (GE), '<' (LE), '!' (NE)
	Value uint64
}
