package aside

import "github.com/sockmesh/sockmesh/pkg/proxy/loop"

// A message's body of known length is a piece of a connection that needs no looking at. Its beginning comes with the head, and
// its last byte must come to the proxy, too: that is how it learns that the body has ended and the next message begins. What
// is between may skip it. Two connections that have such a body between them are joined; the second body costs no system
// call. When one of them has a body in common with somebody else, which for pooled connections is usual, they are parted.

// MinBody is from how many bytes on the rest of a body may skip the proxy. Less isn't worth the look.
const MinBody = 64 << 10

// LongBody is from how many on it may although the proxy has not read all that has come: a sender that never pauses has to be made to
// wait for that, and for less it would be slower than going on.
const LongBody = 1 << 20

// PairFunc asks for bodies between two connections to skip the proxy. What it knows of them it leaves in the Ends. An error says
// why not. Called on the loops; must not block.
type PairFunc func(down, up *End) (Pairing, error)

// Pairing is two connections of which bodies may skip the proxy. Used on one loop.
type Pairing interface {
	Handle
	// Allow lets bytes skip the proxy, so many behind those that it has received and those that were carried. Forwarded is
	// right, and of what was allowed before nothing is to come.
	Allow(direction int, received, bytes uint64)
}

// PairUp is a PairFunc of what the datapath offers: a look at a socket, whose result holds as long as the socket, and the pairing
// of two that were looked at.
func PairUp[K any, P Pairing](look func(fd int) K, pair func(down, up K) (P, error)) PairFunc {
	known := func(e *End) K {
		k, ok := e.Known.(K)
		if !ok {
			k = look(e.FD)
			e.Known = k
		}
		return k
	}
	return func(down, up *End) (Pairing, error) {
		p, err := pair(known(down), known(up))
		if err != nil { // not a nil P in an interface
			return nil, err
		}
		return p, nil
	}
}

// End is one connection's share in this. The zero value is ready.
type End struct {
	// FD is set, and Known belongs to the PairFunc, which may remember there what doesn't change.
	FD    int
	Known any
	link  *Link
}

// Link joins two connections, until Leave or the end of either.
type Link struct {
	h        Pairing // nil: refused
	conns    [2]*loop.Conn
	ends     [2]*End
	dissolve func()
}

// Join returns the Link of two connections. It is asked for only where they were not the last to be joined to each other;
// a refusal holds as long.
func Join(ask PairFunc, down, up *End, downConn, upConn *loop.Conn) *Link {
	if l := down.link; l != nil && l == up.link {
		return l
	}
	Leave(down, up)
	l := &Link{conns: [2]*loop.Conn{downConn, upConn}, ends: [2]*End{down, up}}
	l.dissolve = l.end
	down.FD, up.FD = downConn.FD(), upConn.FD()
	if h, err := ask(down, up); err == nil {
		l.h = h
		// What they show is of no account yet; but from now on the end of either ends it.
		upConn.ShowWritten(h.Forwarded(ToServer), 0, l.dissolve)
		downConn.ShowWritten(h.Forwarded(ToClient), 0, l.dissolve)
		answer(h, downConn, upConn)
	}
	down.link, up.link = l, l
	return l
}

// Leave parts connections from those that they are joined to. No body of theirs is on its way past the proxy then.
func Leave(ends ...*End) {
	for _, e := range ends {
		if e != nil && e.link != nil {
			e.link.end()
		}
	}
}

func (l *Link) end() {
	for i, e := range l.ends {
		e.link = nil
		if l.h != nil {
			l.conns[i].HideWritten()
		}
	}
	if l.h != nil {
		l.h.Close()
	}
}

// Body is one message's. The zero value is one that is not allowed to skip the proxy.
type Body struct {
	h         Pairing
	direction int
	seen      uint64
}

// Begin lets a body skip the proxy, of which so many bytes are to come. All that has come is offered by now, and written to
// the far connection; nothing else is until the body's end. False: it may not.
func (b *Body) Begin(l *Link, direction int, left int64) bool {
	if l.h == nil {
		return false
	}
	from, to := l.conns[0], l.conns[1]
	if direction == ToClient {
		from, to = to, from
	}
	b.h, b.direction, b.seen = l.h, direction, l.h.Carried(direction)
	to.ShowWritten(l.h.Forwarded(direction), from.BytesRead()-to.BytesWritten()-uint64(to.Buffered()), l.dissolve)
	l.h.Allow(direction, from.BytesRead(), uint64(left-1))
	return true
}

// Settle returns how many bytes have skipped the proxy since it was called last.
func (b *Body) Settle() int64 {
	n := b.h.Carried(b.direction)
	since := n - b.seen
	b.seen = n
	return int64(since)
}

// Active is when the last byte between the two connections skipped the proxy, on the loop's clock; 0: none has.
func (b *Body) Active(l *loop.Loop) int64 { return active(b.h, l) }
