package header

// ID is a well-known field name. Fields of other names have ID None.
type ID uint8

// Well-known fields: those that the proxy itself looks at, and those that come often.
const (
	None ID = iota
	Accept
	AcceptEncoding
	AcceptLanguage
	Authorization
	CacheControl
	Connection
	ContentEncoding
	ContentLength
	ContentType
	Cookie
	Date
	ETag
	Expect
	Forwarded
	GRPCMessage
	GRPCStatus
	GRPCTimeout
	HTTP2Settings
	KeepAlive
	LastModified
	Location
	Origin
	ProxyAuthenticate
	ProxyAuthorization
	ProxyConnection
	Referer
	RetryAfter
	Server
	SetCookie
	TE
	Trailer
	TransferEncoding
	Traceparent
	Tracestate
	Upgrade
	UserAgent
	Vary
	Via
	XB3SpanID
	XB3TraceID
	XEnvoyAttemptCount
	XEnvoyDecoratorOperation
	XEnvoyDownstreamServiceCluster
	XEnvoyDownstreamServiceNode
	XEnvoyExpectedRqTimeoutMS
	XEnvoyExternalAddress
	XEnvoyForceTrace
	XEnvoyHedgeOnPerTryTimeout
	XEnvoyImmediateHealthCheckFail
	XEnvoyInternal
	XEnvoyIPTags
	XEnvoyMaxRetries
	XEnvoyOriginalHost
	XEnvoyOriginalPath
	XEnvoyOriginalURL
	XEnvoyOverloaded
	XEnvoyRateLimited
	XEnvoyRetriableHeaderNames
	XEnvoyRetriableStatusCodes
	XEnvoyRetryGRPCOn
	XEnvoyRetryOn
	XEnvoyStreamDurationMS
	XEnvoyUpstreamAltStatName
	XEnvoyUpstreamCanary
	XEnvoyUpstreamRqPerTryTimeoutMS
	XEnvoyUpstreamRqTimeoutMS
	XEnvoyUpstreamRqTimeoutAltResponse
	XEnvoyUpstreamServiceTime
	XForwardedClientCert
	XForwardedFor
	XForwardedHost
	XForwardedPort
	XForwardedProto
	XForwardedPrefix
	XRequestID
	numIDs
)

