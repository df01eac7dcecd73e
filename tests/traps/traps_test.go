package traps

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/datapath/selftest"
)

// errno is an error as an application sees it.
func errno(err error) string {
	var e unix.Errno
	if errors.As(err, &e) {
		return unix.ErrnoName(e)
	}
	return fmt.Sprint(err)
}

// all reads to the end of the stream.
func all(fd int) string {
	got, err := selftest.Read(fd, 1<<20)
	return fmt.Sprintf("%d bytes, sum %x, %s", len(got), sum(got), errno(err))
}

func sum(b []byte) (h uint64) {
	for _, c := range b {
		h = h*1099511628211 + uint64(c)
	}
	return h
}

func noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(uint64(i) * 2654435761 >> 13)
	}
	return b
}

// Trap 1 and 2: keys in the right byte order, for every kind of address.
func TestByteOrderAndMappedAddresses(t *testing.T) {
	for _, fam := range selftest.Families {
		p, err := stage.Pair(fam, true)
		if err != nil {
			t.Fatal(err)
		}
		for _, way := range [][2]int{{p.Proxy, p.App}, {p.App, p.Proxy}} {
			if err := selftest.Write(way[0], []byte("x")); err != nil {
				t.Fatal(err)
			}
			if got, err := selftest.Read(way[1], 1); err != nil || string(got) != "x" {
				t.Errorf("%s: %q, %v", fam, got, err)
			}
			if how := p.Sends(way[0]); how != "redirect" {
				t.Errorf("%s: bytes go by %q", fam, how)
			}
		}
		p.Close()
	}
}

// Trap 7: as many bytes as are waiting, before and after a read.
func TestFIONREADOfRedirectedBytes(t *testing.T) {
	compare(t, func(e *ends) string {
		out := ""
		for _, n := range []int{1000, 1, 5000} {
			e.send(string(noise(n)))
			e.arrive()
			before, err := unix.IoctlGetInt(e.receiver, unix.SIOCINQ)
			e.must(err)
			got, err := selftest.Read(e.receiver, n)
			e.must(err)
			after, err := unix.IoctlGetInt(e.receiver, unix.SIOCINQ)
			e.must(err)
			out += fmt.Sprint(before, len(got), after, " ")
		}
		return out
	})
}

// Trap 7, the other way: bytes that come by TCP to a socket that is enrolled, because it left too much unread before. Many
// kernels don't count them. What this one does is what the self-test says, every way; hence an application is given sixteen
// times as long as the proxy before its bytes take that way.
func TestFIONREADOfPlainBytesIsAsTheStatusSays(t *testing.T) {
	at := slices.IndexFunc(probes, func(p datapath.Probe) bool { return p.Name == "selftest_fionread_plain" })
	if at < 0 {
		t.Fatalf("the self-test says nothing of it: %v", probes)
	}
	counts := probes[at].OK
	t.Log(probes[at])
	both(t, func(e *ends, redirected bool) {
		sent := e.fill(1 << 16)
		if how := e.pair.Sends(e.sender); redirected && how != "tcp" {
			e.t.Fatalf("after %d bytes the direction is %q", sent, how)
		}
		// One byte stays: who has read everything is sent redirected bytes again.
		_, err := selftest.Read(e.receiver, sent-1)
		e.must(err)
		e.send(string(noise(1000)))
		e.arrive()
		if how := e.pair.Sends(e.sender); redirected && how != "tcp" {
			e.t.Fatalf("with a byte unread the direction is %q", how)
		}
		want := 1001
		if redirected && !counts {
			want = 0
		}
		// The byte that stayed made the socket readable before the others came.
		n, err := unix.IoctlGetInt(e.receiver, unix.SIOCINQ)
		for until := time.Now().Add(10 * time.Second); err == nil && n != want && time.Now().Before(until); time.Sleep(time.Millisecond) {
			n, err = unix.IoctlGetInt(e.receiver, unix.SIOCINQ)
		}
		if err != nil || n != want {
			e.t.Errorf("redirected %v: FIONREAD says %d, %v; want %d", redirected, n, err, want)
		}
		if got, err := selftest.Read(e.receiver, 1001); err != nil || len(got) != 1001 {
			e.t.Errorf("redirected %v: %d bytes, %v", redirected, len(got), err)
		}
	})
}

