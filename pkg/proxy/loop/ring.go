package loop

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The bare io_uring: two rings shared with the kernel, and a ring of buffers lent to it. Nothing here knows of
// connections. Numbers and layouts are those of include/uapi/linux/io_uring.h.

// ErrNoRing: this kernel, or what confines this process, has no io_uring that the loop can use. It takes
// deferred task work (6.1), which implies multishot receives (6.0) and rings of buffers (5.19).
var ErrNoRing = errors.New("no usable io_uring")

const (
	ringEntries = 2048 // requests between two submissions; more than that submits early
	cqEntries   = 16384
)

const (
	setupCQSize       = 1 << 3
	setupRDisabled    = 1 << 6
	setupSubmitAll    = 1 << 7
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	featNodrop     = 1 << 1
	featExtArg     = 1 << 8

	enterGetEvents = 1 << 0
	enterExtArg    = 1 << 3

	registerEnableRings = 12
	registerPbufRing    = 22

	opPollAdd     = 6
	opSendMsg     = 9
	opAsyncCancel = 14
	opClose       = 19
	opSend        = 26
	opRecv        = 27

	sqeBufferSelect   = 1 << 5
	sqeCQESkipSuccess = 1 << 6
	recvMultishot     = 1 << 1 // in ioprio
	pollAddMulti      = 1 << 0 // in len
	cancelAll         = 1 << 0
	cancelFD          = 1 << 1

	sqCQOverflow = 1 << 1

	cqeBuffer      = 1 << 0
	cqeMore        = 1 << 1
	cqeBufferShift = 16

	offSQEs = 0x10000000
)

type uringParams struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, wqFD uint32
	resv                                                               [3]uint32
	sq                                                                 struct {
		head, tail, mask, entries, flags, dropped, array, resv uint32
		userAddr                                               uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, resv uint32
		userAddr                                               uint64
	}
}

type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off           uint64
	addr          uint64
	len           uint32
	opFlags       uint32
	userData      uint64
	bufGroup      uint16
	personality   uint16
	fileIndex     int32
	pad           [2]uint64
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

type bufEntry struct {
	addr uint64
	len  uint32
	bid  uint16
	resv uint16 // of entry 0: the ring's tail
}

// ring is one io_uring with its buffers. After begin only the thread that called it may use it.
type ring struct {
	fd           int
	rings, sqMem []byte
	sqHead       *uint32
	sqTail       *uint32
	sqMask       uint32
	sqFlags      *uint32
	sqes         []sqe
	tail         uint32 // of requests that are written but not yet shown to the kernel
	shown        uint32

	cqHead, cqTail *uint32
	cqMask         uint32
	cqes           []cqe

	lent []*buffers
}

// newRing makes a ring that is asleep until begin: whoever begins it is its one submitter.
func newRing() (*ring, error) {
	p := uringParams{cqEntries: cqEntries, flags: setupCQSize | setupRDisabled | setupSubmitAll | setupSingleIssuer | setupDeferTaskrun}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, ringEntries, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("%w: io_uring_setup: %w", ErrNoRing, errno)
	}
	unix.CloseOnExec(int(fd))
	r := &ring{fd: int(fd)}
	if want := uint32(featSingleMmap | featNodrop | featExtArg); p.features&want != want {
		r.close()
		return nil, fmt.Errorf("%w: features %#x", ErrNoRing, p.features)
	}
	if err := r.mapRings(&p); err != nil {
		r.close()
		return nil, fmt.Errorf("%w: %w", ErrNoRing, err)
	}
	return r, nil
}

func (r *ring) mapRings(p *uringParams) error {
	size := max(p.sq.array+4*p.sqEntries, p.cq.cqes+uint32(unsafe.Sizeof(cqe{}))*p.cqEntries)
	var err error
	if r.rings, err = unix.Mmap(r.fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map the rings: %w", err)
	}
	if r.sqMem, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map the requests: %w", err)
	}
	word := func(at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[at])) }
	r.sqHead, r.sqTail, r.sqMask = word(p.sq.head), word(p.sq.tail), *word(p.sq.mask)
	r.sqFlags = word(p.sq.flags)
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), *word(p.cq.mask)
	r.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(&r.sqMem[0])), p.sqEntries)
	r.cqes = unsafe.Slice((*cqe)(unsafe.Pointer(&r.rings[p.cq.cqes])), p.cqEntries)
	// Request i stands at place i, for ever.
	array := unsafe.Slice(word(p.sq.array), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
	return nil
}

