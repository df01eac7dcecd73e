package loop

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func echo() Handler {
	h := &hooks{}
	h.data = func(c *Conn, b []byte) int {
		c.Write(b)
		if c.AboveHigh() {
			c.PauseRead()
		}
		return len(b)
	}
	h.drained = func(c *Conn) { c.ResumeRead() }
	h.eof = func(c *Conn) { c.CloseWrite(); c.Close() }
	return h
}

func TestEchoReturnsEveryByteOfManyConversations(t *testing.T) {
	l := startLoop(t)
	addr := serve(t, l, Options{BufferLimit: 64 << 10}, echo)
	var wg sync.WaitGroup
	for seed := range uint64(20) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(seed, 1))
			c, err := net.Dial("tcp", addr.String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			sent := make([]byte, rng.IntN(3<<20))
			for i := range sent {
				sent[i] = byte(rng.Uint32())
			}
			go func() {
				for rest := sent; len(rest) > 0; {
					n := min(len(rest), 1+rng.IntN(1<<uint(rng.IntN(19))))
					if _, err := c.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
				c.(*net.TCPConn).CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("seed %d: sent %d bytes, got %d back, error %v", seed, len(sent), len(got), err)
			}
		}()
	}
	wg.Wait()
}

func TestUnconsumedBytesAreOfferedAgainInFrontOfNewOnes(t *testing.T) {
	l := startLoop(t)
	offered := make(chan string, 100)
	addr := serve(t, l, Options{}, func() Handler {
		return &hooks{data: func(c *Conn, b []byte) int { // whole lines only
			offered <- string(b)
			return bytes.LastIndexByte(b, '\n') + 1
		}}
	})
	c := dial(t, addr)
	for _, step := range []struct{ send, offer string }{
		{"a", "a"}, {"b", "ab"}, {"c\nd", "abc\nd"}, {"\n", "d\n"}, {"e\n", "e\n"},
	} {
		_, _ = c.Write([]byte(step.send))
		if got := <-offered; got != step.offer {
			t.Fatalf("sent %q: offered %q, want %q", step.send, got, step.offer)
		}
	}
	eventually(t, "an idle connection holds no buffer", func() bool {
		var lent int
		do(t, l, func() { lent = l.pool.lent })
		return lent == 0
	})
}

func TestUnconsumedInputIsBounded(t *testing.T) {
	l := startLoop(t)
	var most atomic.Int64
	conns := make(chan *Conn, 1)
	addr := serve(t, l, Options{ReadLimit: 16 << 10}, func() Handler {
		return &hooks{data: func(c *Conn, b []byte) int {
			select {
			case conns <- c:
			default:
			}
			most.Store(max(most.Load(), int64(len(b))))
			return 0
		}}
	})
	c := dial(t, addr)
	_ = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	for err := error(nil); err == nil; {
		_, err = c.Write(make([]byte, 64<<10))
	}
	<-conns
	if got := most.Load(); got > scratchSize+16<<10 {
		t.Fatalf("kept %d bytes with a limit of 16384", got)
	}
	eventually(t, "the loop sleeps although bytes wait", func() bool {
		before := l.Stats().Wakeups
		time.Sleep(50 * time.Millisecond)
		return l.Stats().Wakeups-before < 10
	})
}

func TestPausedReadingStopsDataAndEndUntilResumed(t *testing.T) {
	l := startLoop(t)
	var got, ended atomic.Int64
	conns := make(chan *Conn, 1)
	addr := serve(t, l, Options{Paused: true}, func() Handler {
		h := &hooks{}
		h.data = func(c *Conn, b []byte) int { got.Add(int64(len(b))); return len(b) }
		h.eof = func(c *Conn) { ended.Add(1); c.Close() }
		return h
	})
	do(t, l, func() {
		for i := range l.entries {
			if ln := l.entries[i].ln; ln != nil {
				inner := ln.accept
				ln.accept = func(fd int, peer netip.AddrPort) {
					inner(fd, peer)
					conns <- l.entries[len(l.entries)-1].conn
				}
			}
		}
	})
	c := dial(t, addr)
	_, _ = c.Write([]byte("hello"))
	_ = c.CloseWrite()
	conn := <-conns
	time.Sleep(50 * time.Millisecond)
	if got.Load() != 0 || ended.Load() != 0 {
		t.Fatal("heard something while paused")
	}
	do(t, l, conn.ResumeRead)
	eventually(t, "data and end", func() bool { return got.Load() == 5 && ended.Load() == 1 })
}

