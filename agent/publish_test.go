package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

var quiet = slog.New(slog.DiscardHandler)

// journal records in which order proxy and kernel were told, as "proxy a b" and "kernel a b" by listener.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) note(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) take() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := j.lines
	j.lines = nil
	return out
}

func (j *journal) SetSnapshot(s *mesh.Snapshot) {
	var names []string
	for _, l := range s.Listeners {
		names = append(names, l.Name)
	}
	j.note("proxy %s", strings.Join(names, " "))
}

func (j *journal) SetClaims(claims []mesh.Claim) {
	var names []string
	for _, c := range claims {
		names = append(names, c.Listener)
	}
	j.note("kernel %s", strings.Join(names, " "))
}

func (j *journal) Flush(context.Context) error { j.note("flush"); return nil }

// snapshot has a listener of each name; its address is made from the name's first letter, so that "b1" and "b2" are
// two listeners of one address.
func snapshot(t *testing.T, generation uint64, names ...string) *mesh.Snapshot {
	t.Helper()
	var listeners []*mesh.Listener
	for _, n := range names {
		l := &mesh.Listener{Name: n, OffloadReason: "test", Addresses: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, n[0]}), 80)}}
		if err := l.Init(); err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
	}
	return mesh.NewSnapshot(generation, listeners, map[string]*mesh.Cluster{})
}

func TestWhatIsAddedIsKnownToTheProxyFirst(t *testing.T) {
	j := &journal{}
	p := newPublisher(j, j, quiet)
	p.apply(t.Context(), snapshot(t, 1, "a"))
	if got := j.take(); !slices.Equal(got, []string{"proxy a", "kernel a", "flush"}) {
		t.Errorf("first: %q", got)
	}
	p.apply(t.Context(), snapshot(t, 2, "a", "b"))
	if got := j.take(); !slices.Equal(got, []string{"proxy a b", "kernel a b"}) {
		t.Errorf("added: %q", got)
	}
}

func TestWhatIsRemovedLeavesTheKernelFirst(t *testing.T) {
	j := &journal{}
	p := newPublisher(j, j, quiet)
	p.apply(t.Context(), snapshot(t, 1, "a", "b1"))
	j.take()
	p.apply(t.Context(), snapshot(t, 2, "b2", "c"))
	// "b" stays claimed by its old listener while "a" goes; "c" comes after the proxy knows it.
	if got := j.take(); !slices.Equal(got, []string{"kernel b1", "flush", "proxy b2 c", "kernel b2 c"}) {
		t.Errorf("%q", got)
	}
}

func TestInternalListenersAreInEverySnapshotButNotShown(t *testing.T) {
	j := &journal{}
	p := newPublisher(j, j, quiet, snapshot(t, 0, "z").Listeners...)
	p.apply(t.Context(), snapshot(t, 1, "a"))
	if got := j.take(); got[0] != "proxy a z" || got[1] != "kernel a z" {
		t.Errorf("%q", got)
	}
	if n := len(p.current.Load().Listeners); n != 1 {
		t.Errorf("%d listeners are shown, expected the configured one", n)
	}
}

func TestTheLastOfManySnapshotsIsInForce(t *testing.T) {
	j := &journal{}
	p := newPublisher(j, j, quiet)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { p.run(ctx) })
	for i := range 200 {
		p.Publish(snapshot(t, uint64(i+1), "a"))
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if s := p.current.Load(); s != nil && s.Generation == 200 {
			break
		}
	}
	stop()
	wg.Wait()
	if s := p.current.Load(); s == nil || s.Generation != 200 {
		t.Errorf("in force: %+v", s)
	}
	select {
	case <-p.first:
	default:
		t.Error("nobody was told of the first snapshot")
	}
}
