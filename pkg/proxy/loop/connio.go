package loop

import (
	"fmt"
	"io"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxIov is how many pieces one writev takes.
	maxIov = 16
	// directWrite: from this size on bytes are written at once instead of being copied and corked.
	directWrite = 8 << 10
	// corkLimit: more than this is not held back until events settle.
	corkLimit = 64 << 10
	// crowded is how many bytes of buffers a loop lends before connections get crowdedHigh as their high watermark at most.
	crowded     = 32 << 20
	crowdedHigh = 64 << 10
	// stallPause is how long a connection waits that could not send for want of kernel memory.
	stallPause = 5 * time.Millisecond
)

// room returns where the next receive goes: behind kept input, otherwise the loop's scratch buffer.
func (l *Loop) room(c *Conn) []byte {
	kept := c.inW - c.inR
	if kept == 0 {
		return l.scratch
	}
	if len(c.in)-c.inW < smallChunk {
		if c.inR > 0 && len(c.in)-kept >= max(smallChunk, len(c.in)/2) {
			copy(c.in, c.in[c.inR:c.inW])
		} else {
			b := l.pool.buffer(max(2*len(c.in), kept+smallChunk))
			copy(b, c.in[c.inR:c.inW])
			l.pool.putBuffer(c.in)
			c.in = b
		}
		c.inR, c.inW = 0, kept
	}
	return c.in[c.inW:]
}

// received takes the outcome of a receive into the buffer that room returned: b holds the bytes; none and no
// error is the peer's end.
func (l *Loop) received(c *Conn, b []byte, errno syscall.Errno) {
	switch {
	case c.state == stateLingering:
		if errno != 0 || len(b) == 0 {
			c.eof = true
			if c.outLen == 0 || errno != 0 {
				l.kill(c, nil)
			}
		}
	case errno != 0:
		l.kill(c, fmt.Errorf("receiving from %s: %w", c.remote, errno))
	case len(b) == 0:
		if c.broken != nil { // the kernel reports a reset once, as an error; after that it looks like an end
			l.kill(c, c.broken)
			return
		}
		c.eof = true
		l.tellEOF(c)
	default:
		c.read += uint64(len(b))
		l.stats.bytesReceived += uint64(len(b))
		if c.inW > c.inR {
			c.inW += len(b)
			l.give(c, c.in[c.inR:c.inW], true)
		} else {
			l.give(c, b, false)
		}
	}
}

// give offers bytes to the handler and keeps what it leaves.
func (l *Loop) give(c *Conn, b []byte, kept bool) {
	h := c.h
	c.offering = true
	n := h.OnData(c, b)
	c.offering = false
	if n < 0 || n > len(b) {
		panic(fmt.Sprintf("loop: handler %T consumed %d of %d bytes", c.h, n, len(b)))
	}
	switch {
	case c.state != stateOpen:
		c.dropInput()
		return
	case kept:
		if c.inR += n; c.inR == c.inW {
			c.dropInput()
		}
	case n < len(b):
		c.in = l.pool.buffer(len(b) - n)
		c.inR, c.inW = 0, copy(c.in, b[n:])
	}
	if c.reoffer {
		c.reoffer = false
		// Offering again what was just refused makes sense only if something has changed: a new handler, or
		// a resume from within. An answer of nothing consumed again ends it.
		if n > 0 || !kept || c.h != h {
			c.offerAgain()
		}
	}
}

func (c *Conn) dropInput() {
	if c.in != nil {
		c.l.pool.putBuffer(c.in)
		c.in, c.inR, c.inW = nil, 0, 0
	}
}

// offer is what settle does for a connection that asked to be offered its kept input again.
func (l *Loop) offer(c *Conn) {
	c.queued = false
	if c.state != stateOpen || c.paused {
		return
	}
	c.unwanted = false
	if c.inW > c.inR {
		l.give(c, c.in[c.inR:c.inW], true)
	}
	if c.state == stateOpen {
		if c.eof {
			l.tellEOF(c)
			return
		}
		l.backend.update(c)
	}
}

func (l *Loop) tellEOF(c *Conn) {
	if !c.paused && !c.eofTold && !c.queued {
		c.eofTold = true
		c.h.OnEOF(c)
	}
}

// keep puts bytes that nobody wants now behind those that are kept already.
func (l *Loop) keep(c *Conn, b []byte) {
	c.read += uint64(len(b))
	l.stats.bytesReceived += uint64(len(b))
	if c.inW == c.inR {
		c.dropInput()
		c.in = l.pool.buffer(len(b))
	}
	for len(b) > 0 {
		to := c.in[c.inW:]
		if len(to) == 0 {
			to = l.room(c)
		}
		n := copy(to, b)
		c.inW += n
		b = b[n:]
	}
}