func TestPeekLeavesTheBytes(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send("peek")
		e.send("aboo")
		e.arrive()
		out := ""
		for _, size := range []int{2, 8, 100} {
			b := make([]byte, size)
			n, _, err := unix.Recvfrom(e.receiver, b, unix.MSG_PEEK)
			out += fmt.Sprintf("%q %s ", b[:max(n, 0)], errno(err))
		}
		got, err := selftest.Read(e.receiver, 8)
		return out + string(got) + errno(err)
	})
}

// Vectors, tiny reads and tiny writes: the bytes are a stream.
func TestStreamHasNoMessages(t *testing.T) {
	compare(t, func(e *ends) string {
		for range 100 {
			e.send("abc")
		}
		var out strings.Builder
		for out.Len() < 300 {
			got, err := selftest.Read(e.receiver, 7)
			e.must(err)
			out.Write(got)
			if out.Len() == 294 {
				got, err := selftest.Read(e.receiver, 6)
				e.must(err)
				out.Write(got)
			}
		}
		return out.String()
	})
}

func TestNonBlockingReadOfNothing(t *testing.T) {
	compare(t, func(e *ends) string {
		b := make([]byte, 10)
		_, err1 := unix.Read(e.receiver, b)
		e.send("x")
		_, err := selftest.Read(e.receiver, 1)
		e.must(err)
		_, err2 := unix.Read(e.receiver, b)
		_, _, err3 := unix.Recvfrom(e.receiver, b, unix.MSG_DONTWAIT|unix.MSG_PEEK)
		return errno(err1) + errno(err2) + errno(err3)
	})
}

// Trap 10: what a reader that never reads can hold is bounded, and in order afterwards.
func TestReaderThatNeverReads(t *testing.T) {
	for _, size := range []int{100, 4096, 1 << 16} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			both(t, func(e *ends, redirected bool) { neverRead(e, redirected, size) })
		})
	}
}

// fill sends messages of that size until nothing more goes, and returns how many bytes went.
func (e *ends) fill(size int) (sent int) {
	e.t.Helper()
	message := make([]byte, size)
	for idle := 0; idle < 10; {
		for i := range message {
			message[i] = byte(uint64(sent+i) * 2654435761 >> 13)
		}
		n, err := unix.Write(e.sender, message)
		if err == unix.EAGAIN {
			idle++
			time.Sleep(5 * time.Millisecond)
			continue
		}
		e.must(err)
		idle = 0
		if sent += n; sent > 64<<20 {
			e.t.Fatal("nothing stops the sender")
		}
	}
	return sent
}

// neverRead fills the connection, then reads all.
func neverRead(e *ends, redirected bool, size int) {
	sent := e.fill(size)
	if how := e.pair.Sends(e.sender); redirected && how != "tcp" {
		e.t.Errorf("after %d bytes the direction is %q", sent, how)
	}
	e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
	got, err := selftest.Read(e.receiver, sent+1)
	e.must(err)
	if len(got) != sent || sum(got) != sum(noise(sent)) {
		e.t.Errorf("sent %d bytes, %d came, or out of order", sent, len(got))
	}
}

// Trap 12: urgent data. TCP takes the urgent byte out of the stream; on redirected sockets it stays in. Pinned, since no
// program sees the flag: applications with urgent data (telnet, FTP's abort) need a pod that is not accelerated.
func TestUrgentData(t *testing.T) {
	pin(t, "abcd", "ab!cd", func(e *ends) string {
		e.send("ab")
		e.must(unix.Sendto(e.sender, []byte("!"), unix.MSG_OOB, nil))
		e.send("cd")
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		var out []byte
		for {
			b := make([]byte, 16)
			n, err := unix.Read(e.receiver, b)
			if errors.Is(err, unix.EAGAIN) {
				e.arrive()
				continue
			}
			e.must(err)
			if n == 0 {
				return string(out)
			}
			out = append(out, b[:n]...)
		}
	})
}

