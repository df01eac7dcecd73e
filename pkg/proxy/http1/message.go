// Package http1 reads and writes HTTP/1.x messages (RFC 9110, RFC 9112) for a proxy.
//
// It is pure: bytes in, events out, no I/O, no clock, no goroutine. A parser is given whatever bytes have come,
// consumes what it can and says what it saw; the bytes it did not consume must be offered again, at the start of
// the next call, with more after them. The result is the same however the input is split. Heads go into a
// header.Block of the caller's, body bytes are handed on as slices of the caller's buffer: nothing is allocated
// per message.
//
// A proxy that is lenient is a proxy that smuggles: what RFC 9112 lets a recipient guess at is refused here
// (bare CR or LF, white space before the colon, folded lines, Content-Length beside Transfer-Encoding, and so
// on). The encoder for its part writes framing only from a Framing value, never from copied fields.
package http1

import "github.com/sockmesh/sockmesh/pkg/mesh"

// Event is what a parser saw.
type Event uint8

// Events of one message come in this order: (Informational)* Headers Data* Trailers? Complete, and for an
// upgraded or CONNECT connection Headers Tunnel.
const (
	// NeedMore: offer the bytes that were not consumed again, together with more.
	NeedMore Event = iota
	// Headers: the head is in the Block; the Message fields are valid.
	Headers
	// Informational: a 1xx response head other than 101; the final response follows and will use the same Block.
	Informational
	// Data: Data() has a piece of the body, a slice of the input.
	Data
	// Trailers: the trailer block is filled; Complete follows.
	Trailers
	// Complete: the message ended. Next must be called before more is parsed; bytes after it belong to the next message.
	Complete
	// Tunnel: what follows is not HTTP any more; nothing is consumed from here on.
	Tunnel
)

// String names the event, for tests and logs.
func (e Event) String() string {
	switch e {
	case NeedMore:
		return "need-more"
	case Headers:
		return "headers"
	case Informational:
		return "informational"
	case Data:
		return "data"
	case Trailers:
		return "trailers"
	case Complete:
		return "complete"
	case Tunnel:
		return "tunnel"
	}
	return "unknown"
}

// BodyKind is how the end of a body is found.
type BodyKind uint8

// Kinds of body.
const (
	NoBody BodyKind = iota
	FixedLength
	Chunked
	UntilClose // responses only
	Raw        // a tunnel: after 101 or a 2xx to CONNECT
)

// Framing is what a head says about what follows it, and about the connection.
type Framing struct {
	Body BodyKind
	// Length is the Content-Length value, -1 if there is none. It is also set where no body follows
	// (response to HEAD, 304).
	Length int64
	// KeepAlive: the sender lets the connection be used again after this message.
	KeepAlive bool
	// HTTP10: the sender speaks HTTP/1.0.
	HTTP10 bool
	// Upgrade: Connection has the upgrade option and an Upgrade field is there.
	Upgrade bool
	// Continue: the sender of a request waits for 100 (Continue) before the body.
	Continue bool
	// ProperCase is for the encoder only: names as in Content-Type instead of lower case.
	ProperCase bool
}

// Limits bound what a peer can make us keep.
type Limits struct {
	// HeadBytes bounds start line and fields together; the trailers too. Default 60 KiB as in Envoy.
	HeadBytes int
	// Fields bounds the number of fields; the trailers' too. Default 100 as in Envoy.
	Fields int
	// ChunkLine bounds one chunk-size line with its extensions, and ChunkExtensions those of a whole message.
	ChunkLine, ChunkExtensions int
}

// Default limits.
const (
	DefaultHeadBytes       = 60 << 10
	DefaultFields          = 100
	DefaultChunkLine       = 4 << 10
	DefaultChunkExtensions = 16 << 10
)

// withDefaults fills in what is zero.
func (l Limits) withDefaults() Limits {
	if l.HeadBytes <= 0 {
		l.HeadBytes = DefaultHeadBytes
	}
	if l.Fields <= 0 {
		l.Fields = DefaultFields
	}
	if l.ChunkLine <= 0 {
		l.ChunkLine = DefaultChunkLine
	}
	if l.ChunkExtensions <= 0 {
		l.ChunkExtensions = DefaultChunkExtensions
	}
	return l
}

// Options are a listener's settings that change what is accepted. The zero value is strict.
type Options struct {
	Limits
	// AcceptHTTP10 lets HTTP/1.0 requests pass; otherwise they are answered 426 as by Envoy.
	AcceptHTTP10 bool
	// DefaultHost is the authority of an HTTP/1.0 request that names none.
	DefaultHost string
	// OptionalHost accepts an HTTP/1.1 request without Host, which RFC 9112 section 3.2 forbids.
	OptionalHost bool
	// Underscores is headers_with_underscores_action.
	Underscores mesh.UnderscoresAction
	// NoAbsoluteForm refuses "GET http://host/path".
	NoAbsoluteForm bool
}