// hungUp: the connection is finished or broken and its handler doesn't want to read. It returns true if the
// backend should stop watching until something is wanted.
func (l *Loop) hungUp(c *Conn) bool {
	l.stats.syscalls++
	return l.broke(c, sockError(c.fd))
}

// broke is hungUp where the socket's error is known; 0: both directions have ended in peace.
func (l *Loop) broke(c *Conn, errno syscall.Errno) bool {
	if errno != 0 {
		c.broken = fmt.Errorf("connection with %s: %w", c.remote, errno)
	}
	switch {
	case c.state != stateOpen && c.broken != nil:
		l.kill(c, nil)
		return false
	case c.broken != nil && (c.eof || !c.keepUnread):
		l.kill(c, c.broken)
		return false
	}
	if c.broken != nil {
		c.dropOutput()
	}
	return !c.blocked
}

// Write queues b to be sent when the present events have been worked off; large pieces are sent at once and
// only what the kernel doesn't take is copied. Errors are told by OnClose. After CloseWrite, Close or a broken
// connection it does nothing.
func (c *Conn) Write(b []byte) {
	if len(b) == 0 || c.shutWrite || c.state > stateOpen || c.broken != nil {
		return
	}
	if len(b) >= directWrite && c.state == stateOpen && !c.blocked && c.flight == nil {
		b = c.l.sendNow(c, b)
		if c.state == stateDead || c.broken != nil {
			return
		}
	}
	if len(b) > 0 {
		c.enqueue(b)
		if !c.blocked && c.state == stateOpen {
			if c.outLen >= corkLimit {
				c.l.flush(c)
			} else {
				c.markDirty()
			}
		}
	}
	if c.outLen > c.watermark() {
		c.above = true
	}
}

// Flush sends what is corked without waiting for the end of the batch.
func (c *Conn) Flush() {
	if c.outLen > 0 && !c.blocked && (c.state == stateOpen || c.state == stateClosing) {
		c.l.flush(c)
	}
}

func (c *Conn) enqueue(b []byte) {
	c.outLen += len(b)
	for len(b) > 0 {
		t := c.tail
		if t == nil || t.w == len(t.buf) {
			n := c.l.pool.chunk(len(b))
			if t == nil {
				c.head = n
			} else {
				t.next = n
			}
			c.tail, t = n, n
		}
		n := copy(t.buf[t.w:], b)
		t.w += n
		b = b[n:]
	}
}

func (c *Conn) markDirty() {
	if !c.dirty {
		c.dirty = true
		c.l.dirty = append(c.l.dirty, c)
	}
}

// sendNow writes pending output and b by one system call and returns what is left of b.
func (l *Loop) sendNow(c *Conn, b []byte) []byte {
	n, pending := 0, 0
	for k := c.head; k != nil && n < maxIov-1; k = k.next {
		l.iov[n].Base = &k.buf[k.r]
		l.iov[n].SetLen(k.w - k.r)
		pending += k.w - k.r
		n++
	}
	if pending < c.outLen { // more pieces than one call takes: order first
		return b
	}
	l.iov[n].Base = unsafe.SliceData(b)
	l.iov[n].SetLen(len(b))
	sent := l.sent(c, n+1, pending+len(b))
	l.iov[n].Base = nil
	took := min(sent, pending)
	c.discard(took)
	return b[sent-took:]
}

// sent sends the first n pieces of l.iov, which hold total bytes, and deals with every outcome.
func (l *Loop) sent(c *Conn, n, total int) int {
	for {
		var sent int
		var errno syscall.Errno
		if n == 1 {
			sent, errno = sysWrite(c.fd, unsafe.Slice(l.iov[0].Base, total))
		} else {
			sent, errno = sysWritev(c.fd, l.iov[:n], &l.msg)
		}
		l.stats.syscalls++
		switch errno {
		case 0:
			c.took(sent)
			if sent < total {
				l.block(c)
			}
			return sent
		case unix.EINTR:
		case unix.EAGAIN:
			l.block(c)
			return 0
		case unix.ENOMEM, unix.ENOBUFS:
			l.stall(c)
			return 0
		default:
			l.writeFailed(c, errno)
			return 0
		}
	}
}

// took counts what the kernel has taken.
func (c *Conn) took(n int) {
	c.written += uint64(n)
	c.l.stats.bytesWritten += uint64(n)
	if c.shown != nil {
		c.shown.Store(c.written + c.shownPlus)
	}
}

// stall puts a connection aside for which the kernel has no memory; no event tells when there is some again.
func (l *Loop) stall(c *Conn) {
	c.blocked = true
	l.stalled = append(l.stalled, c)
	if !l.stallTimer.Active() {
		l.StartTimer(&l.stallTimer, stallPause)
	}
}

func (l *Loop) block(c *Conn) {
	c.blocked = true
	l.backend.update(c)
}

