package loop

import (
	"net/netip"
	"sync/atomic"
	"time"
)

// Handler is told what happens to a connection, always on the loop's thread and never from within a call that
// it made itself.
type Handler interface {
	// OnConnect ends a Dial. After an error OnClose follows at once.
	OnConnect(c *Conn, err error)
	// OnData offers what has been received. The bytes are lent: they are valid until OnData returns. What is
	// not consumed is kept and offered again in front of what comes next, or after ResumeRead.
	OnData(c *Conn, b []byte) (consumed int)
	// OnEOF: the peer has ended its direction (FIN) and everything before it has been offered. The other
	// direction goes on until CloseWrite or Close.
	OnEOF(c *Conn)
	// OnDrained: pending output has fallen to the low watermark after having been above the high one.
	OnDrained(c *Conn)
	// OnClose is the last call and comes exactly once, also after Close and Abort (err nil), a failed Dial, a
	// broken connection (err says how) and the loop's end (ErrStopped).
	OnClose(c *Conn, err error)
}

// Options of a connection. The zero value works.
type Options struct {
	// BufferLimit is the high watermark of pending output; the low one is half of it. 0 means 1 MiB. It
	// bounds nothing by itself: who writes asks AboveHigh and waits for OnDrained.
	BufferLimit int
	// ReadLimit bounds the unconsumed input that is kept; a connection that reaches it isn't read from until
	// its handler consumes. 0 means 128 KiB.
	ReadLimit int
	// KeepUnread: a reset that arrives while reading is paused doesn't end the connection before what had
	// been received ahead of it was offered. For who must carry every byte that plain TCP would have carried.
	KeepUnread bool
	// Paused starts with reading paused.
	Paused bool
	// Owner, if not nil, is told of the connection's end after its handler, whoever that is by then.
	Owner Owner
}

// Owner keeps account of connections without handling them.
type Owner interface{ ConnClosed(c *Conn) }

const (
	defaultBufferLimit = 1 << 20
	defaultReadLimit   = 128 << 10
	// A closing connection whose peer takes nothing for closeStall, or isn't done after closeTotal, is aborted.
	closeStall = 15 * time.Second
	closeTotal = 5 * time.Minute
	// CloseReset waits at most ackWait for the peer's kernel to have everything.
	ackWait = 2 * time.Second
)

type connState uint8

const (
	stateConnecting connState = iota
	stateOpen
	stateClosing   // sending what is left, then closing
	stateLingering // the same, then waiting for the peer's end
	stateDead      // awaiting burial
)

// Conn is a TCP connection of a loop. Its methods may be called only on the loop's thread, at any time, also
// after its end (they do nothing then).
type Conn struct {
	l     *Loop
	h     Handler
	owner Owner

	fd        int32
	slot, gen int32
	armed     uint32 // what the backend watches for
	// flight is what is being sent, where the backend sends without us.
	flight *flight

	state                                            connState
	attached, paused, eof, eofTold, keepUnread       bool
	shutWrite, shutDone, blocked                     bool
	dirty, drained, above, queued, reoffer, offering bool
	resetLast, acking, aborted                       bool
	dialled                                          bool // by us, not accepted
	filled                                           bool // the last receive filled its buffer
	// What a backend that completes has under way; unwanted: it received what nobody has been offered.
	receiving, multi, polling, cancelling, unwanted bool
	shorts                                          uint8 // short messages in a row

	in         []byte // kept input is in[inR:inW]
	inR, inW   int
	readLimit  int
	head, tail *chunk // pending output
	outLen     int
	high       int

	timer      Timer // connect or close time-out
	linger     time.Duration
	closeBy    int64
	closeMark  uint64
	read       uint64
	written    uint64
	shown      *atomic.Uint64 // where written is shown, see ShowWritten
	shownPlus  uint64
	unshown    func()
	number     uint32 // see AnswerCalls
	local      netip.AddrPort
	remote     netip.AddrPort
	connectErr error
	broken     error // the connection is known to be reset; unread input may remain
	err        error
}

// Adopt makes a connection of an accepted, connected socket, which becomes the Conn's. OnConnect is not called.
// Remote may be the zero AddrPort; it is asked for then.
func (l *Loop) Adopt(fd int, remote netip.AddrPort, h Handler, o Options) *Conn {
	c := &Conn{l: l, h: h, fd: int32(fd), state: stateOpen, remote: remote}
	c.configure(&o)
	l.stats.conns++
	c.slot, c.gen = l.take(c, nil)
	if err := l.backend.attach(c); err != nil {
		l.kill(c, err)
	}
	return c
}

