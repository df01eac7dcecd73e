// Package stream is the one interface between HTTP codecs and the router: a request or a response as headers,
// data with flow control, trailers and an end, whatever the HTTP version on the wire.
//
// How bytes flow. A codec connection owns a socket. As bytes arrive it parses them and calls the Handler of
// the message they belong to; slices passed to OnData are the socket's own read buffer and are only valid
// during the call. The router is the Handler of both sides: what it hears from one Stream it says to the
// other, in the same call, so that a byte is read, framed and put on the far socket's write queue without
// being kept in between.
//
// How backpressure flows, the other way. When a socket's write queue passes its high watermark its Stream
// becomes Blocked; the router, who looks after each SendData, then pauses the Stream that feeds it, whose
// socket is no longer read, until the kernel's window closes and the sender stops. When the queue has
// drained, OnWritable tells the router to resume. So each direction of a request holds at most one read
// buffer and one write queue.
//
// Everything happens on one loop: no call here is safe from another goroutine, and none blocks. A Stream may
// call its Handler from within a Send (the peer was gone), so a Handler looks at its own state after each.
package stream

import (
	"net/netip"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Stream is the sending half of one exchange and the tap of its receiving half. On the downstream side it
// receives a request and sends a response, upstream it is the other way about; both sides are the same type
// so that any codec meets any other.
type Stream interface {
	// SendInformational sends a 1xx head other than 101. Downstream only.
	SendInformational(h *header.Block)
	// SendHeaders sends the head; end says that neither data nor trailers follow. h is not kept.
	SendHeaders(h *header.Block, end bool)
	// SendData sends part of the body. b is not kept.
	SendData(b []byte, end bool)
	// SendTrailers sends trailers and ends the message.
	SendTrailers(h *header.Block)
	// Reset abandons the exchange in both directions. The Handler is not called again.
	Reset(r Reason)
	// Pause stops OnData, OnTrailers and the peer's sending; Resume undoes it. They do not nest.
	Pause()
	Resume()
	// Blocked says that what was sent waits above the high watermark: stop sending until OnWritable.
	Blocked() bool
}

// Tunnel is what a Stream is, too, whose connection carries nothing but the bytes of this one exchange once it has become
// a tunnel: what it receives and has not offered yet is the Conn's, and what it sends goes out as it is.
type Tunnel interface {
	// TunnelConn is that connection; nil while, or where, that isn't so.
	TunnelConn() *loop.Conn
}

// Carrier is what a Stream is, too, of which the body of a message may skip the proxy for the most part: package aside.
type Carrier interface {
	// Incoming is the connection by which the body of the present message comes as it is, and how many bytes of it have not
	// been offered yet. Outgoing is the one onto which the body is written as it is, and how many are still to be sent. nil
	// where there is no such body or connection.
	Incoming() (c *loop.Conn, left int64)
	Outgoing() (c *loop.Conn, left int64)
	// Came and Went say that n bytes of the one and of the other body have gone another way.
	Came(n int64)
	Went(n int64)
	// Watch has s called whenever something has come, before it is looked at. nil ends that.
	Watch(s Settler)
	// AsideEnd is the connection in the eyes of package aside.
	AsideEnd() *aside.End
}

// Settler accounts for what has gone another way until now.
type Settler interface{ Settle() }

// Handler is told what arrives on a Stream. After OnReset, or once both directions have ended, it is not
// called again and the Stream must not be used.
type Handler interface {
	// OnInformational is a 1xx head other than 101. Upstream only.
	OnInformational(h *header.Block)
	// OnHeaders is the head, parsed into the block that the Handler lent.
	OnHeaders(end bool)
	// OnData is part of the body; b is valid during the call.
	OnData(b []byte, end bool)
	// OnWaiting: all that has come of a body of known length was offered, and aside.MinBody bytes or more are still to come.
	OnWaiting()
	// OnTrailers ends the message with trailers, parsed into the block that the Handler lent.
	OnTrailers()
	// OnReset ends the exchange: the peer is gone or talks nonsense. detail says how, for people; empty if
	// there is no more to say than the reason.
	OnReset(r Reason, detail string)
	// OnWritable says that a Stream that was Blocked is so no more.
	OnWritable()
}

// Connector hands out streams to one upstream host on behalf of one source pod: a connection pool.
type Connector interface {
	// Open asks for a stream. w is told exactly once, possibly before Open returns, unless it is cancelled.
	Open(w *Wait)
}

// Opener waits for a Connector's answer.
type Opener interface {
	// OnStream hands over a stream whose Handler is the one named in the Wait.
	OnStream(s Stream, info *UpstreamInfo)
	// OnOpenFailed says why there is none.
	OnOpenFailed(r Reason, detail string)
}

// Wait is one request for a stream. The caller owns it, so that waiting costs no allocation, and must not
// reuse it before it was answered or cancelled.
type Wait struct {
	Opener  Opener
	Handler Handler
	// Head and Trailers are lent to the codec for the response.
	Head, Trailers *header.Block
	// Method decides how the response is framed (HEAD, CONNECT); Upgrade says that a 101 is acceptable.
	Method  []byte
	Upgrade bool
	// Fresh demands a connection that has carried nothing yet.
	Fresh bool
	// Priority chooses the circuit breakers: 0 default, 1 high.
	Priority uint8

	// Canceller is set by the Connector while the wait is in its queue.
	Canceller Canceller
	// Next and Prev belong to the Connector.
	Next, Prev *Wait
}

// Canceller takes a Wait back.
type Canceller interface{ CancelWait(w *Wait) }

// Cancel withdraws the request, if it is still waiting.
func (w *Wait) Cancel() {
	if c := w.Canceller; c != nil {
		w.Canceller = nil
		c.CancelWait(w)
	}
}

// UpstreamInfo is what is worth knowing about the connection that carries a stream. It belongs to the codec,
// which keeps the counts up to date; read it before the stream ends.
type UpstreamInfo struct {
	Local, Remote netip.AddrPort
	// Requests that the connection had carried before this one.
	Requests uint64
	// Bytes on the wire for this exchange, heads included, and of the heads alone.
	Sent, Received, HeadSent, HeadReceived uint64
	// Answered: at least a byte has come back.
	Answered bool
}

// ServerStream is the downstream side's Stream.
type ServerStream interface {
	Stream
	// Finish says that the Handler has done with an exchange whose response was sent completely. The codec
	// may begin the next one, or close if the request has not ended.
	Finish()
}

// Source is who connects: a pod of this node, or the node itself. Pools and sockets are never shared between
// sources.
type Source struct {
	Key      uint64      // netns cookie; 0 is the node
	Netns    *loop.Netns // nil: the node's own
	IPs      []netip.Addr
	Workload *telemetry.Workload // nil if there is nothing to say (the node)
}

// ConnInfo is what is known of a downstream connection before its first byte. It outlives the connection's
// requests. Its owner may bring Listener and Chain up to date on the connection's loop; requests to come use
// them then.
type ConnInfo struct {
	Source   *Source // never nil
	Listener *mesh.Listener
	Chain    *mesh.FilterChain
	// Orig is the original destination, Peer the client as the application sees itself: its own address, not
	// the loopback one that the redirected connection came by.
	Orig, Peer  netip.AddrPort
	Accelerated bool
	// ID of the connection, unique within the process.
	ID uint64
}
