package datapath

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The proxy steps aside: bpf/aside.h says how. The proxy's part is small. It names its two sockets of a connection once
// (Datapath.StepAside), and from then on writes into memory that the programs read how far it has forwarded each direction.
// From the same memory it reads what has skipped it. That memory is a map of this agent alone: while one agent replaces
// another, a socket may carry the other's program, which finds no token of its own in its own map and does nothing.

// ErrNotAside is why bytes can't skip the proxy; errors of StepAside wrap it.
var ErrNotAside = errors.New("the connection's bytes can't skip the proxy")

// Directions of a connection that the proxy carries.
const (
	ToServer = iota
	ToClient
)

// asides are the connections that were handed over.
type asides struct {
	prog  *ebpf.Program
	dirs  []asideDir // the shared memory
	desks []asideDesk

	mu   sync.Mutex
	free []uint32 // guarded by mu; first slots of connections, those given back last are used last
	open int      // guarded by mu
}

// newAsides maps the memory. It stays until the last Aside is forgotten, whoever closes the map before.
func newAsides(o *objects) (*asides, error) {
	prog := o.progs[progStepAside]
	if prog == nil {
		return nil, errors.New("sm_step_aside does not load on this kernel")
	}
	n := o.asideSlots.MaxEntries() &^ 1
	t := &asides{prog: prog}
	var err error
	if t.dirs, err = shareMemory[asideDir](t, o.asideSlots, n); err != nil {
		return nil, err
	}
	if t.desks, err = shareMemory[asideDesk](t, o.asideDesks, o.asideDesks.MaxEntries()); err != nil {
		return nil, err
	}
	for slot := uint32(0); slot < n; slot += 2 {
		t.free = append(t.free, slot)
	}
	return t, nil
}

// shareMemory maps the first n values of an array.
func shareMemory[T any](t *asides, m *ebpf.Map, n uint32) ([]T, error) {
	var value T
	raw, err := unix.Mmap(m.FD(), 0, int(n)*int(unsafe.Sizeof(value)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory that is shared with sm_msg: %w", err)
	}
	runtime.AddCleanup(t, func(raw []byte) { _ = unix.Munmap(raw) }, raw)
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(raw))), n), nil
}

func (t *asides) take() (uint32, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.free) == 0 {
		return 0, false
	}
	slot := t.free[0]
	t.free = t.free[1:]
	t.open++
	return slot, true
}

func (t *asides) give(slot uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free = append(t.free, slot)
	t.open--
}

// Aside is a connection that was handed over, or a pair of connections of which bodies are. Its methods may be called from
// one goroutine at a time.
type Aside struct {
	t       *asides
	slot    uint32
	closed  bool
	base    [2]uint64 // what the senders' sockets had counted before
	carried [2]uint64 // once closed
}

// noBudget is SM_NO_BUDGET.
const noBudget = ^uint64(0)

// StepAside lets the bytes of a connection skip the proxy, from the next moment in which none are under way in it. down and
// up are the proxy's sockets, up being connected to the endpoint. toServer is how many of the client's bytes up has
// taken, toClient how many of the server's down has; the caller keeps both up to date through Aside.Forwarded.
//
// Each direction is judged on its own; if neither can skip the proxy the error says why, and wraps ErrNotAside.
// `sockmesh sockets` shows it. Costs four system calls.
func (d *Datapath) StepAside(down, up int, toServer, toClient uint64) (*Aside, error) {
	a, err := d.PairUp(d.AsideEnd(down), d.AsideEnd(up))
	if err != nil {
		return nil, err
	}
	for i, n := range [2]uint64{toServer, toClient} {
		a.dir(i).Rested = 0
		a.Forwarded(i).Store(n)
		atomic.StoreUint64(&a.dir(i).Budget, noBudget)
	}
	return a, nil
}

// AsideEnd is one of the proxy's sockets, as PairUp must know it.
type AsideEnd struct {
	key      tupleKey
	enrolled bool
	err      error
}

// AsideEnd looks at a socket, by one or two system calls. What it finds holds for as long as the socket is connected.
func (d *Datapath) AsideEnd(fd int) AsideEnd {
	st, err := d.socketState(fd)
	if err != nil && !errors.Is(err, ErrNoOrigin) {
		return AsideEnd{err: err}
	}
	return AsideEnd{key: st.Route, enrolled: err == nil && st.State == stateEnrolled}
}

// PairUp makes ready for bodies of messages between two connections to skip the proxy; none do until Aside.Allow. A socket may
// be in one Aside at a time, and the last must be closed before the next. Errors are StepAside's. Costs one system call.
func (d *Datapath) PairUp(down, up AsideEnd) (*Aside, error) {
	t := d.asides.Load()
	if t == nil || !d.StepsAside() {
		return nil, fmt.Errorf("%w: it is switched off", ErrNotAside)
	}
	if err := errors.Join(down.err, up.err); err != nil {
		return nil, err
	}
	if !down.enrolled {
		return nil, fmt.Errorf("%w: the client's leg is not redirected", ErrNotAside)
	}
	slot, ok := t.take()
	if !ok {
		return nil, fmt.Errorf("%w: %d connections do already", ErrNotAside, len(t.dirs)/2)
	}
	a := &Aside{t: t, slot: slot}
	token := rand.Uint64() | 1
	for i := range 2 {
		dir := a.dir(i)
		*dir = asideDir{Rested: 1} // the first wait is no longer than others
		atomic.StoreUint64(&dir.Token, token)
	}
	rq := asideRequest{Token: token, Slot: slot, Down: down.key}
	if up.enrolled {
		rq.Up = up.key
	}
	why, err := t.prog.Run(&ebpf.RunOptions{Data: unsafe.Slice((*byte)(unsafe.Pointer(&rq)), unsafe.Sizeof(rq))})
	if err == nil && (why&0xff == 0 || why>>8 == 0) {
		for i := range a.base {
			a.base[i] = atomic.LoadUint64(&a.dir(i).Carried)
		}
		return a, nil
	}
	a.Close()
	if err != nil {
		return nil, fmt.Errorf("run sm_step_aside: %w", err)
	}
	return nil, fmt.Errorf("%w: %s; %s", ErrNotAside, asideReason(uint8(why)), asideReason(uint8(why>>8)))
}

