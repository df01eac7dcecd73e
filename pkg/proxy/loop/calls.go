package loop

import (
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Somebody outside may wait until all that a connection has received is forwarded: the kernel's program does when it
// wants to carry a direction's bytes past the proxy, and keeps a processor busy meanwhile. It calls: it leaves the
// connection's number at the loop's desk. The loop looks there between any two events, and then serves that connection
// before all others, until nothing is left to read. A caller that nobody hears calls again; one that waits no more has
// lost nothing but the look.
//
// So that nobody starves, however many call, the callers get so much in each wake-up and then wait like everybody else.

const (
	// callsPerWakeup bounds the bytes, and the reads at 64 KiB each, that callers may have served before others; the last
	// read may bring more.
	callsPerWakeup = 4 << 20
	// callRead is what one read for a caller takes at most: what TCP lets wait in a socket by default, all at once. A sender
	// that goes by TCP and never pauses has its own queue full as well, and while it writes nothing leaves that, so
	// waiting would be in vain. But the window opens by what one read takes: if that is more than what the sender has queued,
	// all of it comes at once, and from then on what has to be waited for is here.
	callRead = 8 << 20
)

// Desk is where a loop is called. Both words are in memory that is shared with the callers.
type Desk struct {
	// Call is the number of a connection whose sender waits, as given to AnswerCalls; 0: nobody calls.
	Call *atomic.Uint32
	// Beat changes while somebody calls and the loop, which runs, is busy with others.
	Beat *atomic.Uint32
}

// calls are a loop's desk and those who may call.
type calls struct {
	desk    Desk // at which nobody calls while numbers is empty: the memory may be gone then
	quiet   Desk
	numbers map[uint32]*Conn
	left    int    // of callsPerWakeup
	buf     []byte // for callRead, once somebody has called
}

func (k *calls) init() {
	k.quiet = Desk{new(atomic.Uint32), new(atomic.Uint32)}
	k.desk = k.quiet
	k.numbers = map[uint32]*Conn{}
}

// AnswerCalls has the connection served first whenever number, which isn't 0, is called at the desk. All connections of a
// loop have the same desk, whose memory must last until the last of them is closed.
func (c *Conn) AnswerCalls(d Desk, number uint32) {
	if c.state == stateDead {
		return
	}
	c.l.calls.desk = d
	c.l.calls.numbers[number] = c
	c.number = number
}

// unanswer is the end of it.
func (c *Conn) unanswer() {
	k := &c.l.calls
	if c.number == 0 {
		return
	}
	if k.numbers[c.number] == c {
		delete(k.numbers, c.number)
	}
	c.number = 0
	if len(k.numbers) == 0 {
		k.desk = k.quiet
	}
}

// hear looks whether somebody calls. Between two events.
func (l *Loop) hear() {
	if l.calls.desk.Call.Load() != 0 {
		l.answer()
	}
}

func (l *Loop) answer() {
	k := &l.calls
	if k.left <= 0 {
		k.desk.Beat.Add(1)
		return
	}
	number := k.desk.Call.Swap(0)
	if c := k.numbers[number]; c != nil {
		l.stats.calls++
		l.attend(c)
	}
}

// attend forwards what waits in the connection's socket.
func (l *Loop) attend(c *Conn) {
	for l.calls.left > 0 && l.backend.claim(c) && c.state == stateOpen && c.want()&wantIn != 0 {
		b := l.room(c)
		if c.inW == c.inR && l.pool.lent < crowded {
			b = l.calls.room()
		}
		n, errno := sysRead(c.fd, b)
		l.stats.syscalls++
		l.calls.left -= max(scratchSize, n)
		if errno == unix.EINTR {
			continue
		}
		c.filled = n == len(b)
		if errno == unix.EAGAIN || errno == 0 && n == 0 { // the end is told in its turn
			break
		}
		l.receivedMuch(c, b[:max(n, 0)], errno)
	}
	// What was corked for the batch is what the caller waits for.
	for _, to := range l.dirty {
		l.push(to)
	}
}

// room is for one read.
func (k *calls) room() []byte {
	if k.buf == nil {
		k.buf = make([]byte, callRead)
	}
	return k.buf
}

// receivedMuch is received, in pieces of the usual size, as long as somebody wants them.
func (l *Loop) receivedMuch(c *Conn, b []byte, errno syscall.Errno) {
	for len(b) > scratchSize {
		l.received(c, b[:scratchSize], 0)
		b = b[scratchSize:]
		if c.state != stateOpen {
			return
		}
		if c.want()&wantIn == 0 || c.inW > c.inR {
			l.keep(c, b)
			c.unwanted = true // until it is offered
			c.offerAgain()
			return
		}
	}
	l.received(c, b, errno)
}

// push sends pending output by system calls of its own until it is gone or the kernel takes no more. Where the backend is
// sending already it does nothing.
func (l *Loop) push(c *Conn) {
	for c.outLen > 0 && !c.blocked && c.flight == nil && c.state != stateConnecting && c.state != stateDead && c.broken == nil {
		n, total := c.gather(&l.iov)
		sent := l.sent(c, n, total)
		c.discard(sent)
		if sent < total {
			return
		}
	}
}
