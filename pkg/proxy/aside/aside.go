// Package aside is how the proxy steps out of the way of a connection that needs no more looking at: it asks the
// datapath to carry the bytes from the client's socket to the server's, and keeps only its two idle sockets, their end
// and the counts. How that is done is not the proxy's business; that it may end at any moment, with the bytes coming
// through the proxy again in order, is.
package aside

import (
	"sync/atomic"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
)

// Directions of a connection.
const (
	ToServer = iota
	ToClient
)

// Func asks for a connection's bytes to skip the proxy. down is the client's socket, up the endpoint's; toServer is how
// many of the bytes that were received from down up has taken, toClient the reverse. An error says why not; the connection
// goes on through the proxy. Called on the loops; must not block.
type Func func(down, up int, toServer, toClient uint64) (Handle, error)

// Handle is a connection whose bytes may skip the proxy. Used on one loop.
type Handle interface {
	// Forwarded is where the proxy shows how far it has forwarded a direction that (still, or again) comes through it.
	Forwarded(direction int) *atomic.Uint64
	// Calls is where a sender that waits for the proxy calls the loop with that number, by what numbers, one for each
	// direction: who calls wants all bytes of the direction forwarded before any others.
	Calls(loop int) (call, beat *atomic.Uint32, numbers [2]uint32)
	// Carried is how many bytes of a direction have skipped the proxy; also after Close.
	Carried(direction int) uint64
	// Quiet is how long ago the last one did; false: none has yet.
	Quiet() (time.Duration, bool)
	// Close comes before either socket is closed. It may be called again.
	Close()
}

// Pair is a pair of connections whose bytes skip the proxy. The zero value is one whose bytes don't.
type Pair struct {
	h   Handle
	off func()
}

// Lead is by how many bytes more was received on one connection than was written to the other when all of it has been
// forwarded: what came before the two became a pair, such as the head of a request. It may be negative, which is all
// the same to unsigned numbers that wrap around.
type Lead [2]uint64

// Step asks for it, for two open connections of one loop of which all that is received on one is written to the other,
// and nothing else is. It returns false if it is refused.
func (p *Pair) Step(ask Func, down, up *loop.Conn, lead Lead) bool {
	h, err := ask(down.FD(), up.FD(), up.BytesWritten()+lead[ToServer], down.BytesWritten()+lead[ToClient])
	if err != nil {
		return false
	}
	p.h = h
	p.off = func() { // nothing is shown any more in what is given back
		up.HideWritten()
		down.HideWritten()
		h.Close()
	}
	up.ShowWritten(h.Forwarded(ToServer), lead[ToServer], p.off)
	down.ShowWritten(h.Forwarded(ToClient), lead[ToClient], p.off)
	answer(h, down, up)
	return true
}

// answer has senders that wait for the proxy call it.
func answer(h Handle, down, up *loop.Conn) {
	call, beat, numbers := h.Calls(down.Loop().Index())
	desk := loop.Desk{Call: call, Beat: beat}
	down.AnswerCalls(desk, numbers[ToServer])
	up.AnswerCalls(desk, numbers[ToClient])
}

// Between is the Lead of two connections at this moment, in which neither is offering bytes to its handler.
func Between(down, up *loop.Conn) (l Lead) {
	l[ToServer] = down.BytesRead() - uint64(down.Unconsumed()) - up.BytesWritten() - uint64(up.Buffered())
	l[ToClient] = up.BytesRead() - uint64(up.Unconsumed()) - down.BytesWritten() - uint64(down.Buffered())
	return l
}

// End keeps further bytes from skipping the proxy, so that Carried is final.
func (p *Pair) End() {
	if p.h != nil {
		p.off()
	}
}

// On says whether Step has succeeded.
func (p *Pair) On() bool { return p.h != nil }

// Carried is how many bytes of a direction have skipped the proxy.
func (p *Pair) Carried(direction int) uint64 {
	if p.h == nil {
		return 0
	}
	return p.h.Carried(direction)
}

// Active is when the last byte skipped the proxy, on the loop's clock; 0: none has.
func (p *Pair) Active(l *loop.Loop) int64 {
	if p.h == nil {
		return 0
	}
	return active(p.h, l)
}

func active(h Handle, l *loop.Loop) int64 {
	ago, any := h.Quiet()
	if !any {
		return 0
	}
	return l.Now() - int64(ago)
}
