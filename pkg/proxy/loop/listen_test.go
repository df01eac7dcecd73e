package loop

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// At an upgrade two agents listen on one port. The one that leaves must get nothing more before it closes, and once it
// has left all must go on as if it had never been.
func TestPassOnGivesConnectionsToTheSecondListener(t *testing.T) {
	l := startLoop(t)
	group := func(addr *unix.SockaddrInet4) int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			t.Fatal(err)
		}
		if err := unix.Bind(fd, addr); err != nil {
			t.Fatal(err)
		}
		if err := unix.Listen(fd, 1024); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	var got [3]int // used on the loop alone
	listen := func(fd, who int) (ln *Listener) {
		do(t, l, func() {
			var err error
			ln, err = l.Listen(fd, func(fd int, _ netip.AddrPort) { got[who]++; sysClose(int32(fd)) })
			if err != nil {
				t.Error(err)
			}
		})
		return ln
	}
	fd := group(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	at := sysName(int32(fd), false)
	old := listen(fd, 0)
	dial := func(n int, want string, ok func(more [3]int) bool) {
		t.Helper()
		var before, more [3]int
		do(t, l, func() { before = got })
		for range n {
			c, err := net.Dial("tcp", at.String())
			if err != nil {
				t.Fatal(err)
			}
			_ = c.Close()
		}
		eventually(t, want, func() bool {
			do(t, l, func() {
				for i := range more {
					more[i] = got[i] - before[i]
				}
			})
			return more[0]+more[1]+more[2] == n
		})
		if !ok(more) {
			t.Errorf("%s: %v", want, more)
		}
	}
	pass := func(ln *Listener, to int) {
		do(t, l, func() {
			if err := ln.PassOn(to); err != nil {
				t.Error(err)
			}
		})
	}

	pass(old, 1)
	dial(20, "alone, it keeps what comes", func(n [3]int) bool { return n == [3]int{20, 0, 0} })
	next := listen(group(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(at.Port())}), 1)
	dial(40, "all go to the second", func(n [3]int) bool { return n == [3]int{0, 40, 0} })
	do(t, l, func() { old.Drain() })
	dial(20, "the first has left", func(n [3]int) bool { return n == [3]int{0, 20, 0} })
	third := listen(group(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(at.Port())}), 2)
	pass(next, 1)
	dial(40, "the next upgrade", func(n [3]int) bool { return n == [3]int{0, 0, 40} })
	pass(third, 0)
	dial(40, "the new one goes, and the one before stays", func(n [3]int) bool { return n == [3]int{0, 40, 0} })
	do(t, l, func() { third.Drain() })
	dial(20, "the new one has gone", func(n [3]int) bool { return n == [3]int{0, 20, 0} })
	do(t, l, func() { next.Close() })
	do(t, l, func() {
		if err := next.PassOn(1); err != nil {
			t.Errorf("of a closed listener: %v", err)
		}
	})
}