func TestAWriterOfManySmallPiecesMakesFewSystemCalls(t *testing.T) {
	l := startLoop(t)
	addr := serve(t, l, Options{}, func() Handler {
		return &hooks{data: func(c *Conn, b []byte) int {
			for range 1000 {
				c.Write([]byte("0123456789"))
			}
			c.Close()
			return len(b)
		}}
	})
	c := dial(t, addr)
	before := l.Stats().Syscalls
	_, _ = c.Write([]byte("go"))
	if got, err := io.ReadAll(c); err != nil || len(got) != 10_000 {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	eventually(t, "closed", func() bool { return l.Stats().Conns == 0 })
	if n := l.Stats().Syscalls - before; n > 20 {
		t.Errorf("%d system calls", n)
	}
}

func TestClosingDeliversWhatWasWrittenToASlowReader(t *testing.T) {
	l := startLoop(t)
	const size = 20 << 20
	addr := serve(t, l, Options{}, func() Handler {
		return &hooks{data: func(c *Conn, b []byte) int {
			c.Write(make([]byte, size))
			c.Close()
			c.Write([]byte("too late"))
			return len(b)
		}}
	})
	c := dial(t, addr)
	_, _ = c.Write([]byte("go"))
	time.Sleep(100 * time.Millisecond)
	if n, err := io.Copy(io.Discard, c); n != size || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
}

func TestADelayedCloseLetsTheLastWordArriveWhileThePeerStillSends(t *testing.T) {
	l := startLoop(t)
	addr := serve(t, l, Options{}, func() Handler {
		return &hooks{data: func(c *Conn, b []byte) int {
			c.Write([]byte("no more"))
			c.CloseDelayed(patience)
			return 0
		}}
	})
	for range 20 {
		c := dial(t, addr)
		go func() {
			for err := error(nil); err == nil; {
				_, err = c.Write(make([]byte, 100_000))
			}
		}()
		b := make([]byte, 100)
		if n, err := io.ReadAtLeast(c, b, 7); err != nil || string(b[:n]) != "no more" {
			t.Fatalf("%q, %v", b[:n], err)
		}
		c.Close()
	}
	eventually(t, "all closed", func() bool { return l.Stats().Conns == 0 })
}

func TestAbortResets(t *testing.T) {
	l := startLoop(t)
	addr := serve(t, l, Options{}, func() Handler {
		return &hooks{data: func(c *Conn, b []byte) int { c.Abort(); return 0 }}
	})
	c := dial(t, addr)
	_, _ = c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("got %v", err)
	}
}

// reset closes so that the peer gets RST.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

func TestAResetIsToldOnce(t *testing.T) {
	l := startLoop(t)
	for _, paused := range []bool{false, true} {
		errs := make(chan error, 2)
		addr := serve(t, l, Options{Paused: paused}, func() Handler {
			return &hooks{close: func(_ *Conn, err error) { errs <- err }}
		})
		c := dial(t, addr)
		_, _ = c.Write([]byte("data"))
		time.Sleep(20 * time.Millisecond)
		reset(c)
		select {
		case err := <-errs:
			if !errors.Is(err, unix.ECONNRESET) {
				t.Fatalf("paused %v: got %v", paused, err)
			}
		case <-time.After(patience):
			t.Fatalf("paused %v: never told", paused)
		}
	}
}

func TestUnreadBytesSurviveAResetWhereAskedFor(t *testing.T) {
	l := startLoop(t)
	type end struct {
		got string
		err error
	}
	ends := make(chan end, 1)
	addr := serve(t, l, Options{Paused: true, KeepUnread: true}, func() Handler {
		var got []byte
		return &hooks{
			data:  func(_ *Conn, b []byte) int { got = append(got, b...); return len(b) },
			eof:   func(*Conn) { t.Error("a reset looked like an end") },
			close: func(_ *Conn, err error) { ends <- end{string(got), err} },
		}
	})
	c := dial(t, addr)
	_, _ = c.Write([]byte("last words"))
	time.Sleep(20 * time.Millisecond)
	reset(c)
	time.Sleep(50 * time.Millisecond)
	do(t, l, func() {
		for _, e := range l.entries {
			if e.conn != nil {
				e.conn.ResumeRead()
			}
		}
	})
	if e := <-ends; e.got != "last words" || !errors.Is(e.err, unix.ECONNRESET) {
		t.Fatalf("got %q, %v", e.got, e.err)
	}
}

