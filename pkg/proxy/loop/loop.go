package loop

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ErrStopped closes the connections that are left when their loop stops.
var ErrStopped = errors.New("the proxy loop stopped")

// settleEvery bounds how many events are handled before what they wrote is sent: large enough to gather the
// frames of one upstream connection, small enough that the first reply of a batch doesn't wait for the last.
const settleEvery = 8

// publishEvery is how often a busy loop copies its counters to where Stats reads them.
const publishEvery = int64(100 * time.Millisecond)

// birth is where every loop's clock starts, a second early so that no time is 0, which means "never".
var birth = time.Now().Add(-time.Second)

// Config of a loop. The zero value works.
type Config struct {
	// Index tells the loops of an engine apart in logs.
	Index int
	// MaxEvents is how many events one wake-up takes at most; 0 means 256.
	MaxEvents int
	// IO chooses the backend; "" means IOAuto.
	IO     string
	Logger *slog.Logger
}

// Values of Config.IO.
const (
	// IOAuto is io_uring where the kernel has what the loop needs of it, else epoll.
	IOAuto  = "auto"
	IOEpoll = "epoll"
	// IORing fails where there is no io_uring, with ErrNoRing.
	IORing = "io_uring"
)

// Stats are a loop's gauges and counters, at most a tenth of a second old.
type Stats struct {
	Conns       int // open connections, dialled ones included
	Listeners   int
	BufferBytes int // lent to connections
	PooledBytes int // unused, kept for the next connection
	Timers      int

	Wakeups, Syscalls, Posts    uint64
	Accepted, AcceptErrors      uint64
	Dialled, NetnsSwitches      uint64
	BytesReceived, BytesWritten uint64
	Calls                       uint64 // answered: see AnswerCalls
}

type counters struct {
	wakeups, syscalls, posts    uint64
	accepted, acceptErrors      uint64
	dialled, netnsSwitches      uint64
	bytesReceived, bytesWritten uint64
	calls                       uint64
	conns, listeners            int
}

// Loop is one reactor. Every method except Post, Stop, Wait and Stats must be called on the loop's own thread:
// from a Handler, a Timer, or a function given to Post.
type Loop struct {
	cfg     Config
	log     *slog.Logger
	backend backend
	now     int64
	wheel   wheel
	pool    pool
	scratch []byte
	iov     [maxIov]unix.Iovec
	msg     unix.Msghdr

	entries []entry
	vacant  []int32

	home, netns *Netns
	calls       calls

	// Work left over by callbacks and system calls; settle empties these lists.
	resumed, dirty, drained, dead []*Conn
	// stalled connections could not send for want of kernel memory, which no event announces the end of.
	stalled    []*Conn
	stallTimer Timer

	mu      sync.Mutex
	queue   []func() // guarded by mu
	closed  bool     // guarded by mu: Post is refused
	posted  atomic.Bool
	running []func()
	stop    bool
	done    chan struct{}

	stats     counters
	published int64
	statsMu   sync.Mutex
	shown     Stats // guarded by statsMu
}

// entry is what an event's slot number stands for. gen tells a slot's present owner from events that were
// fetched for a former one.
type entry struct {
	gen  int32
	conn *Conn
	ln   *Listener
}

// backend is the seam between the loop and the kernel's way of waiting. It calls the loop back: received,
// sendable, connected, hungUp, acceptable.
type backend interface {
	// begin is called once, on the loop's thread, before anything but wake and close.
	begin() error
	// name is the value of Config.IO that chooses it.
	name() string
	// attach begins to watch the connection for what it wants.
	attach(c *Conn) error
	// update is called when the connection wants something that may not be watched for.
	update(c *Conn)
	// send sends pending output, or begins to; it calls finishWrite when the last byte is with the kernel.
	send(c *Conn)
	// claim sees to it that the next bytes from an open connection are those in its socket; false: it can't be.
	claim(c *Conn) bool
	// release stops everything that is under way for the connection and closes its socket.
	release(c *Conn)
	attachListener(ln *Listener) error
	// updateListener switches accepting on and off.
	updateListener(ln *Listener, on bool)
	detachListener(ln *Listener)
	// wait handles what has happened; if that is nothing it sleeps for d (0: not at all, negative: until
	// something happens).
	wait(d time.Duration) (events int, err error)
	// wake ends a wait. From any goroutine.
	wake()
	close()
}

// New makes a loop; Run runs it.
func New(cfg Config) (*Loop, error) {
	if cfg.MaxEvents <= 0 {
		cfg.MaxEvents = 256
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	l := &Loop{
		cfg: cfg, log: cfg.Logger.With("loop", cfg.Index),
		scratch: make([]byte, scratchSize), entries: make([]entry, 1, 64), done: make(chan struct{}),
	}
	l.readClock()
	l.wheel.init(l.now)
	l.stallTimer.Init(l.retryStalled)
	l.calls.init()
	var err error
	if l.backend, err = newBackend(l, cfg.IO); err != nil {
		return nil, fmt.Errorf("proxy loop %d: %w", cfg.Index, err)
	}
	return l, nil
}

func newBackend(l *Loop, io string) (backend, error) {
	switch io {
	case IOEpoll:
		return newEpoll(l)
	case IORing:
		return newUring(l)
	case IOAuto, "":
		u, err := newUring(l)
		if err == nil {
			return u, nil
		}
		l.log.Info("the proxy loop uses epoll", "reason", err)
		return newEpoll(l)
	}
	return nil, fmt.Errorf("no backend %q: there are %s, %s and %s", io, IOAuto, IOEpoll, IORing)
}

// IO is the backend in use: IOEpoll or IORing.
func (l *Loop) IO() string { return l.backend.name() }

// Index is the loop's number among the engine's loops.
func (l *Loop) Index() int { return l.cfg.Index }

// Now is a monotonic clock in nanoseconds, the same for all loops, read once per wake-up.
func (l *Loop) Now() int64 { return l.now }

func (l *Loop) readClock() { l.now = int64(time.Since(birth)) }

// Post has fn called on the loop's thread soon. It returns false, and fn will never run, if the loop has
// stopped. From any goroutine.
func (l *Loop) Post(fn func()) bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	l.queue = append(l.queue, fn)
	// Under the lock, because the backend must not be closed between the test and the wake.
	if !l.posted.Swap(true) {
		l.backend.wake()
	}
	l.mu.Unlock()
	return true
}