var names = [numIDs]string{
	Accept:                             "accept",
	AcceptEncoding:                     "accept-encoding",
	AcceptLanguage:                     "accept-language",
	Authorization:                      "authorization",
	CacheControl:                       "cache-control",
	Connection:                         "connection",
	ContentEncoding:                    "content-encoding",
	ContentLength:                      "content-length",
	ContentType:                        "content-type",
	Cookie:                             "cookie",
	Date:                               "date",
	ETag:                               "etag",
	Expect:                             "expect",
	Forwarded:                          "forwarded",
	GRPCMessage:                        "grpc-message",
	GRPCStatus:                         "grpc-status",
	GRPCTimeout:                        "grpc-timeout",
	HTTP2Settings:                      "http2-settings",
	KeepAlive:                          "keep-alive",
	LastModified:                       "last-modified",
	Location:                           "location",
	Origin:                             "origin",
	ProxyAuthenticate:                  "proxy-authenticate",
	ProxyAuthorization:                 "proxy-authorization",
	ProxyConnection:                    "proxy-connection",
	Referer:                            "referer",
	RetryAfter:                         "retry-after",
	Server:                             "server",
	SetCookie:                          "set-cookie",
	TE:                                 "te",
	Trailer:                            "trailer",
	TransferEncoding:                   "transfer-encoding",
	Traceparent:                        "traceparent",
	Tracestate:                         "tracestate",
	Upgrade:                            "upgrade",
	UserAgent:                          "user-agent",
	Vary:                               "vary",
	Via:                                "via",
	XB3SpanID:                          "x-b3-spanid",
	XB3TraceID:                         "x-b3-traceid",
	XEnvoyAttemptCount:                 "x-envoy-attempt-count",
	XEnvoyDecoratorOperation:           "x-envoy-decorator-operation",
	XEnvoyDownstreamServiceCluster:     "x-envoy-downstream-service-cluster",
	XEnvoyDownstreamServiceNode:        "x-envoy-downstream-service-node",
	XEnvoyExpectedRqTimeoutMS:          "x-envoy-expected-rq-timeout-ms",
	XEnvoyExternalAddress:              "x-envoy-external-address",
	XEnvoyForceTrace:                   "x-envoy-force-trace",
	XEnvoyHedgeOnPerTryTimeout:         "x-envoy-hedge-on-per-try-timeout",
	XEnvoyImmediateHealthCheckFail:     "x-envoy-immediate-health-check-fail",
	XEnvoyInternal:                     "x-envoy-internal",
	XEnvoyIPTags:                       "x-envoy-ip-tags",
	XEnvoyMaxRetries:                   "x-envoy-max-retries",
	XEnvoyOriginalHost:                 "x-envoy-original-host",
	XEnvoyOriginalPath:                 "x-envoy-original-path",
	XEnvoyOriginalURL:                  "x-envoy-original-url",
	XEnvoyOverloaded:                   "x-envoy-overloaded",
	XEnvoyRateLimited:                  "x-envoy-ratelimited",
	XEnvoyRetriableHeaderNames:         "x-envoy-retriable-header-names",
	XEnvoyRetriableStatusCodes:         "x-envoy-retriable-status-codes",
	XEnvoyRetryGRPCOn:                  "x-envoy-retry-grpc-on",
	XEnvoyRetryOn:                      "x-envoy-retry-on",
	XEnvoyStreamDurationMS:             "x-envoy-upstream-stream-duration-ms",
	XEnvoyUpstreamAltStatName:          "x-envoy-upstream-alt-stat-name",
	XEnvoyUpstreamCanary:               "x-envoy-upstream-canary",
	XEnvoyUpstreamRqPerTryTimeoutMS:    "x-envoy-upstream-rq-per-try-timeout-ms",
	XEnvoyUpstreamRqTimeoutMS:          "x-envoy-upstream-rq-timeout-ms",
	XEnvoyUpstreamRqTimeoutAltResponse: "x-envoy-upstream-rq-timeout-alt-response",
	XEnvoyUpstreamServiceTime:          "x-envoy-upstream-service-time",
	XForwardedClientCert:               "x-forwarded-client-cert",
	XForwardedFor:                      "x-forwarded-for",
	XForwardedHost:                     "x-forwarded-host",
	XForwardedPort:                     "x-forwarded-port",
	XForwardedProto:                    "x-forwarded-proto",
	XForwardedPrefix:                   "x-forwarded-prefix",
	XRequestID:                         "x-request-id",
}

// String is the lower-case name.
func (id ID) String() string { return names[id] }

// slots finds an ID by its name: a hash of length and three bytes, chosen at start so that no two known names
// meet; one compare then decides.
var (
	slots    [slotCount]ID
	hashSeed uint32
)

const slotCount = 1024

func slotOf(name string, seed uint32) uint32 {
	n := uint32(len(name))
	h := uint32(name[0]) | uint32(name[n>>1])<<8 | uint32(name[n-1])<<16 | n<<24
	h ^= uint32(name[(n*3)>>2]) << 4
	return (h * seed) >> 22
}

func init() {
	for seed := uint32(0x9e3779b1); ; seed += 2 {
		if fill(seed) {
			hashSeed = seed
			return
		}
	}
}

func fill(seed uint32) bool {
	clear(slots[:])
	for id := None + 1; id < numIDs; id++ {
		s := &slots[slotOf(names[id], seed)]
		if *s != None {
			return false
		}
		*s = id
	}
	return true
}

// Lookup returns the ID of a lower-case name, or None.
func Lookup(lower string) ID {
	if len(lower) == 0 {
		return None
	}
	if id := slots[slotOf(lower, hashSeed)]; names[id] == lower {
		return id
	}
	return None
}

// lowerTable maps A-Z to a-z and every other byte to itself.
var lowerTable = func() (t [256]byte) {
	for i := range t {
		t[i] = byte(i)
		if 'A' <= i && i <= 'Z' {
			t[i] += 'a' - 'A'
		}
	}
	return t
}()
