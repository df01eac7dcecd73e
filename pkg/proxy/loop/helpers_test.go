package loop

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testedIO is the backend: every test of the package runs on each.
var testedIO string

func TestMain(m *testing.M) {
	code := 0
	for _, testedIO = range []string{IOEpoll, IORing} {
		if l, err := New(Config{IO: testedIO}); errors.Is(err, ErrNoRing) {
			fmt.Println("no io_uring here, so that backend is not tested:", err)
			continue
		} else if err != nil {
			fmt.Println("FAIL:", err)
			os.Exit(1)
		} else {
			l.backend.close()
		}
		fmt.Println("backend", testedIO)
		code = max(code, m.Run())
	}
	os.Exit(code)
}

// patience is a deadline for things that happen at once on a healthy machine; it only ends a hung test.
const patience = 20 * time.Second

// startLoop runs a loop for the test and checks at its end that no descriptor is left.
func startLoop(t testing.TB) *Loop {
	t.Helper()
	before := openFiles(t)
	l, err := New(Config{IO: testedIO})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if err := l.Run(); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		l.Stop()
		l.Wait()
		if s := l.Stats(); s.Conns != 0 || s.Listeners != 0 || s.BufferBytes != 0 {
			t.Errorf("after the loop's end: %+v", s)
		}
		eventually(t, "descriptors closed", func() bool { return openFiles(t) <= before })
	})
	return l
}

func openFiles(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// do runs fn on the loop and waits for it.
func do(t testing.TB, l *Loop, fn func()) {
	t.Helper()
	done := make(chan struct{})
	if !l.Post(func() { fn(); close(done) }) {
		t.Fatal("the loop has stopped")
	}
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the loop hangs")
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// listen makes a listening socket that the loop may own.
func listen(t testing.TB) (int, netip.AddrPort) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1024); err != nil {
		t.Fatal(err)
	}
	return fd, sysName(int32(fd), false)
}

// serve accepts on the loop and gives every connection the handler that make returns.
func serve(t testing.TB, l *Loop, o Options, make func() Handler) netip.AddrPort {
	t.Helper()
	fd, addr := listen(t)
	do(t, l, func() {
		if _, err := l.Listen(fd, func(fd int, peer netip.AddrPort) { l.Adopt(fd, peer, make(), o) }); err != nil {
			t.Error(err)
		}
	})
	return addr
}

func dial(t testing.TB, addr netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// hooks is a Handler of functions; a nil one consumes, ignores or closes.
type hooks struct {
	connect func(*Conn, error)
	data    func(*Conn, []byte) int
	eof     func(*Conn)
	drained func(*Conn)
	close   func(*Conn, error)
	closes  int
}

func (h *hooks) OnConnect(c *Conn, err error) {
	if h.connect != nil {
		h.connect(c, err)
	}
}

func (h *hooks) OnData(c *Conn, b []byte) int {
	if h.data != nil {
		return h.data(c, b)
	}
	return len(b)
}

func (h *hooks) OnEOF(c *Conn) {
	if h.eof != nil {
		h.eof(c)
	} else {
		c.Close()
	}
}

func (h *hooks) OnDrained(c *Conn) {
	if h.drained != nil {
		h.drained(c)
	}
}

func (h *hooks) OnClose(c *Conn, err error) {
	if h.closes++; h.closes > 1 {
		panic("OnClose called twice")
	}
	if h.close != nil {
		h.close(c, err)
	}
}
