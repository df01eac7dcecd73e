package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// snapshotUser and claimUser are the two consumers of a snapshot: the proxy, and the datapath.
type snapshotUser interface{ SetSnapshot(*mesh.Snapshot) }

type claimUser interface {
	SetClaims([]mesh.Claim)
	// Flush waits until what was set is in the kernel.
	Flush(context.Context) error
}

// Bounds of a removal: how long to wait for the kernel's maps, and how long a connection that was redirected just
// before may take to reach the proxy's accept queue.
const (
	flushTimeout = 2 * time.Second
	settle       = 50 * time.Millisecond
)

// publisher hands snapshots on in the order that never sends a connection to a proxy that doesn't know what to do
// with it: what is no longer claimed leaves the kernel first, then the proxy gets the new snapshot, then the kernel gets
// the new claims. Snapshots that come faster than that are skipped, the last one never.
type publisher struct {
	proxy    snapshotUser
	datapath claimUser
	internal []*mesh.Listener // added to every snapshot: the canary's
	log      *slog.Logger

	current atomic.Pointer[mesh.Snapshot] // in force, as configured
	first   chan struct{}                 // closed when the first one is in force

	mu   sync.Mutex
	next *mesh.Snapshot // guarded by mu
	wake chan struct{}

	claims []mesh.Claim // run's own: what the kernel has
}

func newPublisher(proxy snapshotUser, datapath claimUser, log *slog.Logger, internal ...*mesh.Listener) *publisher {
	return &publisher{
		proxy: proxy, datapath: datapath, internal: internal, log: log,
		first: make(chan struct{}), wake: make(chan struct{}, 1),
	}
}

// Publish leaves a snapshot to be handed on. It never blocks.
func (p *publisher) Publish(s *mesh.Snapshot) {
	p.mu.Lock()
	p.next = s
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run hands snapshots on until ctx ends.
func (p *publisher) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		p.mu.Lock()
		s := p.next
		p.next = nil
		p.mu.Unlock()
		if s != nil {
			p.apply(ctx, s)
		}
	}
}

func (p *publisher) apply(ctx context.Context, s *mesh.Snapshot) {
	full := p.withInternal(s)
	if staying := remaining(p.claims, full.Claims()); len(staying) < len(p.claims) {
		p.datapath.SetClaims(staying)
		p.flush(ctx)
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return
		}
	}
	p.proxy.SetSnapshot(full)
	p.claims = full.Claims()
	p.datapath.SetClaims(p.claims)
	old := p.current.Swap(s)
	p.log.Info("configuration in force", "generation", s.Generation, "listeners", len(s.Listeners), "clusters", len(s.Clusters), "claims", len(s.Claims()))
	if old == nil {
		p.flush(ctx)
		close(p.first)
	}
}

func (p *publisher) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	if err := p.datapath.Flush(ctx); err != nil && !errors.Is(err, datapath.ErrSuperseded) {
		p.log.Warn("the kernel's tables don't follow", "error", err)
	}
}

// withInternal adds the agent's own listeners. Pointers of all others stay, so that consumers see what changed.
func (p *publisher) withInternal(s *mesh.Snapshot) *mesh.Snapshot {
	listeners := make([]*mesh.Listener, 0, len(s.Listeners)+len(p.internal))
	listeners = append(append(listeners, s.Listeners...), p.internal...)
	return mesh.NewSnapshot(s.Generation, listeners, s.Clusters)
}

// remaining are the claims whose address is still claimed, as they are now: what changes about them changes once
// the proxy knows.
func remaining(now, next []mesh.Claim) []mesh.Claim {
	still := make(map[netip.AddrPort]bool, len(next))
	for i := range next {
		still[next[i].Addr] = true
	}
	out := make([]mesh.Claim, 0, len(now))
	for i := range now {
		if still[now[i].Addr] {
			out = append(out, now[i])
		}
	}
	return out
}
