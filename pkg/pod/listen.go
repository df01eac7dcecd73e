package pod

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// backlog of a listener; the kernel caps it at net.core.somaxconn of the pod's namespace.
const backlog = 4096

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// errNoLoopback: the loopback address isn't there (the device is down, or IPv6 is switched off).
var errNoLoopback = errors.New("the loopback address is not there")

// listen opens a listener in the calling thread's namespace.
func listen(addr netip.AddrPort, cfg *Config) (int, error) {
	family, sa := sockaddr(addr)
	// IPPROTO_TCP by name: never MPTCP, whose sockets sockmap does not take.
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return -1, errNoLoopback
	}
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if cfg.Own != nil {
		if err := cfg.Own(fd); err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
	}
	if err := bindListen(fd, family, sa); err != nil {
		_ = unix.Close(fd)
		switch {
		case errors.Is(err, unix.EADDRNOTAVAIL):
			return -1, errNoLoopback
		case errors.Is(err, unix.EADDRINUSE):
			return -1, fmt.Errorf("listen on %s: %w: a process of the pod holds this port%s", addr, err, consequence(cfg.Foreign))
		}
		return -1, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return fd, nil
}

func bindListen(fd, family int, sa unix.Sockaddr) error {
	// REUSEADDR: connections of an agent that died may linger on the port. REUSEPORT: an agent that takes over
	// opens its listeners while its predecessor's are still open.
	for _, option := range []int{unix.SO_REUSEADDR, unix.SO_REUSEPORT} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1); err != nil {
			return err
		}
	}
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return err
	}
	return unix.Listen(fd, backlog)
}

func sockaddr(addr netip.AddrPort) (family int, sa unix.Sockaddr) {
	if addr.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())}
}

// netnsCookie is the kernel's name of the namespace that a socket is in.
func netnsCookie(fd int) (uint64, error) {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("SO_NETNS_COOKIE: %w (needs Linux 5.14)", err)
	}
	return cookie, nil
}

// ipv6Off tells whether the calling thread's namespace has no ::1 and won't get it by itself.
func ipv6Off() bool {
	for _, dev := range []string{"all", "lo"} {
		// /proc/sys/net shows the namespace of the thread that opens it.
		value, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + dev + "/disable_ipv6")
		if err != nil || strings.TrimSpace(string(value)) != "0" {
			return true
		}
	}
	return false
}
