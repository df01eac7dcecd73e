package loop

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Callers are served first, everybody else is served too, and no byte changes its place for it.

// local is a connection inside the machine whose bytes are in the loop's socket as soon as they are written.
func local(t *testing.T) (fd int, peer *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	peer = os.NewFile(uintptr(fds[1]), "peer")
	t.Cleanup(func() { peer.Close() })
	return fds[0], peer
}

// Everybody has bytes that wait when one is called: it is served to the end before more than one of the others is.
func TestWhoIsCalledIsServedFirst(t *testing.T) {
	l := startLoop(t)
	const many, size = 40, 180_000
	desk := Desk{new(atomic.Uint32), new(atomic.Uint32)}
	var order []int // who was offered data; on the loop
	var got [many]int
	done := make(chan struct{})
	left := many
	var peers []*os.File
	held, release := make(chan struct{}), make(chan struct{})
	var fds []int
	for range many {
		fd, peer := local(t)
		fds, peers = append(fds, fd), append(peers, peer)
	}
	do(t, l, func() {
		for i := range many {
			c := l.Adopt(fds[i], netip.AddrPort{}, &hooks{data: func(_ *Conn, b []byte) int {
				order = append(order, i)
				if got[i] += len(b); got[i] == size {
					if left--; left == 0 {
						close(done)
					}
				}
				return len(b)
			}}, Options{})
			c.AnswerCalls(desk, uint32(i)+1)
		}
	})
	// Once the loop waits for all of them it is held up, so that everything is there when it goes on.
	l.Post(func() { close(held); <-release })
	<-held
	for _, p := range peers {
		if n, err := p.Write(make([]byte, size)); n != size {
			t.Fatal(err)
		}
	}
	const called = 17
	desk.Call.Store(called + 1)
	close(release)
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the loop hangs")
	}
	do(t, l, func() {
		others := 0
		for sum, i := 0, 0; sum < (size+scratchSize-1)/scratchSize; i++ {
			if order[i] == called {
				sum++
			} else {
				others++
			}
		}
		if others > readsPerEvent { // one other's turn
			t.Errorf("%d pieces of others were served before the one that was called had all of its own: %v", others, order)
		}
	})
	if desk.Call.Load() != 0 {
		t.Error("the call still stands at the desk")
	}
}

// Two that never stop sending are called without end; the others get their answers.
func TestNobodyStarvesHoweverManyCall(t *testing.T) {
	l := startLoop(t)
	desk := Desk{new(atomic.Uint32), new(atomic.Uint32)}
	stop := make(chan struct{})
	var all sync.WaitGroup
	defer all.Wait()
	var taken atomic.Uint64
	for i := range 2 {
		fd, peer := local(t)
		do(t, l, func() {
			c := l.Adopt(fd, netip.AddrPort{}, &hooks{data: func(_ *Conn, b []byte) int {
				taken.Add(uint64(len(b)))
				return len(b)
			}}, Options{})
			c.AnswerCalls(desk, uint32(i)+1)
		})
		all.Go(func() {
			b := make([]byte, 128<<10)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := peer.Write(b); err != nil {
					return
				}
			}
		})
	}
	all.Go(func() {
		for n := uint32(0); ; n++ {
			select {
			case <-stop:
				return
			default:
				desk.Call.CompareAndSwap(0, n%2+1)
			}
		}
	})
	defer close(stop)
	addr := serve(t, l, Options{}, func() Handler {
		return &hooks{data: func(c *Conn, b []byte) int { c.Write(b); return len(b) }}
	})
	c := dial(t, addr)
	msg := make([]byte, 100)
	for range 200 {
		if _, err := c.Write(msg); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, msg); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the callers are served", func() bool { return taken.Load() > 4*callsPerWakeup })
	do(t, l, func() { l.publish() })
	if l.Stats().Calls == 0 {
		t.Error("no call was answered")
	}
}

// One that sends faster than it is read gets so much of a wake-up; then its call stands, and shows that the loop is at work.
func TestACallerGetsSoMuchAndWaitsThen(t *testing.T) {
	l := startLoop(t)
	desk := Desk{new(atomic.Uint32), new(atomic.Uint32)}
	fd, peer := local(t)
	piece := make([]byte, 64<<10)
	do(t, l, func() {
		taken := 0
		c := l.Adopt(fd, netip.AddrPort{}, &hooks{data: func(_ *Conn, b []byte) int {
			taken += len(b)
			for more := len(b); more > 0; {
				n, err := peer.Write(piece[:more])
				if err != nil {
					t.Error(err)
					return len(b)
				}
				more -= n
			}
			return len(b)
		}}, Options{})
		c.AnswerCalls(desk, 9)
		if _, err := peer.Write(piece); err != nil {
			t.Error(err)
		}
		for beats := range uint32(3) {
			desk.Call.Store(9)
			l.hear()
			if taken != callsPerWakeup || desk.Beat.Load() != beats || (desk.Call.Load() == 9) != (beats > 0) {
				t.Errorf("at look %d: %d bytes taken, beat %d, call %d", beats, taken, desk.Beat.Load(), desk.Call.Load())
			}
		}
		c.Abort()
	})
}

// Streams and messages of all sizes go through the loop while everybody is called at random: every byte comes out in its place.
func TestCallsChangeNothingButTheOrderOfWork(t *testing.T) {
	l := startLoop(t)
	desk := Desk{new(atomic.Uint32), new(atomic.Uint32)}
	const many, total = 24, 3 << 20
	next := uint32(0)
	addr := serve(t, l, Options{}, func() Handler {
		next++
		number := next
		return &hooks{
			data: func(c *Conn, b []byte) int {
				if c.number == 0 {
					c.AnswerCalls(desk, number)
				}
				c.Write(b)
				if c.AboveHigh() {
					c.PauseRead()
				}
				return len(b)
			},
			drained: func(c *Conn) { c.ResumeRead() },
		}
	})
	stop := make(chan struct{})
	var caller, all sync.WaitGroup
	caller.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				desk.Call.Store(rand.Uint32N(many + 2)) // nobody and strangers, too
			}
		}
	})
	for i := range many {
		c := dial(t, addr)
		all.Go(func() { count(c, total, 1<<(4+i%14)) })
		all.Go(func() {
			if err := check(c, total); err != nil {
				t.Errorf("connection %d, in pieces of up to %d bytes: %v", i, 1<<(4+i%14), err)
			}
		})
	}
	all.Wait()
	close(stop)
	caller.Wait()
	do(t, l, func() { l.publish() })
	if l.Stats().Calls == 0 {
		t.Error("no call was answered")
	}
}

// count writes 0, 1, 2, … in words of eight bytes, in pieces of random size; check reads them.
func count(c net.Conn, total, most int) {
	all := make([]byte, total)
	for i := 0; i < total; i += 8 {
		binary.LittleEndian.PutUint64(all[i:], uint64(i/8))
	}
	small := 0
	for len(all) > 0 {
		n := min(1+rand.IntN(most), len(all))
		if most < 4096 && small > 2000 { // small ones for a while, then the rest at once
			n = len(all)
		}
		small++
		if _, err := c.Write(all[:n]); err != nil {
			return // check tells
		}
		all = all[n:]
	}
}

func check(c net.Conn, total int) error {
	all := make([]byte, total)
	if n, err := io.ReadFull(c, all); err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", n, total, err)
	}
	for i := 0; i < total; i += 8 {
		if got := binary.LittleEndian.Uint64(all[i:]); got != uint64(i/8) {
			return fmt.Errorf("at byte %d stands what belongs to byte %d", i, got*8)
		}
	}
	return nil
}
