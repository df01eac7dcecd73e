package mesh

import (
	"regexp"
	"time"
)

// Request is what route matching asks of a request. Names are lower case. Implementations must not allocate.
type Request interface {
	// Authority is the Host header or :authority, as received.
	Authority() string
	// Path with its query string, after normalisation.
	Path() string
	Method() string
	Scheme() string
	// Header returns the value (several joined by ",") and whether the header is there.
	Header(name string) (string, bool)
	// NextHeader walks over the values of a repeated header one by one: the first one at or after position from, which
	// is 0 at the beginning, and where to go on. Position 0 in return says that there is none left.
	NextHeader(name string, from int) (value string, next int)
	// Random is one draw per request; runtime_fraction and weighted clusters derive theirs from it.
	Random() uint64
}

// RouteConfig is a compiled envoy.config.route.v3.RouteConfiguration.
type RouteConfig struct {
	Name    string
	Version string
	Hosts   []*VirtualHost
	// Headers of this level; those of host and route go before it unless MostSpecificWins.
	RequestHeaders, ResponseHeaders HeaderMutations
	MostSpecificWins                bool
	IgnorePort                      bool // ignore_port_in_host_matching
	MaxDirectResponseBody           uint32

	hosts    hostIndex
	clusters []string // that routes name, sorted
}

// VirtualHost is a compiled envoy.config.route.v3.VirtualHost.
type VirtualHost struct {
	Name                            string
	Domains                         []string
	Routes                          []*Route
	RequireTLS                      TLSRequirement
	RequestHeaders, ResponseHeaders HeaderMutations
	Retry                           *RetryPolicy
	IncludeAttemptCount             bool // x-envoy-attempt-count to the upstream
	AttemptCountInResponse          bool

	index routeIndex
}

// TLSRequirement is VirtualHost.require_tls.
type TLSRequirement uint8

// TLS requirements.
const (
	TLSNone TLSRequirement = iota
	TLSExternalOnly
	TLSAll
)

// Route is one compiled route. Exactly one of Cluster action (Action), Redirect and Direct is set.
type Route struct {
	Name     string
	Index    int // within its virtual host
	Match    RouteMatch
	Action   *RouteAction
	Redirect *Redirect
	Direct   *DirectResponse

	RequestHeaders, ResponseHeaders HeaderMutations

	// The levels above, so that a *Route is all that a request needs to keep.
	Host   *VirtualHost
	Config *RouteConfig
	// MutatesRequest and MutatesResponse: there are header mutations on this level or above.
	MutatesRequest, MutatesResponse bool
}

// RouteMatch is envoy.config.route.v3.RouteMatch.
type RouteMatch struct {
	Kind          PathKind
	Path          string         // prefix, exact path or separated prefix (lower case if IgnoreCase)
	Regex         *regexp.Regexp // Kind PathRegex; must match the whole path without query
	IgnoreCase    bool
	Headers       []*HeaderMatcher
	Query         []*QueryMatcher
	Cookies       []*CookieMatcher
	GRPC          bool
	FractionPPM   uint32 // parts per million that match
	FractionIsSet bool
}

// PathKind is how the path is compared.
type PathKind uint8

// Path kinds.
const (
	PathPrefix PathKind = iota
	PathExact
	PathSeparatedPrefix
	PathRegex
	PathConnect
)

// HeaderMatcher is envoy.config.route.v3.HeaderMatcher.
type HeaderMatcher struct {
	Name                string // lower case
	Kind                MatchKind
	String              *StringMatcher // Kind MatchString
	RangeStart          int64          // MatchRange: [start, end)
	RangeEnd            int64
	Present             bool // MatchPresent
	Invert              bool
	TreatMissingAsEmpty bool
}

// MatchKind is what a header or query matcher compares.
type MatchKind uint8

// Matcher kinds.
const (
	MatchPresent MatchKind = iota
	MatchString
	MatchRange
)

// StringKind is how a StringMatcher compares.
type StringKind uint8

// String matcher kinds.
const (
	StringExact StringKind = iota
	StringPrefix
	StringSuffix
	StringContains
	StringRegex // whole value
)

// StringMatcher is envoy.type.matcher.v3.StringMatcher.
type StringMatcher struct {
	Kind       StringKind
	Value      string // lower case if IgnoreCase
	Regex      *regexp.Regexp
	IgnoreCase bool
}

// QueryMatcher is envoy.config.route.v3.QueryParameterMatcher.
type QueryMatcher struct {
	Name    string
	String  *StringMatcher // nil: Present
	Present bool
}