// Stop makes Run return after closing every connection and listener. From any goroutine.
func (l *Loop) Stop() { l.Post(func() { l.stop = true }) }

// Wait returns when Run has returned.
func (l *Loop) Wait() { <-l.done }

// Run works until Stop. It keeps its operating-system thread to itself, and lets the thread die with it,
// because a thread that has been in other network namespaces must not be given back to the Go scheduler.
func (l *Loop) Run() error {
	runtime.LockOSThread()
	defer close(l.done)
	// For top -H, perf and debuggers. A thread without a name works as well.
	_ = nameThread(fmt.Sprintf("sockmesh-loop-%d", l.cfg.Index))
	if err := l.bearHome(); err != nil {
		l.shut()
		return fmt.Errorf("proxy loop %d: %w", l.cfg.Index, err)
	}
	err := l.backend.begin()
	for !l.stop && err == nil {
		d := l.wheel.wait(l.now)
		if l.posted.Load() {
			d = 0
		}
		l.calls.left = callsPerWakeup
		if _, err = l.backend.wait(d); err != nil {
			l.log.Error("proxy loop cannot wait for events and stops", "error", err)
			break
		}
		l.stats.wakeups++
		l.wheel.advance(l.now)
		l.runPosted()
		l.settle()
		if l.now-l.published >= publishEvery {
			l.publish()
		}
	}
	l.shut()
	if err != nil {
		return fmt.Errorf("proxy loop %d: %w", l.cfg.Index, err)
	}
	return nil
}

func (l *Loop) runPosted() {
	if !l.posted.Load() {
		return
	}
	l.mu.Lock()
	l.posted.Store(false)
	l.queue, l.running = l.running[:0], l.queue
	l.mu.Unlock()
	for i, fn := range l.running {
		l.stats.posts++
		fn()
		l.running[i] = nil
	}
}

// settle works off what callbacks have left: input to offer again, output to send, connections to bury. It
// ends because each round only moves bytes that are in memory already.
func (l *Loop) settle() {
	for len(l.resumed)+len(l.dirty)+len(l.drained)+len(l.dead) > 0 {
		for i := 0; i < len(l.resumed); i++ {
			l.offer(l.resumed[i])
			l.resumed[i] = nil
		}
		l.resumed = l.resumed[:0]
		for i := 0; i < len(l.dirty); i++ {
			c := l.dirty[i]
			l.dirty[i] = nil
			c.dirty = false
			if c.state != stateDead {
				l.flush(c)
			}
		}
		l.dirty = l.dirty[:0]
		for i := 0; i < len(l.drained); i++ {
			c := l.drained[i]
			l.drained[i] = nil
			c.drained = false
			if c.state == stateOpen {
				c.h.OnDrained(c)
			}
		}
		l.drained = l.drained[:0]
		for i := 0; i < len(l.dead); i++ {
			c := l.dead[i]
			l.dead[i] = nil
			l.bury(c)
		}
		l.dead = l.dead[:0]
	}
}

// take reserves a slot for a connection or listener.
func (l *Loop) take(c *Conn, ln *Listener) (slot, gen int32) {
	if n := len(l.vacant); n > 0 {
		slot = l.vacant[n-1]
		l.vacant = l.vacant[:n-1]
	} else {
		slot = int32(len(l.entries))
		l.entries = append(l.entries, entry{})
	}
	e := &l.entries[slot]
	e.gen++
	e.conn, e.ln = c, ln
	return slot, e.gen
}

func (l *Loop) vacate(slot int32) {
	e := &l.entries[slot]
	e.gen++
	e.conn, e.ln = nil, nil
	l.vacant = append(l.vacant, slot)
}

// shut runs what was posted in time, then closes everything.
func (l *Loop) shut() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.runPosted()
	for round := 0; ; round++ {
		open := 0
		for i := range l.entries {
			if ln := l.entries[i].ln; ln != nil {
				ln.Close()
			}
			if c := l.entries[i].conn; c != nil {
				l.kill(c, ErrStopped)
				open++
			}
		}
		l.settle()
		if open == 0 || round > 100 { // a handler that dials from OnClose must not keep us for ever
			break
		}
	}
	l.publish()
	l.backend.close()
	if l.home != nil {
		l.home.Close()
	}
}

func (l *Loop) publish() {
	l.published = l.now
	s := &l.stats
	l.statsMu.Lock()
	l.shown = Stats{
		Conns: s.conns, Listeners: s.listeners, BufferBytes: l.pool.lent, PooledBytes: l.pool.free,
		Timers: l.wheel.count, Wakeups: s.wakeups, Syscalls: s.syscalls, Posts: s.posts,
		Accepted: s.accepted, AcceptErrors: s.acceptErrors, Dialled: s.dialled, NetnsSwitches: s.netnsSwitches,
		BytesReceived: s.bytesReceived, BytesWritten: s.bytesWritten, Calls: s.calls,
	}
	l.statsMu.Unlock()
}

// Stats returns the counters as last published. From any goroutine.
func (l *Loop) Stats() Stats {
	l.statsMu.Lock()
	defer l.statsMu.Unlock()
	return l.shown
}