func TestAnAnswerSentBeforeTheResetIsReadAlthoughWritingFails(t *testing.T) {
	l := startLoop(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted := make(chan *net.TCPConn, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			accepted <- c.(*net.TCPConn)
		}
	}()
	got := make(chan string, 1)
	var all []byte
	h := &hooks{
		data:  func(_ *Conn, b []byte) int { all = append(all, b...); return len(b) },
		eof:   func(*Conn) { t.Error("a reset looked like an end") },
		close: func(_ *Conn, err error) { got <- string(all) },
	}
	var c *Conn
	do(t, l, func() {
		c = l.Dial(nil, ln.Addr().(*net.TCPAddr).AddrPort(), h, nil)
		c.Write([]byte("request"))
	})
	s := <-accepted
	_, _ = s.Write([]byte("413")) // the request is never read: closing resets
	time.Sleep(20 * time.Millisecond)
	do(t, l, func() {
		s.Close()
		time.Sleep(20 * time.Millisecond) // the reset is there, the loop hasn't seen it
		for range 3 {
			c.Write(make([]byte, 100_000))
		}
	})
	if g := <-got; g != "413" {
		t.Fatalf("got %q", g)
	}
}

func TestDialOutcomes(t *testing.T) {
	l := startLoop(t)
	try := func(addr string, o *DialOptions) (err error) {
		done := make(chan struct{})
		do(t, l, func() {
			returned := false
			h := &hooks{connect: func(_ *Conn, e error) {
				if !returned {
					t.Error("called back before Dial returned")
				}
				err = e
			}}
			h.close = func(*Conn, error) { close(done) }
			c := l.Dial(nil, netip.MustParseAddrPort(addr), h, o)
			returned = true
			_ = c
		})
		select {
		case <-done:
		case <-time.After(patience):
			t.Fatalf("%s: no outcome", addr)
		}
		return err
	}
	if err := try("127.0.0.1:1", nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("refused: %v", err)
	}
	if err := try("[::1]:1", nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("refused v6: %v", err)
	}
	if err := try("255.255.255.255:80", nil); err == nil {
		t.Error("broadcast address connected")
	}
	// A full backlog drops SYNs: a connect that nobody answers, without leaving the machine.
	fd, _ := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	defer unix.Close(fd)
	_ = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	_ = unix.Listen(fd, 0)
	addr := sysName(int32(fd), false).String()
	for range 4 {
		if c, err := net.DialTimeout("tcp", addr, 200*time.Millisecond); err == nil {
			defer c.Close()
		}
	}
	if err := try(addr, &DialOptions{Timeout: 50 * time.Millisecond}); !errors.Is(err, ErrConnectTimeout) {
		t.Errorf("time-out: %v", err)
	}
}

func TestAcceptSurvivesRunningOutOfDescriptors(t *testing.T) {
	l := startLoop(t)
	addr := serve(t, l, Options{}, echo)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	c := dial(t, addr)
	early := dial(t, addr)
	_, _ = early.Write([]byte("x"))
	_, _ = io.ReadFull(early, make([]byte, 1))
	late, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(late)
	low := was
	low.Cur = uint64(late + 1)
	for fd := 3; fd < late; fd++ { // leave no gap below the limit
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			n, err := unix.FcntlInt(uintptr(late), unix.F_DUPFD_CLOEXEC, fd)
			if err == nil {
				defer unix.Close(n)
			}
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(late, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
		t.Error(err)
	}
	eventually(t, "accept failed", func() bool { return l.Stats().AcceptErrors > 0 })
	// Open connections go on meanwhile.
	_, _ = c.Write([]byte("y"))
	_, rerr := io.ReadFull(c, make([]byte, 1))
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if rerr != nil {
		t.Error(rerr)
	}
	// And the one that waited is served once there are descriptors again.
	_, _ = unix.Write(late, []byte("z"))
	b := make([]byte, 1)
	if n, err := unix.Read(late, b); n != 1 || err != nil || b[0] != 'z' {
		t.Errorf("read %d %q, %v", n, b, err)
	}
}

func TestPostAfterStopIsRefused(t *testing.T) {
	l, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	go l.Run()
	l.Stop()
	l.Wait()
	if l.Post(func() { t.Error("ran") }) {
		t.Fatal("accepted")
	}
}

func TestSteadyStateAllocatesNothing(t *testing.T) {
	l := startLoop(t)
	addr := serve(t, l, Options{}, echo)
	c := dial(t, addr)
	b := make([]byte, 100)
	turn := func() {
		_, _ = c.Write(b)
		_, _ = io.ReadFull(c, b)
	}
	for range 100 {
		turn()
	}
	if n := testing.AllocsPerRun(1000, turn); n != 0 {
		t.Errorf("%v allocations per round trip", n)
	}
}

func BenchmarkEcho(b *testing.B) {
	l := startLoop(b)
	addr := serve(b, l, Options{}, echo)
	c := dial(b, addr)
	_ = c.SetDeadline(time.Time{})
	buf := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		_, _ = c.Write(buf)
		_, _ = io.ReadFull(c, buf)
	}
}
