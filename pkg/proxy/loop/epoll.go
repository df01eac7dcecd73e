package loop

import (
	"errors"
	"fmt"
	"math"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readsPerEvent bounds how much one connection may receive before the others have their turn.
const readsPerEvent = 4

const (
	wantIn  = unix.EPOLLIN
	wantOut = unix.EPOLLOUT
)

// epoll is the backend that works on every kernel.
type epoll struct {
	l      *Loop
	fd     int
	wakeFD int
	events []unix.EpollEvent
}

func newEpoll(l *Loop) (*epoll, error) {
	e := &epoll{l: l, events: make([]unix.EpollEvent, l.cfg.MaxEvents)}
	var err error
	if e.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll_create: %w", err)
	}
	if e.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		_ = unix.Close(e.fd)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	// Edge-triggered, so that it need never be read. Slot 0 is nobody else's.
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}
	if err = unix.EpollCtl(e.fd, unix.EPOLL_CTL_ADD, e.wakeFD, &ev); err != nil {
		e.close()
		return nil, fmt.Errorf("epoll_ctl: %w", err)
	}
	return e, nil
}

// claim: what the kernel has is in the socket.
func (e *epoll) claim(*Conn) bool { return true }

func (e *epoll) begin() error { return nil }

func (e *epoll) name() string { return IOEpoll }

// send writes until output is gone or the kernel takes no more.
func (e *epoll) send(c *Conn) {
	l := e.l
	l.push(c)
	if c.outLen == 0 && c.state != stateDead && c.broken == nil {
		l.finishWrite(c)
	}
}

// release closes; that takes the socket out of epoll too, since nobody else has it.
func (e *epoll) release(c *Conn) {
	sysClose(c.fd)
	e.l.stats.syscalls++
}

func (e *epoll) close() {
	_ = unix.Close(e.fd)
	_ = unix.Close(e.wakeFD)
}

func (e *epoll) wake() {
	one := uint64(1)
	_, _ = unix.Write(e.wakeFD, (*[8]byte)(unsafe.Pointer(&one))[:])
}

func (e *epoll) ctl(op int, fd int32, events uint32, slot, gen int32) error {
	e.l.stats.syscalls++
	ev := unix.EpollEvent{Events: events, Fd: slot, Pad: gen}
	_, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(e.fd), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("epoll_ctl: %w", errno)
	}
	return nil
}

func (e *epoll) attach(c *Conn) error {
	want := c.want()
	if err := e.ctl(unix.EPOLL_CTL_ADD, c.fd, want, c.slot, c.gen); err != nil {
		return err
	}
	c.attached, c.armed = true, want
	return nil
}

// update brings the kernel's interest in line if something is wanted that isn't watched for. What is watched
// for and not wanted any more stays until an event proves that it costs something.
func (e *epoll) update(c *Conn) {
	if want := c.want(); want&^c.armed != 0 || (!c.attached && want != 0) {
		e.set(c, want)
	}
}

func (e *epoll) set(c *Conn, want uint32) {
	var err error
	if c.attached {
		if want == c.armed {
			return
		}
		err = e.ctl(unix.EPOLL_CTL_MOD, c.fd, want, c.slot, c.gen)
	} else {
		err = e.ctl(unix.EPOLL_CTL_ADD, c.fd, want, c.slot, c.gen)
	}
	if err != nil { // out of kernel memory, or watches: the connection would hang
		e.l.kill(c, err)
		return
	}
	c.attached, c.armed = true, want
}

// forget stops watching a connection that keeps reporting what can't be masked and nobody wants to hear.
func (e *epoll) forget(c *Conn) {
	if c.attached {
		_ = e.ctl(unix.EPOLL_CTL_DEL, c.fd, 0, 0, 0)
		c.attached, c.armed = false, 0
	}
}

func (e *epoll) attachListener(ln *Listener) error {
	return e.ctl(unix.EPOLL_CTL_ADD, ln.fd, unix.EPOLLIN, ln.slot, ln.gen)
}

func (e *epoll) updateListener(ln *Listener, on bool) {
	var events uint32
	if on {
		events = unix.EPOLLIN
	}
	if err := e.ctl(unix.EPOLL_CTL_MOD, ln.fd, events, ln.slot, ln.gen); err != nil {
		e.l.log.Error("cannot change a listener's events", "error", err)
	}
}

func (e *epoll) detachListener(ln *Listener) {
	// Explicitly: whoever gave us the listener may hold a duplicate of its descriptor.
	_ = e.ctl(unix.EPOLL_CTL_DEL, ln.fd, 0, 0, 0)
}

func (e *epoll) wait(d time.Duration) (int, error) {
	l := e.l
	// First without sleeping and without telling the Go scheduler: under load there is always something.
	r, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(e.fd), uintptr(unsafe.Pointer(&e.events[0])), uintptr(len(e.events)), 0, 0, 0)
	l.stats.syscalls++
	n := int(r)
	if errno != 0 && errno != unix.EINTR {
		return 0, fmt.Errorf("epoll_wait: %w", errno)
	}
	if errno != 0 {
		n = 0
	}
	if n == 0 && d != 0 {
		l.publish()
		ms := -1
		if d > 0 {
			ms = int(min((d+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
		}
		var err error
		if n, err = unix.EpollWait(e.fd, e.events, ms); err != nil {
			if !errors.Is(err, unix.EINTR) {
				return 0, fmt.Errorf("epoll_wait: %w", err)
			}
			n = 0
		}
		l.stats.syscalls++
	}
	l.readClock()
	for i := range n {
		ev := &e.events[i]
		if ent := &l.entries[ev.Fd]; ent.gen == ev.Pad {
			switch {
			case ent.conn != nil:
				e.handle(ent.conn, ev.Events)
			case ent.ln != nil:
				l.acceptable(ent.ln)
			}
		}
		l.hear()
		if i%settleEvery == settleEvery-1 {
			l.settle()
		}
	}
	return n, nil
}

func (e *epoll) handle(c *Conn, events uint32) {
	l := e.l
	const broken = unix.EPOLLERR | unix.EPOLLHUP
	switch c.state {
	case stateDead:
		return
	case stateConnecting:
		var errno syscall.Errno
		if events&broken != 0 {
			errno = sockError(c.fd)
		}
		if errno != 0 || events&unix.EPOLLOUT != 0 {
			l.connected(c, errno)
			e.update(c)
		}
		return
	}
	if events&unix.EPOLLOUT != 0 && c.blocked {
		l.sendable(c)
	}
	if events&(unix.EPOLLIN|broken) != 0 && c.state != stateDead {
		if c.want()&wantIn != 0 {
			e.readable(c)
		} else if events&broken != 0 {
			if l.hungUp(c) {
				e.forget(c)
			}
			return
		}
	}
	if c.state == stateDead {
		return
	}
	// Level-triggered: what has been reported and isn't wanted would be reported again and again.
	if want := c.want(); events&c.armed&^want != 0 || want&^c.armed != 0 {
		e.set(c, want)
	}
}

func (e *epoll) readable(c *Conn) {
	l := e.l
	for range readsPerEvent {
		b := l.room(c)
		n, errno := sysRead(c.fd, b)
		l.stats.syscalls++
		switch errno {
		case 0:
		case unix.EAGAIN:
			return
		case unix.EINTR:
			continue
		default:
			n = 0
		}
		c.filled = n == len(b)
		l.received(c, b[:n], errno)
		// A short read leaves nothing, or (sockmap) something that will be reported again.
		if n < len(b) || c.want()&wantIn == 0 {
			return
		}
	}
}
