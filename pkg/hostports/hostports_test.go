package hostports

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// inNewNamespace runs a test on a thread of its own network namespace, which ends with the test.
func inNewNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestWhoHoldsAPort(t *testing.T) {
	inNewNamespace(t)
	only6 := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_V6ONLY, 1) })
	}}
	listen := func(c net.ListenConfig, network, addr string) {
		t.Helper()
		if strings.HasPrefix(network, "udp") {
			p, err := c.ListenPacket(context.Background(), network, addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.Close() })
			return
		}
		l, err := c.Listen(context.Background(), network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	listen(net.ListenConfig{}, "tcp", ":30001")
	listen(net.ListenConfig{}, "tcp4", "0.0.0.0:30002")
	listen(only6, "tcp6", "[::]:30003")
	listen(net.ListenConfig{}, "tcp", "127.0.0.1:30004")
	listen(net.ListenConfig{}, "udp", ":30005")
	listen(net.ListenConfig{}, "udp", "[::1]:30006")
	// A connected UDP socket is a client.
	c, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	clientPort := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()

	list, err := List()
	if err != nil {
		t.Fatal(err)
	}
	held := func(addr string, p service.Protocol) (found []Socket) {
		for _, s := range list {
			if s.Holds(netip.MustParseAddrPort(addr), p) {
				found = append(found, s)
			}
		}
		return found
	}
	for _, tt := range []struct {
		addr     string
		protocol service.Protocol
		want     bool
	}{
		{"192.0.2.1:30001", service.TCP, true}, {"[2001:db8::1]:30001", service.TCP, true}, {"192.0.2.1:30001", service.UDP, false},
		{"192.0.2.1:30002", service.TCP, true}, {"[2001:db8::1]:30002", service.TCP, false},
		{"192.0.2.1:30003", service.TCP, false}, {"[2001:db8::1]:30003", service.TCP, true},
		{"192.0.2.1:30004", service.TCP, false}, {"127.0.0.1:30004", service.TCP, true}, {"[::1]:30004", service.TCP, false},
		{"192.0.2.1:30005", service.UDP, true}, {"[2001:db8::1]:30005", service.UDP, true}, {"192.0.2.1:30005", service.TCP, false},
		{"[::1]:30006", service.UDP, true}, {"192.0.2.1:30006", service.UDP, false},
		{"192.0.2.1:30007", service.TCP, false}, {fmt.Sprintf("127.0.0.1:%d", clientPort), service.UDP, false},
	} {
		if got := held(tt.addr, tt.protocol); len(got) != 0 != tt.want {
			t.Errorf("%s %s: held by %v, want %v", tt.protocol, tt.addr, got, tt.want)
		}
	}
	inode := held("127.0.0.1:30004", service.TCP)[0].Inode
	if owner := Owners(inode)[inode]; !strings.HasSuffix(owner, fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("the owner is %q", owner)
	}
}
