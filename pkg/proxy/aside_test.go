package proxy

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/internal/conversation"
)

// newStepping is an engine whose connections may skip it after so many pieces of data.
func newStepping(t *testing.T, after int, change ...func(*setup)) *hooked {
	var h *hooked
	h = newHooked(t, 64<<10, true, append([]func(*setup){func(s *setup) {
		s.engine.StepAsideAfter = after
		s.engine.StepAside = func(down, up int, toServer, toClient uint64) (aside.Handle, error) {
			return h.stepAside(down, up, toServer, toClient)
		}
		s.engine.PairUp = func(down, up *aside.End) (aside.Pairing, error) {
			return h.pairUp(down, up)
		}
	}}, change...)...)
	return h
}

func (h *hooked) stepAside(down, up int, toServer, toClient uint64) (aside.Handle, error) {
	a, err := h.d.StepAside(down, up, toServer, toClient)
	if err != nil {
		return nil, err
	}
	return a, nil
}

func (h *hooked) pairUp(down, up *aside.End) (aside.Pairing, error) {
	return aside.PairUp(h.d.AsideEnd, h.d.PairUp)(down, up)
}

// pair connects a client through the proxy to a listener in the server's namespace.
func (h *hooked) pair(t *testing.T, addr string) (client, server *net.TCPConn) {
	t.Helper()
	ln := listenIn(t, h.server, addr)
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	client = mustDialIn(t, h.pod, addr)
	server = (<-accepted).(*net.TCPConn)
	ln.Close()
	t.Cleanup(func() { server.Close() })
	for _, c := range []*net.TCPConn{client, server} {
		_ = c.SetDeadline(time.Now().Add(patience))
	}
	return client, server
}

// say has what written on one side be read on the other.
func say(t *testing.T, from, to net.Conn, what []byte) {
	t.Helper()
	go from.Write(what)
	got := make([]byte, len(what))
	if n, err := io.ReadFull(to, got); err != nil {
		t.Fatalf("after %d of %d bytes: %v", n, len(what), err)
	}
	if !bytes.Equal(got, what) {
		t.Fatal("other bytes arrived than were sent")
	}
}

func TestATalkSkipsTheProxy(t *testing.T) {
	h := newStepping(t, 3)
	for _, addr := range []string{"10.98.0.2:8080", "[fd98::2]:8080"} {
		before, _ := h.d.Counters()
		c, s := h.pair(t, addr)
		for i := range 100 {
			say(t, c, s, []byte(fmt.Sprint("ping ", i)))
			say(t, s, c, []byte(fmt.Sprint("pong ", i)))
		}
		after, _ := h.d.Counters()
		// Where a side answers before the proxy has written down what it forwarded, the next message is the first.
		if n := after.AsideMessages - before.AsideMessages; n < 50 || n > 198 {
			t.Errorf("%d of 200 messages skipped the proxy", n)
		}
		if after.SteppedAside-before.SteppedAside != 1 || after.AsideDirections-before.AsideDirections != 2 {
			t.Errorf("counters: %+v", after)
		}
		big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		say(t, c, s, big)
		say(t, s, c, big)
	}
}

// dialMapped connects an AF_INET6 socket to a v4-mapped address, as dual-stack applications do.
func dialMapped(t testing.TB, f *os.File, to netip.AddrPort) (c *net.TCPConn, err error) {
	inNetns(t, f, func() error {
		var fd int
		if fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
			return nil
		}
		file := os.NewFile(uintptr(fd), "mapped")
		defer file.Close()
		if err = unix.Connect(fd, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}); err != nil && err != unix.EINPROGRESS {
			return nil
		}
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if _, err = unix.Poll(p, int(patience.Milliseconds())); err != nil {
			return nil
		}
		var fc net.Conn
		if fc, err = net.FileConn(file); err == nil {
			c = fc.(*net.TCPConn)
		}
		return nil
	})
	return c, err
}

// Thousands of conversations, of two kinds, over plain TCP and through a proxy that steps aside after the first, the
// second, the fifth piece of data: the applications must not be able to tell. The hand-over falls where it falls: the
// program begins at any message before which nothing is under way, in either direction, in the middle of a bulk transfer,
// in front of an end or a reset; and where a receiver is slow it goes back and forth.
func TestRandomConversationsThatSkipTheProxyAreThoseOfPlainTCP(t *testing.T) {
	const workers, slow = 3, 0
	rounds := 120
	if testing.Short() {
		rounds = 30
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, after := range []int{1, 2, 5, slow} {
		limit := uint32(0)
		if after == slow { // every queue is soon too long
			after, limit = 1, 2<<10
		}
		h := newStepping(t, after, func(s *setup) { s.datapath.BacklogLimit = limit })
		for _, fam := range []string{"IPv4", "IPv6", "mapped"} {
			t.Run(fmt.Sprintf("%s after %d limit %d", fam, after, limit), func(t *testing.T) {
				before, _ := h.d.Counters()
				var all sync.WaitGroup
				for w := range workers {
					all.Go(func() { h.compare(t, fam, w, rounds, seed) })
				}
				all.Wait()
				c, _ := h.d.Counters()
				t.Logf("%d of %d connections, %d messages and %d bytes skipped the proxy, %d of all messages; %d directions, %d returned",
					c.SteppedAside-before.SteppedAside, workers*rounds, c.AsideMessages-before.AsideMessages, c.AsideBytes-before.AsideBytes,
					c.RedirectedMessages-before.RedirectedMessages, c.AsideDirections-before.AsideDirections, c.AsideReturned-before.AsideReturned)
				if c.SteppedAside-before.SteppedAside < uint64(workers*rounds/10) {
					t.Error("hardly any connection skipped the proxy")
				}
			})
		}
	}
}

// compare plays conversations on one worker's ports.
func (h *hooked) compare(t *testing.T, fam string, worker, rounds int, seed uint64) {
	accepted := make(chan *net.TCPConn)
	ip := h.serverIPs[0]
	if fam == "IPv6" {
		ip = h.serverIPs[1]
	}
	serve := func(port uint16) func() (*net.TCPConn, error) {
		ln := listenIn(t, h.server, fmt.Sprintf("[::]:%d", port))
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				accepted <- c.(*net.TCPConn)
			}
		}()
		to := netip.AddrPortFrom(ip, port)
		return func() (*net.TCPConn, error) {
			if fam == "mapped" {
				return dialMapped(t, h.pod, to)
			}
			return dialIn(t, h.pod, to.String())
		}
	}
	plain, proxied := serve(uint16(9080+worker)), serve(uint16(8080+worker))
	for i := range rounds {
		n := seed + uint64(worker*rounds+i)
		draw := conversation.Dialogue
		if i%3 == 0 {
			draw = conversation.Pair
		}
		client, server := draw(n)
		plainC, plainS, err := conversation.Play(plain, accepted, client, server)
		if err != nil {
			t.Error(err)
			return
		}
		proxyC, proxyS, err := conversation.Play(proxied, accepted, client, server)
		if err != nil {
			t.Error(err)
			return
		}
		if err := conversation.Differs(plainC, proxyC, client, server); err != nil {
			t.Errorf("conversation %d (%v, %v): the client %v", n, client.End, server.End, err)
		}
		if err := conversation.Differs(plainS, proxyS, server, client); err != nil {
			t.Errorf("conversation %d (%v, %v): the server %v", n, client.End, server.End, err)
		}
	}
}
