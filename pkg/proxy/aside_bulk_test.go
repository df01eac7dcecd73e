package proxy

import (
	"bytes"
	"io"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
)

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
