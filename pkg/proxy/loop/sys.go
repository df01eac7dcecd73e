package loop

import (
	"fmt"
	"net/netip"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of the hot path are raw: every socket is non-blocking, so none of them sleeps, and telling
// the Go scheduler about each would cost as much as a small read itself.

func sysRead(fd int32, b []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), e
}

func sysWrite(fd int32, b []byte) (int, syscall.Errno) {
	// sendto instead of write: MSG_NOSIGNAL spares a SIGPIPE for every peer that went away.
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

func sysWritev(fd int32, iov []unix.Iovec, msg *unix.Msghdr) (int, syscall.Errno) {
	msg.Iov = &iov[0]
	msg.SetIovlen(len(iov))
	n, _, e := syscall.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(msg)), unix.MSG_NOSIGNAL)
	return int(n), e
}

func sysClose(fd int32) {
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

func sysShutdown(fd int32, how int) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), uintptr(how), 0)
	return e
}

func sysSetInt(fd int32, level, name, value int) syscall.Errno {
	v := int32(value)
	_, _, e := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)), 4, 0)
	return e
}

// sockError takes the pending error of a socket.
func sockError(fd int32) syscall.Errno {
	v, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		if e, ok := err.(syscall.Errno); ok {
			return e
		}
		return unix.EIO
	}
	return syscall.Errno(v)
}

// unacked is how many sent bytes the peer's kernel hasn't acknowledged.
func unacked(fd int32) int {
	n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	if err != nil {
		return 0
	}
	return n
}

// abortOnClose makes the next close send RST and discard what is queued.
func abortOnClose(fd int32) {
	lg := unix.Linger{Onoff: 1}
	_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &lg)
}

// sockaddr is a socket address as the kernel wants it, without allocating.
type sockaddr struct {
	raw unix.RawSockaddrInet6 // large enough for both families
	len uint32
}

func (s *sockaddr) reset() { s.len = uint32(unsafe.Sizeof(s.raw)) }

func (s *sockaddr) set(a netip.AddrPort) error {
	ip := a.Addr()
	if !ip.IsValid() {
		return fmt.Errorf("no address to connect to")
	}
	port := a.Port()
	swapped := port<<8 | port>>8
	if ip.Is4() {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.raw))
		*v4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: swapped, Addr: ip.As4()}
		s.len = uint32(unsafe.Sizeof(*v4))
		return nil
	}
	s.raw = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: swapped, Addr: ip.As16()}
	if z := ip.Zone(); z != "" {
		id, err := strconv.ParseUint(z, 10, 32)
		if err != nil {
			return fmt.Errorf("address %s: the zone must be an interface number: names mean something else in each network namespace", a)
		}
		s.raw.Scope_id = uint32(id)
	}
	s.len = uint32(unsafe.Sizeof(s.raw))
	return nil
}

// get returns the address; the zero AddrPort if it is of no internet family.
func (s *sockaddr) get() netip.AddrPort {
	p := s.raw.Port
	port := p<<8 | p>>8
	switch s.raw.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&s.raw)).Addr), port)
	case unix.AF_INET6:
		ip := netip.AddrFrom16(s.raw.Addr)
		if s.raw.Scope_id != 0 && !ip.Is4In6() {
			ip = ip.WithZone(strconv.FormatUint(uint64(s.raw.Scope_id), 10))
		}
		return netip.AddrPortFrom(ip, port)
	}
	return netip.AddrPort{}
}

func sysAccept(fd int32, s *sockaddr) (int32, syscall.Errno) {
	s.reset()
	n, _, e := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), uintptr(unsafe.Pointer(&s.len)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return int32(n), e
}

func sysConnect(fd int32, s *sockaddr) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), uintptr(s.len))
	return e
}

func sysBind(fd int32, s *sockaddr) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), uintptr(s.len))
	return e
}

// sysName is getsockname, or getpeername for the peer's, unmapped. The numbers stand where they are used, for the guard
// against splices (pkg/proxy/lint_test.go).
func sysName(fd int32, peer bool) netip.AddrPort {
	var s sockaddr
	var e syscall.Errno
	s.reset()
	if peer {
		_, _, e = syscall.RawSyscall(unix.SYS_GETPEERNAME, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), uintptr(unsafe.Pointer(&s.len)))
	} else {
		_, _, e = syscall.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), uintptr(unsafe.Pointer(&s.len)))
	}
	if e != 0 {
		return netip.AddrPort{}
	}
	return unmap(s.get())
}

// unmap gives v4-mapped IPv6 addresses the form in which the rest of the program compares them.
func unmap(a netip.AddrPort) netip.AddrPort {
	if a.Addr().Is4In6() {
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return a
}

// nameThread names the calling thread; 15 bytes are kept.
func nameThread(name string) error {
	b, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(b)), 0, 0, 0)
}