func (c *Conn) configure(o *Options) {
	c.high, c.readLimit = o.BufferLimit, o.ReadLimit
	if c.high <= 0 {
		c.high = defaultBufferLimit
	}
	if c.readLimit <= 0 {
		c.readLimit = defaultReadLimit
	}
	c.keepUnread, c.paused, c.owner = o.KeepUnread, o.Paused, o.Owner
}

// Loop is the connection's loop.
func (c *Conn) Loop() *Loop { return c.l }

// Handler is what SetHandler set last.
func (c *Conn) Handler() Handler { return c.h }

// SetHandler changes who is called. Input that is kept is offered to the new handler soon.
func (c *Conn) SetHandler(h Handler) {
	c.h = h
	c.offerAgain()
}

// FD is the socket's descriptor, for getsockopt and the like; -1 after the end.
func (c *Conn) FD() int { return int(c.fd) }

// LocalAddr asks the kernel once; the zero AddrPort if the connection has ended before.
func (c *Conn) LocalAddr() netip.AddrPort {
	if !c.local.IsValid() && c.fd >= 0 {
		c.local = sysName(c.fd, false)
	}
	return c.local
}

// RemoteAddr is the peer's address.
func (c *Conn) RemoteAddr() netip.AddrPort {
	if !c.remote.IsValid() && c.fd >= 0 {
		c.remote = sysName(c.fd, true)
	}
	return c.remote
}

// BytesRead counts what was received from the kernel.
func (c *Conn) BytesRead() uint64 { return c.read }

// BytesWritten counts what the kernel took.
func (c *Conn) BytesWritten() uint64 { return c.written }

// ShowWritten keeps BytesWritten plus an offset in *at, for somebody outside the loop: whenever the kernel has taken
// bytes, *at says so before anything else happens. before is called once, before the socket is closed, whatever closes
// it.
func (c *Conn) ShowWritten(at *atomic.Uint64, plus uint64, before func()) {
	if c.state == stateDead {
		before()
		return
	}
	c.shown, c.shownPlus, c.unshown = at, plus, before
	at.Store(c.written + plus)
}

// HideWritten ends ShowWritten and AnswerCalls; before is not called any more.
func (c *Conn) HideWritten() {
	c.shown, c.unshown = nil, nil
	c.unanswer()
}

// Offering says that bytes are being offered at this moment, by a call of OnData that has not returned.
func (c *Conn) Offering() bool { return c.offering }

// Emptied says that the last receive, as far as can be told from its length, has left nothing behind in the kernel.
func (c *Conn) Emptied() bool { return !c.filled }

// Buffered is how many written bytes the kernel hasn't taken yet.
func (c *Conn) Buffered() int { return c.outLen }

// Unconsumed is how many received bytes are kept because no handler has consumed them.
func (c *Conn) Unconsumed() int { return c.inW - c.inR }

// AboveHigh says that pending output has passed the high watermark and OnDrained is still to come.
func (c *Conn) AboveHigh() bool { return c.above }

// SetBufferLimit changes the high watermark.
func (c *Conn) SetBufferLimit(n int) {
	if n > 0 {
		c.high = n
	}
}

// SetReadLimit changes how much unconsumed input may be kept.
func (c *Conn) SetReadLimit(n int) {
	if n > 0 {
		c.readLimit = n
		c.rearm()
	}
}

// Closed says that OnClose has been called or will be without anything else before it.
func (c *Conn) Closed() bool { return c.state >= stateClosing }

// EOF says that the peer has ended its direction, as far as has been read.
func (c *Conn) EOF() bool { return c.eof }

// PauseRead stops OnData and OnEOF until ResumeRead; the peer is stopped by TCP's window.
func (c *Conn) PauseRead() { c.paused = true }

// ReadPaused says whether PauseRead is in force.
func (c *Conn) ReadPaused() bool { return c.paused }

// ResumeRead ends PauseRead. Kept input is offered again soon, also if reading was not paused.
func (c *Conn) ResumeRead() {
	c.paused = false
	c.offerAgain()
	c.rearm()
}

// offerAgain has kept input, or an end that could not be told while paused, offered when events settle.
func (c *Conn) offerAgain() {
	if c.state != stateOpen || c.queued {
		return
	}
	if c.offering {
		c.reoffer = true // what is kept is known when OnData has returned
		return
	}
	if c.inW > c.inR || (c.eof && !c.eofTold) {
		c.queued = true
		c.l.resumed = append(c.l.resumed, c)
	}
}

