package proxy

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
)

// One-way streams whose sender never pauses: it has to wait for the proxy to be handed over (bpf/patience.h), and must not wait in
// vain for long.

// While the proxy's loop stands still, with bytes that it has not forwarded, a sender that waits for it is let go: its writes
// return, and all of them come through the proxy in the end.
func TestASenderIsNotHeldUpByALoopThatStandsStill(t *testing.T) {
	var h *hooked
	asked, release := make(chan struct{}), make(chan struct{})
	h = newStepping(t, 1, func(s *setup) {
		s.engine.Concurrency = 1
		s.engine.StepAside = func(down, up int, toServer, toClient uint64) (aside.Handle, error) {
			a, err := h.stepAside(down, up, toServer, toClient)
			close(asked)
			<-release
			return a, err
		}
	})
	c, s := h.pair(t, "10.98.0.2:8080")
	piece := noise(16 << 10)
	const pieces = 200
	var want []byte
	for i := range pieces {
		what := piece
		if i == 0 {
			what = piece[:100] // corked for a moment, in which the direction waits for its turn
		}
		if n, err := c.Write(what); err != nil {
			t.Fatalf("after %d bytes of piece %d: %v", n, i, err)
		}
		want = append(want, what...)
		if i == 0 {
			<-asked
		}
	}
	if n := h.counters(t).AsideBytes; n != 0 {
		t.Errorf("%d bytes skipped a proxy that had not forwarded what was in front of them", n)
	}
	close(release)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("after %d of %d bytes: %v", n, len(want), err)
	}
}

// Senders that never pause, in writes of 1 MiB: what they have sent before the proxy could ask for it comes through it, and
// nearly all that follows skips it, if the machine has a processor for the proxy at the right moment. On a busy one it may
// not, so there are some rounds; each of them would show it if senders had to wait for the queues of all others.
func TestBulkSkipsTheProxy(t *testing.T) {
	h := newStepping(t, 3)
	for _, many := range []int{1, 64} {
		t.Run(fmt.Sprint(many), func(t *testing.T) {
			var share int64
			for round := 0; round < 5 && share < 50; round++ {
				before := h.counters(t)
				bytes := h.bulk(t, many, 2048/many)
				after := h.counters(t)
				share = 100 * int64(after.AsideBytes-before.AsideBytes) / bytes
				t.Logf("%d%% of %d MiB skipped the proxy; %d directions, %d came back", share, bytes>>20,
					after.AsideDirections-before.AsideDirections, after.AsideReturned-before.AsideReturned)
			}
			if share < 50 {
				t.Error("most bytes came through the proxy, every time")
			}
		})
	}
}

// bulk has so many clients send so many MiB each, one way, and returns how many bytes arrived.
func (h *hooked) bulk(t *testing.T, many, each int) int64 {
	var all sync.WaitGroup
	var read atomic.Int64
	ln := listenIn(t, h.server, "10.98.0.2:8080")
	defer ln.Close()
	all.Go(func() {
		for range many {
			s, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			all.Go(func() {
				defer s.Close()
				_ = s.SetDeadline(time.Now().Add(patience))
				n, err := io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{s})
				if read.Add(n); err != nil {
					t.Error(err)
				}
			})
		}
	})
	piece := make([]byte, 1<<20)
	for range many {
		c := mustDialIn(t, h.pod, "10.98.0.2:8080")
		_ = c.SetDeadline(time.Now().Add(patience))
		all.Go(func() {
			defer c.Close()
			for range each {
				if _, err := c.Write(piece); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	if want := int64(many*each) << 20; read.Load() != want {
		t.Fatalf("%d of %d bytes arrived", read.Load(), want)
	}
	return read.Load()
}