// SO_RCVLOWAT: a reader that asks not to be woken below a mark is woken early on redirected sockets: harmless, pinned.
func TestLowWaterMark(t *testing.T) {
	pin(t, "early 0, then 100", "early 1, then 100", func(e *ends) string {
		e.must(unix.SetsockoptInt(e.receiver, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 100))
		e.send("few")
		time.Sleep(20 * time.Millisecond)
		p := []unix.PollFd{{Fd: int32(e.receiver), Events: unix.POLLIN}}
		early, err := unix.Poll(p, 0)
		e.must(err)
		e.send(string(noise(97)))
		e.arrive() // at the mark it must be woken, whatever came before
		got, err := selftest.Read(e.receiver, 100)
		e.must(err)
		return fmt.Sprintf("early %d, then %d", early, len(got))
	})
}

func TestEdgeTriggeredEpoll(t *testing.T) {
	compare(t, func(e *ends) string {
		ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		e.must(err)
		defer unix.Close(ep)
		const edge = 1 << 31
		e.must(unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, e.receiver, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | edge}))
		events := make([]unix.EpollEvent, 1)
		var out strings.Builder
		event := func() {
			if err := selftest.Wait(ep, unix.POLLIN); err != nil {
				out.WriteString("no event; ")
				return
			}
			n, err := unix.EpollWait(ep, events, 0)
			fmt.Fprintf(&out, "%d %x %s; ", n, events[0].Events, errno(err))
		}
		for range 5 {
			e.send("edge")
			event()
			got, err := selftest.Read(e.receiver, 4)
			fmt.Fprintf(&out, "%q %s; ", got, errno(err))
		}
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		event()
		return out.String() + all(e.receiver)
	})
}

// sendfile, and splice from a pipe, into an enrolled socket.
func TestSendfileAndSpliceIntoASocket(t *testing.T) {
	compare(t, func(e *ends) string {
		f, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
		e.must(err)
		defer unix.Close(f)
		e.must(selftest.Write(f, noise(60_000)))
		var at int64
		for at < 60_000 {
			if _, err := unix.Sendfile(e.sender, f, &at, 60_000-int(at)); err != nil && !errors.Is(err, unix.EAGAIN) {
				e.t.Fatal(err)
			}
		}
		var pipe [2]int
		e.must(unix.Pipe2(pipe[:], unix.O_CLOEXEC))
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		e.must(selftest.Write(pipe[1], noise(5000)))
		for left := 5000; left > 0; {
			n, err := unix.Splice(pipe[0], nil, e.sender, nil, left, 0)
			if err != nil && !errors.Is(err, unix.EAGAIN) {
				e.t.Fatal(err)
			}
			left -= int(max(n, 0))
		}
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		return all(e.receiver)
	})
}

// Trap 6, before anything was sent: noticed, and the bytes come. With bytes unread: pkg/datapath's splice tests.
func TestSpliceOutOfASocket(t *testing.T) {
	compare(t, func(e *ends) string {
		var pipe [2]int
		e.must(unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		_, err := selftest.Splice(e.receiver, pipe[1], 100)
		out := errno(err)
		for range 20 {
			e.send(string(noise(1000)))
			for left := 1000; left > 0; {
				e.arrive()
				n, err := selftest.Splice(e.receiver, pipe[1], left)
				if errors.Is(err, unix.EAGAIN) {
					continue
				}
				e.must(err)
				got, err := selftest.Read(pipe[0], int(n))
				e.must(err)
				out += string(got)
				left -= int(n)
			}
		}
		return fmt.Sprint(len(out), sum([]byte(out)))
	})
}

// MSG_ZEROCOPY: the bytes arrive as they were, and the buffer's release is reported or never asked for.
func TestZeroCopySend(t *testing.T) {
	compare(t, func(e *ends) string {
		e.must(unix.SetsockoptInt(e.sender, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1))
		e.must(unix.Sendto(e.sender, noise(30_000), 0x4000000, nil)) // MSG_ZEROCOPY
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		return all(e.receiver)
	})
}

// Trap 22, pinned: a blocking read can end with EAGAIN when a wake-up brings no data, here that of the reader's own
// half-close from another thread. No byte is lost, but no program expects it: hence sockets that block are not accelerated
// unasked (pkg/datapath: TestBlockingClientIsNotAccelerated).
func TestBlockingReadMayReturnEAGAIN(t *testing.T) {
	both(t, func(e *ends, redirected bool) {
		e.send("first")
		_, err := selftest.Read(e.receiver, 5)
		e.must(err)
		e.must(unix.SetNonblock(e.receiver, false))
		type result struct {
			text string
			err  error
		}
		done := make(chan result, 1)
		read := func() {
			b := make([]byte, 10)
			n, err := unix.Read(e.receiver, b)
			done <- result{string(b[:max(n, 0)]), err}
		}
		go read()
		time.Sleep(50 * time.Millisecond)
		e.must(unix.Shutdown(e.receiver, unix.SHUT_WR))
		time.Sleep(50 * time.Millisecond)
		e.send("second")
		r := <-done
		if redirected && errors.Is(r.err, unix.EAGAIN) {
			e.t.Log("the read ended with EAGAIN")
			go read()
			r = <-done
		}
		if r.text != "second" || r.err != nil {
			e.t.Errorf("redirected %v: %q, %v", redirected, r.text, r.err)
		}
	})
}

func TestBlockingReadWithTimeout(t *testing.T) {
	compare(t, func(e *ends) string {
		e.must(unix.SetNonblock(e.receiver, false))
		e.must(unix.SetsockoptTimeval(e.receiver, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}))
		_, err := unix.Read(e.receiver, make([]byte, 1))
		e.send("x")
		got, err2 := selftest.Read(e.receiver, 1)
		return errno(err) + string(got) + errno(err2)
	})
}