func (c *Conn) rearm() {
	if c.state == stateOpen && !c.offering {
		c.l.backend.update(c)
	}
}

// want is what the connection needs to be told of.
func (c *Conn) want() uint32 {
	var w uint32
	switch c.state {
	case stateConnecting:
		return wantOut
	case stateOpen:
		if !c.paused && !c.eof && c.inW-c.inR < c.readLimit {
			w = wantIn
		}
	case stateLingering:
		if !c.eof {
			w = wantIn
		}
	case stateDead:
		return 0
	}
	if c.blocked {
		w |= wantOut
	}
	return w
}

// CloseWrite ends our direction (FIN) when everything written before has been sent.
func (c *Conn) CloseWrite() {
	if c.shutWrite || c.state > stateOpen {
		return
	}
	c.shutWrite = true
	if c.state == stateOpen && c.outLen == 0 {
		c.l.finishWrite(c)
	}
}

// Close sends what is pending, then closes. A peer that has sent bytes which were not read gets RST, as with
// every TCP socket; CloseDelayed avoids that.
func (c *Conn) Close() {
	switch {
	case c.state > stateOpen:
	case c.state == stateConnecting, c.outLen == 0, c.broken != nil:
		c.l.kill(c, nil)
	default:
		c.leave(stateClosing, closeStall)
	}
}

// CloseDelayed sends what is pending and FIN, then discards what the peer still sends until it closes too or d
// has passed. For a last word (an error response) to a peer that is still sending.
func (c *Conn) CloseDelayed(d time.Duration) {
	switch {
	case c.state > stateOpen:
	case c.state == stateConnecting, c.broken != nil, c.eof && c.outLen == 0, d <= 0:
		c.Close()
	default:
		c.linger = d
		c.shutWrite = true
		c.leave(stateLingering, closeStall)
		if c.outLen == 0 {
			c.l.finishWrite(c)
		}
		if c.state == stateLingering {
			c.l.backend.update(c)
		}
	}
}

// CloseReset delivers what is pending and then resets the connection: the peer gets every byte that we got, and
// learns that they were not all. Plain Abort would discard what the peer hasn't acknowledged, a FIN would make
// the torso look complete.
func (c *Conn) CloseReset() {
	switch {
	case c.state > stateOpen:
	case c.state == stateConnecting, c.broken != nil, c.outLen == 0 && unacked(c.fd) == 0:
		c.Abort()
	default:
		c.resetLast = true
		c.leave(stateClosing, closeStall)
		if c.outLen == 0 {
			c.l.finishWrite(c)
		}
	}
}

// awaitAck resets once the peer's kernel has everything, or has had time enough.
func (c *Conn) awaitAck() {
	if !c.acking {
		c.acking, c.closeBy = true, c.l.now+int64(ackWait)
	}
	if unacked(c.fd) == 0 || c.l.now >= c.closeBy {
		c.Abort()
		return
	}
	c.l.StartTimer(&c.timer, 2*time.Millisecond)
}

// Abort discards what is pending and resets the connection.
func (c *Conn) Abort() {
	if c.state == stateDead {
		return
	}
	if c.fd >= 0 && c.state != stateConnecting {
		abortOnClose(c.fd)
		c.aborted = true
		c.l.stats.syscalls++
	}
	c.l.kill(c, nil)
}

// leave enters a closing state: the handler hears nothing but OnClose from now on.
func (c *Conn) leave(s connState, d time.Duration) {
	c.state = s
	if !c.offering {
		c.dropInput()
	}
	c.closeBy, c.closeMark = c.l.now+int64(closeTotal), c.written
	c.timer.Init(c.timedOut)
	c.l.StartTimer(&c.timer, d)
	if c.outLen > 0 {
		c.markDirty()
	}
}

// timedOut ends a connect, or a close that the peer doesn't let us finish.
func (c *Conn) timedOut() {
	switch c.state {
	case stateConnecting:
		c.connectErr = ErrConnectTimeout
		c.l.kill(c, c.connectErr)
	case stateClosing, stateLingering:
		if c.resetLast && c.outLen == 0 {
			c.awaitAck()
			return
		}
		if c.outLen > 0 && c.written != c.closeMark && c.l.now < c.closeBy {
			c.closeMark = c.written
			c.l.StartTimer(&c.timer, closeStall)
			return
		}
		if c.outLen > 0 {
			c.Abort()
			return
		}
		c.l.kill(c, nil)
	}
}
