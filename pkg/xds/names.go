package xds

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Resolver looks names up; net.DefaultResolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// lookupTimeout bounds one look-up, and with it how long a cluster warms on a dead name server.
const lookupTimeout = 10 * time.Second

// nameWatcher keeps the names of DNS clusters resolved. Each name has one goroutine that looks it up, waits for
// the refresh time and starts over. An answer that failed keeps the last good one; only "no such name" is an
// answer like any other and empties it.
type nameWatcher struct {
	resolver Resolver
	report   func(mesh.DNSKey, []netip.Addr)
	ctx      context.Context
	group    sync.WaitGroup

	mu       sync.Mutex
	watching map[mesh.DNSKey]*nameWatch
}

type nameWatch struct {
	dns    *mesh.DNS
	cancel context.CancelFunc
}

func newNameWatcher(ctx context.Context, resolver Resolver, report func(mesh.DNSKey, []netip.Addr)) *nameWatcher {
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	return &nameWatcher{resolver: resolver, report: report, ctx: ctx, watching: map[mesh.DNSKey]*nameWatch{}}
}

// set starts and stops look-ups so that exactly these names are watched.
func (w *nameWatcher) set(names map[mesh.DNSKey]*mesh.DNS) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, watch := range w.watching {
		if dns := names[key]; dns == nil || dns.Refresh != watch.dns.Refresh || dns.FailureRefresh != watch.dns.FailureRefresh {
			watch.cancel()
			delete(w.watching, key)
		}
	}
	for key, dns := range names {
		if w.watching[key] != nil {
			continue
		}
		ctx, cancel := context.WithCancel(w.ctx)
		w.watching[key] = &nameWatch{dns, cancel}
		w.group.Go(func() { w.watch(ctx, key, dns) })
	}
}

func (w *nameWatcher) watch(ctx context.Context, key mesh.DNSKey, dns *mesh.DNS) {
	answered := false
	for {
		addrs, err := w.lookup(ctx, key)
		if ctx.Err() != nil {
			return
		}
		pause := dns.Refresh
		if err != nil {
			pause = dns.FailureRefresh
		}
		if err == nil || !answered {
			w.report(key, addrs)
			answered = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// lookup resolves one name in the order that the family asks for. The answer is sorted, so that a name server
// that rotates its answers does not look like a change.
func (w *nameWatcher) lookup(ctx context.Context, key mesh.DNSKey) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	networks := map[mesh.DNSFamily][]string{
		mesh.DNSAuto: {"ip6", "ip4"}, mesh.DNSV4Only: {"ip4"}, mesh.DNSV6Only: {"ip6"},
		mesh.DNSV4Preferred: {"ip4", "ip6"}, mesh.DNSAll: {"ip"},
	}[key.Family]
	var failure error
	for _, network := range networks {
		addrs, err := w.resolver.LookupNetIP(ctx, network, key.Host)
		var dnsError *net.DNSError
		if err != nil && !(errors.As(err, &dnsError) && dnsError.IsNotFound) {
			failure = err
			continue
		}
		for i := range addrs {
			addrs[i] = addrs[i].Unmap()
		}
		slices.SortFunc(addrs, netip.Addr.Compare)
		if addrs = slices.Compact(addrs); len(addrs) > 0 {
			return addrs, nil
		}
	}
	return nil, failure
}

func (w *nameWatcher) close() { w.group.Wait() }

func (c *Client) onAddresses(key mesh.DNSKey, addrs []netip.Addr) {
	c.mu.Lock()
	c.builder.SetAddresses(key, addrs)
	c.mu.Unlock()
	c.changed()
}