func TestSendmsgWithMore(t *testing.T) {
	compare(t, func(e *ends) string {
		for i := range 50 {
			flags := unix.MSG_MORE
			if i%10 == 9 {
				flags = 0
			}
			e.must(unix.Sendto(e.sender, noise(777), flags, nil))
		}
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		return all(e.receiver)
	})
}

func TestTruncatingReceive(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send("0123456789")
		e.arrive()
		n, _, err := unix.Recvfrom(e.receiver, make([]byte, 4), unix.MSG_TRUNC)
		return fmt.Sprint(n, errno(err))
	})
}

// Many random conversations, both directions at once.
func TestRandomConversations(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	count := 2000
	if testing.Short() {
		count = 100
	}
	for i := range count {
		fam := selftest.Families[i%3]
		script := r.Uint64()
		plain := converse(t, fam, "proxy", false, func(e *ends) string { return talk(e, script) })
		if got := converse(t, fam, "proxy", true, func(e *ends) string { return talk(e, script) }); got != plain {
			t.Fatalf("conversation %d, seed %d:\nredirected %s\nplain TCP  %s", i, seed, got, plain)
		}
	}
}

// talk plays one script of writes, reads and peeks in both directions, one after the other, then the ends.
func talk(e *ends, script uint64) string {
	r := rand.New(rand.NewPCG(script, 2))
	fds := [2]int{e.sender, e.receiver}
	var pending [2]int // unread bytes towards each
	var out strings.Builder
	for range 2 + r.IntN(30) {
		side := r.IntN(2)
		other := 1 - side
		switch r.IntN(4) {
		case 0, 1:
			n := 1 + r.IntN(1<<uint(1+r.IntN(14)))
			if pending[other]+n > 60_000 {
				continue
			}
			e.must(selftest.Write(fds[side], noise(n)))
			pending[other] += n
		case 2:
			if pending[side] == 0 {
				continue
			}
			n := 1 + r.IntN(pending[side])
			got, err := selftest.Read(fds[side], n)
			fmt.Fprintf(&out, "%d:%x:%s ", len(got), sum(got), errno(err))
			pending[side] -= len(got)
		case 3:
			b := make([]byte, 1)
			if pending[side] > 0 {
				e.must(selftest.Wait(fds[side], unix.POLLIN))
			}
			n, _, err := unix.Recvfrom(fds[side], b, unix.MSG_PEEK|unix.MSG_DONTWAIT)
			fmt.Fprintf(&out, "p%d:%x:%s ", n, b, errno(err))
		}
	}
	for side := range fds {
		e.must(unix.Shutdown(fds[side], unix.SHUT_WR))
	}
	return out.String() + all(fds[0]) + all(fds[1])
}