// buffers are lent to the kernel, which picks one for each receive of the group. Pages are touched in turn, so all of
// them are resident in the end.
type buffers struct {
	size, count int
	ring        []bufEntry
	tail        uint16
	ringMem     []byte
	mem         []byte
}

func (r *ring) lend(group uint16, size, count int) (*buffers, error) {
	b := &buffers{size: size, count: count}
	var err error
	if b.ringMem, err = unix.Mmap(-1, 0, count*int(unsafe.Sizeof(bufEntry{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return nil, fmt.Errorf("map the buffers' ring: %w", err)
	}
	r.lent = append(r.lent, b)
	if b.mem, err = unix.Mmap(-1, 0, count*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return nil, fmt.Errorf("map the buffers: %w", err)
	}
	b.ring = unsafe.Slice((*bufEntry)(unsafe.Pointer(&b.ringMem[0])), count)
	reg := struct {
		addr    uint64
		entries uint32
		group   uint16
		flags   uint16
		resv    [3]uint64
	}{uint64(uintptr(unsafe.Pointer(&b.ringMem[0]))), uint32(count), group, 0, [3]uint64{}}
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerPbufRing, uintptr(unsafe.Pointer(&reg)), 1, 0, 0); errno != 0 {
		return nil, fmt.Errorf("register the buffers: %w", errno)
	}
	for i := range uint16(count) {
		b.giveBack(i)
	}
	return b, nil
}

// filled is what a receive has put into a buffer; giveBack lends it again.
func (b *buffers) filled(flags uint32, n int32) []byte {
	at := int(flags>>cqeBufferShift) * b.size
	return b.mem[at : at+int(n) : at+int(n)]
}

func (b *buffers) giveBack(bid uint16) {
	e := &b.ring[int(b.tail)&(b.count-1)]
	e.addr = uint64(uintptr(unsafe.Pointer(&b.mem[int(bid)*b.size])))
	e.len, e.bid = uint32(b.size), bid
	b.tail++
	// The tail is 16 bits behind entry 0's id: both are stored as the word that they share, since the kernel reads the
	// tail with acquire semantics and Go's atomics begin at 32 bits.
	first := &b.ring[0]
	word := uint32(first.bid) | uint32(b.tail)<<16
	if !littleEndian {
		word = uint32(first.bid)<<16 | uint32(b.tail)
	}
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&first.bid)), word)
}

func (b *buffers) unmap() {
	for _, m := range [][]byte{b.ringMem, b.mem} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
}

// begin makes the calling thread the ring's submitter.
func (r *ring) begin() error {
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerEnableRings, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("enable the ring: %w", errno)
	}
	return nil
}

func (r *ring) close() {
	for _, m := range [][]byte{r.rings, r.sqMem} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	_ = unix.Close(r.fd)
	// The kernel lets go of the buffers with the ring.
	for _, b := range r.lent {
		b.unmap()
	}
}

var littleEndian = func() bool { x := uint16(1); return *(*byte)(unsafe.Pointer(&x)) == 1 }()

// overflown says that completions wait in the kernel for room in the ring.
func (r *ring) overflown() bool { return atomic.LoadUint32(r.sqFlags)&sqCQOverflow != 0 }

// next is an empty request, to be filled in before anything else is called. full: submit first.
func (r *ring) next() (e *sqe, full bool) {
	if r.tail-atomic.LoadUint32(r.sqHead) > r.sqMask {
		return nil, true
	}
	e = &r.sqes[r.tail&r.sqMask]
	*e = sqe{}
	r.tail++
	return e, false
}

// enter submits what is new, and runs what the kernel has to do for this thread. With wait it sleeps until there is a
// completion, at most d (negative: for ever).
func (r *ring) enter(wait bool, d time.Duration) syscall.Errno {
	n := r.tail - r.shown
	atomic.StoreUint32(r.sqTail, r.tail)
	var took uintptr
	var errno syscall.Errno
	switch {
	case !wait:
		took, _, errno = syscall.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), 0, enterGetEvents, 0, 0)
	case d < 0:
		took, _, errno = syscall.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), 1, enterGetEvents, 0, 0)
	default:
		ts := unix.NsecToTimespec(int64(d))
		arg := struct {
			sigmask   uint64
			sigmaskSz uint32
			pad       uint32
			ts        uint64
		}{ts: uint64(uintptr(unsafe.Pointer(&ts)))}
		took, _, errno = syscall.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), 1, enterGetEvents|enterExtArg,
			uintptr(unsafe.Pointer(&arg)), unsafe.Sizeof(arg))
	}
	if errno == 0 {
		r.shown += uint32(took)
	}
	return errno
}