func (a *Aside) dir(i int) *asideDir { return &a.t.dirs[int(a.slot)+i] }

// Forwarded is where the proxy writes how many bytes of the direction's sender its far socket has taken.
func (a *Aside) Forwarded(direction int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&a.dir(direction).Forwarded))
}

// Calls makes senders that wait for the proxy call there, from the next time on: each leaves its direction's number in
// *call, which the proxy's loop of that index takes, and gives up when neither *beat nor what was forwarded changes. Loops
// from 256 on share the words of others.
func (a *Aside) Calls(loop int) (call, beat *atomic.Uint32, numbers [2]uint32) {
	at := uint32(loop) % uint32(len(a.t.desks))
	for i := range numbers {
		atomic.StoreUint32(&a.dir(i).Desk, at)
		numbers[i] = a.slot + uint32(i) + 1
	}
	desk := &a.t.desks[at]
	return (*atomic.Uint32)(unsafe.Pointer(&desk.Call)), (*atomic.Uint32)(unsafe.Pointer(&desk.Beat)), numbers
}

// Allow lets bytes of one message skip the proxy: those of the direction's sender behind the first received, which came
// to the proxy, and what was carried, so many of them. The byte behind comes to the proxy. Before, Forwarded must be right
// for this message, and the byte behind the last allowed ones must have come to the proxy: bpf/body.h says why. No system
// call.
func (a *Aside) Allow(direction int, received, bytes uint64) {
	if a.closed {
		return
	}
	dir := a.dir(direction)
	atomic.StoreUint64(&dir.Budget, received+atomic.LoadUint64(&dir.Carried)+bytes)
}

// Carried is how many bytes have skipped the proxy.
func (a *Aside) Carried(direction int) uint64 {
	if a.closed {
		return a.carried[direction]
	}
	return atomic.LoadUint64(&a.dir(direction).Carried) - a.base[direction]
}

// Quiet is how long ago the last byte skipped the proxy, to some milliseconds; false: none has yet.
func (a *Aside) Quiet() (time.Duration, bool) {
	if a.closed {
		return 0, false
	}
	last := max(atomic.LoadUint64(&a.dir(ToServer).Last), atomic.LoadUint64(&a.dir(ToClient).Last))
	if last == 0 {
		return 0, false
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, false
	}
	return time.Duration(max(now.Nano()-int64(last), 0)), true
}

// Close must be called before either of the proxy's sockets is closed: from then on nothing skips the proxy any more.
func (a *Aside) Close() {
	if a.closed {
		return
	}
	for i := range a.carried {
		atomic.StoreUint64(&a.dir(i).Token, 0)
	}
	for i := range a.carried {
		a.carried[i] = atomic.LoadUint64(&a.dir(i).Carried) - a.base[i]
	}
	a.closed = true
	a.t.give(a.slot)
}

// enableStepAside makes ready for connections to be handed over, if this kernel allows it.
func (d *Datapath) enableStepAside() {
	t, err := newAsides(d.objs)
	d.probes.add("step_aside", err, "all bytes of proxied connections pass the proxy")
	if err != nil {
		d.DisableStepAside(err.Error())
		return
	}
	d.asides.Store(t)
}

// StepsAside tells whether new connections are handed over.
func (d *Datapath) StepsAside() bool { return d.asides.Load() != nil && d.Accelerating() }

// DisableStepAside keeps connections from being handed over from now on; reason is what status says.
func (d *Datapath) DisableStepAside(reason string) {
	d.asides.Store(nil)
	d.mu.Lock()
	d.asideReason = reason
	d.mu.Unlock()
}

// StepAsideStatus is about connections whose bytes skip the proxy.
type StepAsideStatus struct {
	Active bool   `json:"active"`
	Reason string `json:"reason,omitempty"` // why not
	// Open connections that may skip the proxy.
	Open int `json:"open"`
	// Bytes that have; they are among the redirected ones.
	Bytes uint64 `json:"bytes"`
	// Directions that came back because their receiver was slow.
	Returned uint64 `json:"returned"`
	// Bodies of which a part has skipped the proxy, and what of Bytes is theirs.
	Bodies    uint64 `json:"bodies"`
	BodyBytes uint64 `json:"body_bytes"`
}

func (d *Datapath) stepAsideStatus(c *Counters) StepAsideStatus {
	s := StepAsideStatus{Bytes: c.AsideBytes, Returned: c.AsideReturned, Bodies: c.AsideBodies, BodyBytes: c.AsideBodyBytes}
	d.mu.Lock()
	s.Reason = d.asideReason
	accelerating := d.flags&flagAccelerate != 0
	d.mu.Unlock()
	if t := d.asides.Load(); t != nil {
		t.mu.Lock()
		s.Open = t.open
		t.mu.Unlock()
		s.Active = accelerating
	}
	if !s.Active && s.Reason == "" {
		s.Reason = "acceleration is off"
	}
	return s
}
