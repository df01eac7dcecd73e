package loop

import (
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// uring is the backend on io_uring. Requests of one wake-up (send this, receive there) are handed over by the one
// system call that waits for the next, so that at load a request through the proxy costs a fraction of one.
//
// A connection has at most one receive under way and at most one send. While its messages are short the receive stays
// armed and completes once for each (multishot), into small buffers; a stream is received into large ones, each asked
// for anew, because a multishot receive takes all there is before anybody can say that it is enough. What differs from epoll, where
// nothing is received that nobody asked for: data may complete after reading has been paused. It is kept; the end of
// the data is not, because it can be read again; a socket closed with data that nobody wanted is reset, as TCP would.
//
// A request holds its socket: close(2) alone would leave the connection open until the receive ends. So release
// cancels first. And the kernel reads output until the send completes: whatever happens to the connection, its
// pieces stay where they are until then (flight.held).
type uring struct {
	l      *Loop
	ring   *ring
	large  *buffers // for single receives
	small  *buffers // for multishot receives
	wakeFD int
	// lnFD is the epoll set of listeners, lnPolling: the ring waits for it.
	lnFD      int
	lnPolling bool
	lnEvents  [16]unix.EpollEvent
	// busy counts requests that will still complete.
	busy    int
	flights []*flight
	idle    []int32
	starved []starving // receives that found no buffer
	batch   [batchSize]cqe
	// pending is the batch while it is being handled; what has been is blank.
	pending []cqe
}

// batchSize is how many completions are put in order at a time.
const batchSize = 128

// flight is one send.
type flight struct {
	index  int32
	pieces int    // of iov in use
	conn   *Conn  // nil: it is gone
	held   *chunk // its output, kept until the kernel is done with it
	msg    unix.Msghdr
	iov    [maxIov]unix.Iovec
}

type starving struct{ slot, gen int32 }

// What a completion is about: kind, slot and generation, or the number of a flight.
const (
	kindIgnore = iota // 0, so that a blank completion is nobody's
	kindWake
	kindRecv      // single
	kindRecvMulti // multishot
	kindPoll
	kindSend
	kindListen
)

const (
	slotBits = 24
	// A connection whose last messages were all shorter than a small buffer has its receives stay armed: then what a
	// burst can bring unasked is bounded by the small buffers, and a stream that trickles now and then isn't taken for
	// messages.
	shortsInARow = 4
	// Powers of two, 2 MiB of each for a loop.
	largeSize, largeCount = scratchSize, 32
	smallSize, smallCount = 4 << 10, 512
	largeGroup            = 1
	smallGroup            = 2
)

func tag(kind int, slot, gen int32) uint64 {
	return uint64(kind)<<56 | uint64(slot)<<32 | uint64(uint32(gen))
}

func newUring(l *Loop) (*uring, error) {
	r, err := newRing()
	if err != nil {
		return nil, err
	}
	u := &uring{l: l, ring: r}
	if u.large, err = r.lend(largeGroup, largeSize, largeCount); err == nil {
		u.small, err = r.lend(smallGroup, smallSize, smallCount)
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("%w: %w", ErrNoRing, err)
	}
	if u.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		r.close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if u.lnFD, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		_ = unix.Close(u.wakeFD)
		r.close()
		return nil, fmt.Errorf("epoll_create: %w", err)
	}
	return u, nil
}

func (u *uring) begin() error {
	if err := u.ring.begin(); err != nil {
		return err
	}
	u.watchWake()
	return nil
}

func (u *uring) name() string { return IORing }

// watchWake asks for one completion each time the descriptor is written to; it need never be read.
func (u *uring) watchWake() {
	e := u.request(kindWake, 0, 0)
	e.opcode, e.fd, e.opFlags, e.len = opPollAdd, int32(u.wakeFD), pollMask(unix.POLLIN), pollAddMulti
}

// pollMask is a mask as struct io_uring_sqe wants it: the two halves are swapped on big-endian machines.
func pollMask(events uint32) uint32 {
	if littleEndian {
		return events
	}
	return events<<16 | events>>16
}

func (u *uring) wake() {
	one := uint64(1)
	_, _ = unix.Write(u.wakeFD, (*[8]byte)(unsafe.Pointer(&one))[:])
}

// request is the next request, which will complete.
func (u *uring) request(kind int, slot, gen int32) *sqe {
	e, full := u.ring.next()
	for full {
		// The kernel takes requests as long as it has memory; without any there is nothing better to do than to ask again.
		u.l.stats.syscalls++
		_ = u.ring.enter(false, 0)
		e, full = u.ring.next()
	}
	e.userData = tag(kind, slot, gen)
	if kind != kindIgnore {
		u.busy++
	}
	return e
}

// close waits for what the kernel still works on, so that no socket outlives the loop, and lets go.
func (u *uring) close() {
	for _, fd := range []int{u.wakeFD, u.lnFD} {
		e := u.request(kindIgnore, 0, 0)
		e.opcode, e.fd, e.opFlags = opAsyncCancel, int32(fd), cancelAll|cancelFD
	}
	for end := time.Now().Add(time.Second); u.busy > 0 && time.Now().Before(end); {
		if errno := u.ring.enter(true, 10*time.Millisecond); errno != 0 && errno != unix.ETIME && errno != unix.EINTR {
			break
		}
		u.reap()
	}
	u.ring.close()
	_ = unix.Close(u.wakeFD)
	_ = unix.Close(u.lnFD)
}

func (u *uring) attach(c *Conn) error {
	if c.slot >= 1<<slotBits {
		return fmt.Errorf("too many connections for one loop")
	}
	u.update(c)
	return nil
}

