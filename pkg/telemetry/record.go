// Package telemetry says what the proxy did: the access log and the metrics.
//
// The proxy fills one Record for each request or connection (what Envoy calls StreamInfo) and hands it over when it
// ends. Everything on that path is bounded and allocates nothing: a log line is appended to a buffer that a
// goroutine writes (a full buffer drops lines and counts them, it never holds up a loop), and metrics are plain
// counters that only their loop touches, copied when somebody scrapes.
package telemetry

import (
	"net/netip"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// Protocol is what was spoken on a connection.
type Protocol uint8

// Protocols.
const (
	ProtocolNone Protocol = iota // TCP
	HTTP10
	HTTP11
	HTTP2
	HTTP3
)

// String is the name that %PROTOCOL% prints, empty for TCP.
func (p Protocol) String() string {
	return [...]string{"", "HTTP/1.0", "HTTP/1.1", "HTTP/2", "HTTP/3"}[p]
}

// Workload is one side of a request, as far as it is known. Shared and immutable.
type Workload struct {
	Namespace      string
	Pod            string // pod name
	Name           string // workload (Deployment…) name; the pod's if that is not known
	ServiceAccount string
	UID            string
}

// Record is what is known of one request or connection. The zero value is empty; a Record may be kept and
// used again (*r = Record{}). The strings and blocks that it points at need live only until the call it is given to returns.
//
// StartTime is wall clock. The other times are nanoseconds of one monotonic clock (loop.Now), 0 if the thing
// did not happen.
type Record struct {
	StartTime          int64 // wall clock, Unix nanoseconds: first byte of the request, or accept for TCP
	Begin              int64 // the same instant on the monotonic clock
	RequestEnd         int64 // last byte of the request received
	UpstreamBegin      int64 // first byte of the request sent upstream
	UpstreamRequestEnd int64 // last byte of the request sent upstream
	ResponseBegin      int64 // first byte of the response received from upstream
	UpstreamEnd        int64 // last byte of the response received from upstream
	DownstreamBegin    int64 // first byte of the response sent
	DownstreamEnd      int64 // last byte of the response sent
	End                int64 // the record is complete

	Protocol         Protocol
	UpstreamProtocol Protocol
	Status           int    // 0 if no response was begun
	Details          string // response code details: "via_upstream", "route_not_found", …
	// TerminationDetails is why a connection was ended by the proxy.
	TerminationDetails string
	Flags              Flags

	// Body bytes for HTTP, all bytes for TCP.
	BytesReceived, BytesSent uint64
	// Bytes of heads as received and sent, and to and from upstream everything on the wire.
	RequestHeaderBytes, ResponseHeaderBytes              uint64
	UpstreamBytesSent, UpstreamBytesReceived             uint64 // wire bytes
	UpstreamHeaderBytesSent, UpstreamHeaderBytesReceived uint64

	Request          *header.Block
	Response         *header.Block
	RequestTrailers  *header.Block
	ResponseTrailers *header.Block

	// OriginalPath, OriginalMethod and OriginalAuthority are as received, if the router changed them ("" if not).
	OriginalPath, OriginalAuthority string

	UpstreamHost             netip.AddrPort
	UpstreamLocal            netip.AddrPort
	UpstreamHostName         string // endpoint's hostname, if it has one
	UpstreamCluster          string
	UpstreamTransportFailure string
	Attempts                 uint32

	RouteName          string
	VirtualHost        string
	VirtualCluster     string
	Listener           string
	FilterChain        string
	ConnectionID       uint64
	StreamID           string         // x-request-id
	ServerName         string         // SNI
	DownstreamRemote   netip.AddrPort // after x-forwarded-for
	DownstreamDirect   netip.AddrPort // the peer itself
	DownstreamLocal    netip.AddrPort // what the client connected to: the original destination
	DownstreamTLS      string         // TLS version, empty for plaintext
	DownstreamPeerName string         // peer's SPIFFE ID or SAN, if it authenticated

	Source      *Workload // the pod that called, nil if not known
	Destination *Workload // the pod that answered, nil if not known
}