func (l *Loop) retryStalled() {
	list := l.stalled
	l.stalled = nil
	for _, c := range list {
		if c.state != stateDead && c.blocked {
			l.sendable(c)
		}
	}
}

// writeFailed: what the peer sent before it went away may still be there to be read (an early response), so
// the end is left to the reading side where that is going on.
func (l *Loop) writeFailed(c *Conn, errno syscall.Errno) {
	c.dropOutput()
	c.blocked = false
	err := fmt.Errorf("sending to %s: %w", c.remote, errno)
	switch errno {
	case unix.EPIPE, unix.ECONNRESET, unix.ETIMEDOUT, unix.EHOSTUNREACH, unix.ENETUNREACH:
		if c.state == stateOpen && !c.eof && (!c.paused || c.keepUnread) {
			c.broken = err
			l.backend.update(c)
			return
		}
	}
	l.kill(c, err)
}

// flush sends pending output until it is gone or the kernel takes no more.
func (l *Loop) flush(c *Conn) {
	if c.state == stateConnecting || c.blocked {
		return
	}
	l.backend.send(c)
}

// gather lists the first pieces of pending output.
func (c *Conn) gather(iov *[maxIov]unix.Iovec) (n, total int) {
	for k := c.head; k != nil && n < maxIov; k = k.next {
		iov[n].Base = &k.buf[k.r]
		iov[n].SetLen(k.w - k.r)
		total += k.w - k.r
		n++
	}
	return n, total
}

// discard removes n sent bytes from the pending output and sees to the low watermark.
func (c *Conn) discard(n int) {
	c.outLen -= n
	for n > 0 {
		k := c.head
		take := min(n, k.w-k.r)
		k.r += take
		n -= take
		if k.r == k.w {
			if c.head = k.next; c.head == nil {
				c.tail = nil
			}
			c.l.pool.putChunk(k)
		}
	}
	c.checkLow()
}

// watermark is the connection's high one, unless the loop's buffers hold much already: then those who are slow to take their
// bytes are held back sooner, or a few hundred clients that send requests and never read would hold a megabyte each.
func (c *Conn) watermark() int {
	if c.l.pool.lent > crowded {
		return min(c.high, crowdedHigh)
	}
	return c.high
}

func (c *Conn) checkLow() {
	if c.above && c.outLen <= c.watermark()/2 {
		c.above = false
		if !c.drained {
			c.drained = true
			c.l.drained = append(c.l.drained, c)
		}
	}
}

func (c *Conn) dropOutput() {
	if c.flight != nil && c.head != nil { // the kernel still reads these: they must not be lent to somebody else
		c.flight.held = c.head
	} else {
		c.l.pool.putChunks(c.head)
	}
	c.head, c.tail, c.outLen = nil, nil, 0
	c.checkLow()
}

// finishWrite does what was to follow the last byte.
func (l *Loop) finishWrite(c *Conn) {
	if c.shutWrite && !c.shutDone && c.state != stateConnecting {
		c.shutDone = true
		l.stats.syscalls++
		if errno := sysShutdown(c.fd, unix.SHUT_WR); errno != 0 && errno != unix.ENOTCONN {
			l.kill(c, fmt.Errorf("shutdown: %w", errno))
			return
		}
	}
	switch {
	case c.state == stateClosing && c.resetLast:
		c.awaitAck()
	case c.state == stateClosing, c.state == stateLingering && c.eof:
		l.kill(c, nil)
	case c.state == stateLingering:
		l.StartTimer(&c.timer, c.linger)
	}
}

// sendable is the backend's word that the kernel takes output again.
func (l *Loop) sendable(c *Conn) {
	c.blocked = false
	l.flush(c)
}

// kill ends a connection; it is buried when events settle, so that nobody finds it gone under his hands.
func (l *Loop) kill(c *Conn, err error) {
	if c.state == stateDead {
		return
	}
	c.state = stateDead
	c.err = err
	c.timer.Stop()
	l.dead = append(l.dead, c)
}

func (l *Loop) bury(c *Conn) {
	c.unanswer()
	if c.shown != nil {
		before := c.unshown
		c.HideWritten()
		before()
	}
	if c.fd >= 0 {
		l.backend.release(c)
		c.fd = -1
	}
	c.dropInput()
	c.above = false
	c.dropOutput()
	c.blocked = false
	l.vacate(c.slot)
	l.stats.conns--
	if c.connectErr != nil {
		c.h.OnConnect(c, c.connectErr)
	}
	c.h.OnClose(c, c.err)
	if c.owner != nil {
		c.owner.ConnClosed(c)
	}
}

// Err is why the connection ended, as given to OnClose; io.EOF is never among the reasons.
func (c *Conn) Err() error {
	if c.err == io.EOF {
		return nil
	}
	return c.err
}
