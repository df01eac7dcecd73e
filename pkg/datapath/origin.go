package datapath

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the programs know of a socket is read once for every connection that the proxy accepts. The library's look-up takes
// anything for keys and values, by reflection, and allocates for it; this is the same system call without either.

// socketLookup is BPF_MAP_LOOKUP_ELEM in the storage of sockets, key and value included. It is on the heap because the kernel
// is given addresses inside of it as numbers: a stack may move.
type socketLookup struct {
	// As struct bpf_attr has it (include/uapi/linux/bpf.h).
	attr struct {
		mapFD, _          uint32
		key, value, flags uint64
	}
	fd    int64 // the key: its first four bytes where the machine is little-endian, as the objects are
	value sockValue
}

var socketLookups = sync.Pool{New: func() any { return new(socketLookup) }}

// socketState is what the programs know of a socket of this process; ErrNoOrigin: nothing.
func (d *Datapath) socketState(fd int) (sockValue, error) {
	l := socketLookups.Get().(*socketLookup)
	defer socketLookups.Put(l)
	l.fd = int64(fd)
	l.attr.mapFD = uint32(d.objs.sock().FD())
	l.attr.key, l.attr.value = uint64(uintptr(unsafe.Pointer(&l.fd))), uint64(uintptr(unsafe.Pointer(&l.value)))
	_, _, errno := unix.RawSyscall(unix.SYS_BPF, unix.BPF_MAP_LOOKUP_ELEM, uintptr(unsafe.Pointer(&l.attr)), unsafe.Sizeof(l.attr))
	runtime.KeepAlive(d)
	switch {
	case errno == unix.ENOENT:
		return sockValue{}, ErrNoOrigin
	case errno != 0:
		return sockValue{}, fmt.Errorf("read the state of fd %d from sm_sock: %w", fd, errno)
	}
	return l.value, nil
}

// OriginalDst tells where the client behind an accepted connection wanted to go, and whether the bytes between the
// two are redirected past TCP. It is one map look-up in the accepted socket's storage. Returns ErrNoOrigin for
// a connection that came by itself. Allocates nothing.
func (d *Datapath) OriginalDst(fd int) (netip.AddrPort, bool, error) {
	s, err := d.socketState(fd)
	if err != nil {
		return netip.AddrPort{}, false, err
	}
	if Role(s.Role) != RoleDownstream {
		return netip.AddrPort{}, false, ErrNoOrigin
	}
	return addrPort(s.Origin, s.OriginPort), s.State == stateEnrolled, nil
}
