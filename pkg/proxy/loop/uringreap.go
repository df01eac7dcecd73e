package loop

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The other half of the ring: waiting for completions, the order in which they are taken, and what each is about.

func (u *uring) wait(d time.Duration) (int, error) {
	l, r := u.l, u.ring
	l.stats.syscalls++
	if errno := r.enter(false, 0); fatal(errno) {
		return 0, fmt.Errorf("io_uring_enter: %w", errno)
	}
	if *r.cqHead == atomic.LoadUint32(r.cqTail) && d != 0 {
		l.publish()
		l.stats.syscalls++
		if errno := r.enter(true, d); fatal(errno) {
			return 0, fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
	l.readClock()
	return u.reap(), nil
}

// fatal tells errors of the ring from what passes: a signal, the time-out, memory, completions that wait to be taken.
func fatal(errno syscall.Errno) bool {
	switch errno {
	case 0, unix.EINTR, unix.ETIME, unix.EAGAIN, unix.EBUSY, unix.ENOMEM:
		return false
	}
	return true
}

// reap handles the completions that are there, a batch at a time.
func (u *uring) reap() int {
	r := u.ring
	head, tail := *r.cqHead, atomic.LoadUint32(r.cqTail)
	n := int(tail - head)
	for left := n; left > 0; {
		batch := u.batch[:min(left, len(u.batch))]
		for i := range batch {
			batch[i] = r.cqes[head&r.cqMask]
			head++
		}
		atomic.StoreUint32(r.cqHead, head)
		left -= len(batch)
		u.handleBatch(batch)
	}
	u.feed()
	return n
}

// handleBatch takes like after like: ends of sends, then what accepted connections received, then what dialled ones did. That
// saves CPU time (docs/performance.md has the figure), most likely since each kind is code of its own and the processor's
// nearest cache doesn't hold all of it. What concerns one connection's input stays in order.
func (u *uring) handleBatch(batch []cqe) {
	var order [3][batchSize]uint8
	var n [3]int
	for i := range batch {
		k := u.class(&batch[i])
		order[k][n[k]] = uint8(i)
		n[k]++
	}
	done := 0
	u.pending = batch
	for k := range order {
		for _, i := range order[k][:n[k]] {
			now := batch[i]
			batch[i] = cqe{}
			u.handle(&now)
			u.l.hear()
			if done++; done%settleEvery == 0 {
				u.l.settle()
			}
		}
	}
	u.pending = nil
}

// claim handles what has been received from the connection and not been handled yet, so that the next bytes are those in
// its socket. A receive that is under way takes none before this thread enters the kernel for completions again.
func (u *uring) claim(c *Conn) bool {
	r := u.ring
	for i := range u.pending {
		u.handleOf(c, &u.pending[i])
	}
	for head := *r.cqHead; head != atomic.LoadUint32(r.cqTail); head++ {
		u.handleOf(c, &r.cqes[head&r.cqMask])
	}
	// What did not fit into the ring comes with the next entry.
	return !r.overflown()
}

// handleOf handles a completion out of its turn if the connection received something by it.
func (u *uring) handleOf(c *Conn, e *cqe) {
	if e.userData == tag(kindRecv, c.slot, c.gen) || e.userData == tag(kindRecvMulti, c.slot, c.gen) {
		now := *e
		*e = cqe{}
		u.handle(&now)
	}
}

// class is which of its batch a completion is handled with.
func (u *uring) class(e *cqe) int {
	switch int(e.userData >> 56) {
	case kindRecv, kindRecvMulti:
		if c := u.l.entries[e.userData>>32&(1<<slotBits-1)].conn; c != nil && c.dialled {
			return 2
		}
		return 1
	}
	return 0
}

// feed arms receives again that found no buffer: all are free again.
func (u *uring) feed() {
	for i := 0; i < len(u.starved); i++ {
		if ent := &u.l.entries[u.starved[i].slot]; ent.gen == u.starved[i].gen && ent.conn != nil {
			u.update(ent.conn)
		}
	}
	u.starved = u.starved[:0]
}

func (u *uring) handle(e *cqe) {
	l := u.l
	kind, slot, gen := int(e.userData>>56), int32(e.userData>>32&(1<<slotBits-1)), int32(uint32(e.userData))
	last := e.flags&cqeMore == 0
	if kind != kindIgnore && last {
		u.busy--
	}
	switch kind {
	case kindWake:
		if last && e.res >= 0 {
			u.watchWake()
		}
	case kindSend:
		u.landed(slot, e.res)
	case kindListen:
		u.lnPolling = false
		if e.res >= 0 {
			u.acceptAll()
			u.watchListeners()
		}
	case kindPoll:
		if ent := &l.entries[slot]; ent.gen == gen && ent.conn != nil {
			ent.conn.polling = false
			u.polled(ent.conn, e.res)
		}
	case kindRecv, kindRecvMulti:
		from := u.large
		if kind == kindRecvMulti {
			from = u.small
		}
		var c *Conn
		if ent := &l.entries[slot]; ent.gen == gen {
			c = ent.conn
		}
		if c != nil && last {
			c.receiving, c.cancelling = false, false
		}
		if c != nil && c.state != stateDead {
			u.receive(c, e, from)
		}
		if e.flags&cqeBuffer != 0 {
			from.giveBack(uint16(e.flags >> cqeBufferShift))
		}
		if c != nil && c.state != stateDead && e.res != -int32(unix.ENOBUFS) {
			u.update(c)
		}
	}
}

// polled: a connect has ended, or a connection that isn't read from has broken.
func (u *uring) polled(c *Conn, res int32) {
	l := u.l
	if c.state == stateConnecting {
		var errno syscall.Errno
		if res < 0 || res&(unix.POLLERR|unix.POLLHUP) != 0 {
			l.stats.syscalls++
			errno = sockError(c.fd)
		}
		if errno == 0 && res >= 0 && res&unix.POLLOUT == 0 {
			u.update(c)
			return
		}
		l.connected(c, errno)
		u.update(c)
		return
	}
	if c.state != stateDead && res > 0 && res&(unix.POLLERR|unix.POLLHUP) != 0 && c.want()&wantIn == 0 {
		l.hungUp(c) // it stays quiet until something is wanted: update polls again only then
	}
}

// receive takes one completion of a connection's receive.
func (u *uring) receive(c *Conn, e *cqe, from *buffers) {
	l := u.l
	errno := syscall.Errno(0)
	if e.res < 0 {
		errno = syscall.Errno(-e.res)
	}
	switch {
	case e.res > 0:
		if e.res < smallSize {
			c.shorts = min(c.shorts+1, shortsInARow)
		} else {
			u.streams(c)
		}
		c.filled = int(e.res) == from.size
		u.take(c, from.filled(e.flags, e.res))
	case errno == unix.ENOBUFS:
		u.starved = append(u.starved, starving{c.slot, c.gen})
	case errno == unix.ECANCELED, errno == unix.EINTR, errno == unix.EAGAIN:
	case c.want()&wantIn != 0:
		l.received(c, nil, errno)
	case errno == 0: // the end: it's read again when it's wanted
	case c.state != stateOpen:
		l.kill(c, nil)
	default:
		l.broke(c, errno)
	}
}

// take offers received bytes, or keeps them where nobody wants them now.
func (u *uring) take(c *Conn, b []byte) {
	l := u.l
	for len(b) > 0 {
		switch {
		case c.state == stateDead:
			return
		case c.state == stateClosing:
			c.unwanted = true
			return
		case c.state == stateLingering:
			l.received(c, b, 0)
			return
		case c.want()&wantIn == 0:
			l.keep(c, b)
			c.unwanted = true
			u.streams(c)
			return
		case c.inW == c.inR:
			c.unwanted = false
			l.received(c, b, 0)
			return
		}
		c.unwanted = false
		n := copy(l.room(c), b)
		l.received(c, c.in[c.inW:c.inW+n], 0)
		b = b[n:]
	}
}
