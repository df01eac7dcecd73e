package traps

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath/selftest"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
)

// uring is the least of io_uring: one request at a time, by raw system calls.
type uring struct {
	fd         int
	rings, sqe []byte
	p          [30]uint32 // struct io_uring_params
}

// Indices into struct io_uring_params as words.
const (
	sqEntries, cqEntries, features       = 0, 1, 5
	sqTail, sqMask, sqArray              = 11, 12, 16
	cqHead, cqTail, cqMask, cqCQEs       = 20, 21, 22, 25
	opSend, opRecv                       = 26, 27
	singleMmap, mmapSQEs, enterGetEvents = 1, 0x10000000, 1
	sizeofSQE, sizeofCQE, uringEntries   = 64, 16, 4
)

var errNoRing = errors.New("io_uring is not there")

func newRing() (*uring, error) {
	r := &uring{}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uringEntries, uintptr(unsafe.Pointer(&r.p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("%w: %w", errNoRing, errno)
	}
	r.fd = int(fd)
	if r.p[features]&singleMmap == 0 {
		unix.Close(r.fd)
		return nil, errNoRing
	}
	size := max(r.p[sqArray]+4*r.p[sqEntries], r.p[cqCQEs]+sizeofCQE*r.p[cqEntries])
	var err error
	if r.rings, err = unix.Mmap(r.fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		r.sqe, err = unix.Mmap(r.fd, mmapSQEs, int(r.p[sqEntries]*sizeofSQE), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	return r, err
}

func (r *uring) close() {
	unix.Munmap(r.rings)
	unix.Munmap(r.sqe)
	unix.Close(r.fd)
}

func (r *uring) word(at int) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[r.p[at]])) }

// submit hands one request over.
func (r *uring) submit(op byte, fd int, b []byte) error {
	tail := *r.word(sqTail)
	i := tail & *r.word(sqMask)
	e := r.sqe[i*sizeofSQE : (i+1)*sizeofSQE]
	clear(e)
	e[0] = op
	binary.NativeEndian.PutUint32(e[4:], uint32(fd))
	binary.NativeEndian.PutUint64(e[16:], uint64(uintptr(unsafe.Pointer(&b[0]))))
	binary.NativeEndian.PutUint32(e[24:], uint32(len(b)))
	binary.NativeEndian.PutUint32(r.rings[r.p[sqArray]+4*i:], i)
	atomic.StoreUint32(r.word(sqTail), tail+1)
	return r.enter(1, 0)
}

func (r *uring) enter(submit, wait uintptr) error {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), submit, wait, enterGetEvents, 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// result waits for the request.
func (r *uring) result() (int32, error) {
	head := *r.word(cqHead)
	for head == atomic.LoadUint32(r.word(cqTail)) {
		if err := r.enter(0, 1); err != nil {
			return 0, err
		}
	}
	at := r.p[cqCQEs] + sizeofCQE*(head&*r.word(cqMask))
	res := int32(binary.NativeEndian.Uint32(r.rings[at+8:]))
	atomic.StoreUint32(r.word(cqHead), head+1)
	return res, nil
}

// Receives that wait before there is data, receives of what is there, sends, and the end. Where the kernel has no ring for an
// application it has none for the proxy either, which then must say so and go on by epoll (tests/node:
// TestWithoutIoUringTheAgentSaysSoAndServes has the whole agent on such a kernel).
func TestIoUring(t *testing.T) {
	if r, err := newRing(); errors.Is(err, errNoRing) {
		var said bytes.Buffer
		l, err := loop.New(loop.Config{IO: loop.IOAuto, Logger: slog.New(slog.NewTextHandler(&said, nil))})
		if err != nil {
			t.Fatal(err)
		}
		if l.IO() != loop.IOEpoll || !strings.Contains(said.String(), "uses epoll") || !strings.Contains(said.String(), loop.ErrNoRing.Error()) {
			t.Errorf("without io_uring the proxy uses %s and says %q", l.IO(), said.String())
		}
		return
	} else if err != nil {
		t.Fatal(err)
	} else {
		r.close()
	}
	compare(t, func(e *ends) string {
		r, err := newRing()
		e.must(err)
		defer r.close()
		e.must(unix.SetNonblock(e.receiver, false)) // else a receive of nothing is EAGAIN at once
		out := ""
		b := make([]byte, 100)
		for i := range 5 {
			e.must(r.submit(opRecv, e.receiver, b))
			e.send(fmt.Sprintf("waited for %d", i))
			n, err := r.result()
			e.must(err)
			out += fmt.Sprintf("%d %q; ", n, b[:max(n, 0)])
		}
		message := []byte("sent by the ring")
		e.must(r.submit(opSend, e.sender, message))
		n, err := r.result()
		e.must(err)
		got, err := selftest.Read(e.receiver, int(max(n, 0)))
		out += fmt.Sprintf("%d %q %s; ", n, got, errno(err))
		e.must(r.submit(opRecv, e.receiver, b))
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		n, err = r.result()
		e.must(err)
		return out + fmt.Sprint(n)
	})
}