// update arms what is wanted and not under way.
func (u *uring) update(c *Conn) {
	if c.fd < 0 || c.state == stateDead {
		return
	}
	if c.state == stateConnecting {
		u.poll(c, unix.POLLOUT)
		return
	}
	if c.blocked && !u.isStalled(c) {
		c.blocked = false // the kernel waits for room by itself
		c.markDirty()
	}
	if c.want()&wantIn == 0 {
		if !c.receiving {
			u.poll(c, 0) // a reset has to be heard of even so
		}
		return
	}
	if c.receiving {
		return
	}
	c.receiving = true
	c.multi = c.shorts >= shortsInARow
	if c.multi {
		e := u.request(kindRecvMulti, c.slot, c.gen)
		e.opcode, e.fd, e.flags, e.bufGroup, e.ioprio = opRecv, c.fd, sqeBufferSelect, smallGroup, recvMultishot
		return
	}
	e := u.request(kindRecv, c.slot, c.gen)
	e.opcode, e.fd, e.flags, e.bufGroup = opRecv, c.fd, sqeBufferSelect, largeGroup
}

func (u *uring) isStalled(c *Conn) bool {
	for _, s := range u.l.stalled {
		if s == c {
			return true
		}
	}
	return false
}

func (u *uring) poll(c *Conn, events uint32) {
	if c.polling {
		return
	}
	c.polling = true
	e := u.request(kindPoll, c.slot, c.gen)
	e.opcode, e.fd, e.opFlags = opPollAdd, c.fd, pollMask(events)
}

// send puts the pending output on its way, unless some is already.
func (u *uring) send(c *Conn) {
	if c.flight != nil || c.state == stateDead || c.broken != nil {
		return
	}
	if c.outLen == 0 {
		u.l.finishWrite(c)
		return
	}
	f := u.takeFlight(c)
	n, total := c.gather(&f.iov)
	f.pieces = n
	e := u.request(kindSend, f.index, 0)
	e.fd, e.opFlags = c.fd, unix.MSG_NOSIGNAL
	if n == 1 {
		e.opcode, e.addr, e.len = opSend, uint64(uintptr(unsafe.Pointer(f.iov[0].Base))), uint32(total)
		return
	}
	f.msg.Iov = &f.iov[0]
	f.msg.SetIovlen(n)
	e.opcode, e.addr, e.len = opSendMsg, uint64(uintptr(unsafe.Pointer(&f.msg))), 1
}

func (u *uring) takeFlight(c *Conn) *flight {
	var f *flight
	if n := len(u.idle); n > 0 {
		f = u.flights[u.idle[n-1]]
		u.idle = u.idle[:n-1]
	} else {
		f = &flight{index: int32(len(u.flights))}
		u.flights = append(u.flights, f)
	}
	f.conn, c.flight = c, f
	return f
}

// landed is the end of a send.
func (u *uring) landed(index int32, res int32) {
	l, f := u.l, u.flights[index]
	c := f.conn
	f.conn = nil
	clear(f.iov[:f.pieces])
	u.idle = append(u.idle, index)
	if f.held != nil {
		l.pool.putChunks(f.held)
		f.held = nil
	}
	if c == nil {
		return
	}
	c.flight = nil
	if c.state == stateDead || c.broken != nil {
		return
	}
	switch errno := syscall.Errno(-res); {
	case res >= 0:
		c.took(int(res))
		c.discard(int(res))
		l.flush(c)
	case errno == unix.EAGAIN, errno == unix.EINTR:
		l.flush(c)
	case errno == unix.ENOMEM, errno == unix.ENOBUFS:
		l.stall(c)
	default:
		l.writeFailed(c, errno)
	}
}

// release cancels what is under way, then closes; both happen, in this order, when requests are submitted next. Until
// then the descriptor's number can't be given to another socket.
func (u *uring) release(c *Conn) {
	if c.unwanted && !c.aborted {
		abortOnClose(c.fd) // bytes that nobody read: TCP would reset
		u.l.stats.syscalls++
	}
	// Each by its tag, which the kernel finds by hash: to find what a descriptor has under way it walks over the requests
	// of all connections, and with ten thousand idle ones every close would cost a third of a millisecond.
	if c.receiving {
		u.cancelTagged(tag(receiveKind(c), c.slot, c.gen))
	}
	if c.polling {
		u.cancelTagged(tag(kindPoll, c.slot, c.gen))
	}
	if c.flight != nil {
		u.cancelTagged(tag(kindSend, c.flight.index, 0))
		c.flight.conn = nil
	}
	e := u.request(kindIgnore, 0, 0)
	e.opcode, e.fd, e.flags = opClose, c.fd, sqeCQESkipSuccess
}

// cancelTagged ends the one request with that tag.
func (u *uring) cancelTagged(userData uint64) {
	e := u.request(kindIgnore, 0, 0)
	e.opcode, e.fd, e.addr, e.flags = opAsyncCancel, -1, userData, sqeCQESkipSuccess
}

// receiveKind is how the connection is being received from.
func receiveKind(c *Conn) int {
	if c.multi {
		return kindRecvMulti
	}
	return kindRecv
}

// streams: more comes than is wanted at a time, so a receive that would go on by itself is stopped.
func (u *uring) streams(c *Conn) {
	c.shorts = 0
	if !c.multi || !c.receiving || c.cancelling {
		return
	}
	c.cancelling = true
	u.cancelTagged(tag(kindRecvMulti, c.slot, c.gen))
}