// CookieMatcher is envoy.config.route.v3.CookieMatcher.
type CookieMatcher struct {
	Name   string
	String *StringMatcher
	Invert bool
}

// WeightedCluster is one of the clusters that traffic is split over.
type WeightedCluster struct {
	Name                            string
	ClusterHeader                   string
	Weight                          uint32
	RequestHeaders, ResponseHeaders HeaderMutations
	HostRewrite                     string
}

// RouteAction is envoy.config.route.v3.RouteAction.
type RouteAction struct {
	// Clusters has one entry (cluster, or a cluster_header in its ClusterHeader) or the weighted ones.
	// ClusterHeader repeats the header name for display. Use PickCluster.
	Clusters      []WeightedCluster
	TotalWeight   uint64
	ClusterHeader string
	// ClusterNotFoundCode: default 503.
	ClusterNotFoundCode int

	PrefixRewrite string
	HasPrefixRw   bool
	RegexRewrite  *RegexRewrite

	HostRewrite       string
	HostRewriteHeader string
	HostRewritePath   *RegexRewrite
	AutoHostRewrite   bool
	AppendXFHost      bool

	Timeout           time.Duration // default 15 s; 0 disables
	IdleTimeout       *time.Duration
	MaxStreamDuration *time.Duration
	Retry             *RetryPolicy
	Priority          uint8           // 0 default, 1 high
	Upgrades          map[string]bool // overrides the connection manager's
	HashPolicy        []HashPolicy
	Mirrors           []Mirror
}

// RegexRewrite is envoy.type.matcher.v3.RegexMatchAndSubstitute; Substitution uses \1 references, compiled to Go's.
type RegexRewrite struct {
	Regex        *regexp.Regexp
	Substitution string // in regexp.Expand form (${1})
}

// HashPolicy is one hash policy, for ring hash and maglev.
type HashPolicy struct {
	Header   string
	Cookie   string
	SourceIP bool
	Query    string
	Terminal bool
}

// Mirror is request_mirror_policies.
type Mirror struct {
	Cluster     string
	FractionPPM uint32
}

// Redirect is envoy.config.route.v3.RedirectAction.
type Redirect struct {
	Code          int
	Scheme        string
	HTTPS         bool
	Host          string
	Port          uint32
	Path          string
	PrefixRewrite string
	HasPrefixRw   bool
	RegexRewrite  *RegexRewrite
	StripQuery    bool
}

// DirectResponse is envoy.config.route.v3.DirectResponseAction.
type DirectResponse struct {
	Status int
	Body   []byte
}

// HeaderMutations are applied in order: removes first, then adds (Envoy's order).
type HeaderMutations struct {
	Remove []string // lower case
	Add    []HeaderAdd
}

// Empty says that there are none.
func (m *HeaderMutations) Empty() bool { return len(m.Remove)+len(m.Add) == 0 }

// AppendAction is envoy.config.core.v3.HeaderValueOption.HeaderAppendAction.
type AppendAction uint8

// Append actions.
const (
	AppendOrAdd AppendAction = iota
	AddIfAbsent
	OverwriteOrAdd
	Overwrite
)

// HeaderAdd adds one header. Value may hold command operators (%REQ(x)%…); Literal says that it holds none.
type HeaderAdd struct {
	Name      string // lower case
	Value     string
	Literal   bool
	Action    AppendAction
	KeepEmpty bool
}

// RetryOn is a set of retry conditions.
type RetryOn uint32

// Retry conditions, as in x-envoy-retry-on.
const (
	Retry5xx RetryOn = 1 << iota
	RetryGatewayError
	RetryReset
	RetryResetBeforeRequest
	RetryConnectFailure
	RetryEnvoyRateLimited
	RetryRetriable4xx
	RetryRefusedStream
	RetryRetriableStatusCodes
	RetryRetriableHeaders
	RetryHTTP3PostConnectFailure
)

// RetryPolicy is envoy.config.route.v3.RetryPolicy.
type RetryPolicy struct {
	On                RetryOn
	Retries           uint32 // default 1
	PerTryTimeout     time.Duration
	PerTryIdleTimeout time.Duration
	StatusCodes       []int
	BackOffBase       time.Duration // default 25 ms
	BackOffMax        time.Duration // default 10 x base
	// PreviousHosts: avoid endpoints tried already; HostAttempts bounds the search (default 1).
	PreviousHosts    bool
	HostAttempts     int
	RetriableHeaders []*HeaderMatcher
}
