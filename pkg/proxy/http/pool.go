package http

import (
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
)

// poolKey tells pools apart. The source is part of it, so that no pod ever gets a connection that was opened in
// another pod's network namespace, under another pod's policies.
type poolKey struct {
	source   uint64
	priority uint8
	host     *upstream.Host
}

// Pools are the connections of one loop to endpoints.
type Pools struct {
	srv    *Server
	byKey  map[poolKey]*pool
	byHost map[*upstream.Host]*pool // chained by pool.sibling
}

func newPools(srv *Server) *Pools {
	p := &Pools{srv: srv, byKey: map[poolKey]*pool{}, byHost: map[*upstream.Host]*pool{}}
	srv.deps.Upstreams.OnHostRemoved(p.hostRemoved)
	return p
}

// pool holds the connections of one source to one host. Waits are served first come first served; connections
// are taken last in first out, so that those which are not needed grow old and are closed.
type pool struct {
	pools   *Pools
	key     poolKey
	src     *stream.Source
	cluster *upstream.Cluster
	host    *upstream.Host
	sibling *pool

	idle       clientConn // list head, most recently used first
	nIdle      int
	conns      int // all that are not closed
	connecting int
	waits      stream.Wait // list head, oldest first
	waiting    int
	ended      bool // the pod or the host is gone
	removed    bool
}

// Get implements router.Pools.
func (ps *Pools) Get(src *stream.Source, c *upstream.Cluster, h *upstream.Host) stream.Connector {
	return ps.get(src, c, h, 0)
}

func (ps *Pools) get(src *stream.Source, c *upstream.Cluster, h *upstream.Host, priority uint8) *pool {
	k := poolKey{src.Key, priority, h}
	p := ps.byKey[k]
	if p == nil {
		p = &pool{pools: ps, key: k, src: src, cluster: c, host: h}
		p.idle.next, p.idle.prev = &p.idle, &p.idle
		p.waits.Next, p.waits.Prev = &p.waits, &p.waits
		ps.byKey[k] = p
		p.sibling, ps.byHost[h] = ps.byHost[h], p
	}
	return p
}

// Open implements stream.Connector.
func (p *pool) Open(w *stream.Wait) {
	if w.Priority != p.key.priority {
		p.pools.get(p.src, p.cluster, p.host, w.Priority).Open(w)
		return
	}
	if cc := p.idle.next; cc != &p.idle && !w.Fresh {
		if !p.cluster.Acquire(upstream.Requests, w.Priority) {
			w.Opener.OnOpenFailed(stream.Overflow, "")
			return
		}
		p.unlink(cc)
		cc.attach(w)
		return
	}
	if !p.cluster.Acquire(upstream.Pending, w.Priority) {
		w.Opener.OnOpenFailed(stream.Overflow, "")
		p.forgetIfEmpty()
		return
	}
	w.Canceller = p
	w.Prev, w.Next = p.waits.Prev, &p.waits
	w.Prev.Next, w.Next.Prev = w, w
	p.waiting++
	p.grow()
}

// grow dials if more streams are waited for than connections are on their way.
func (p *pool) grow() {
	if p.waiting <= p.connecting {
		return
	}
	if !p.cluster.Acquire(upstream.Connections, p.key.priority) {
		if p.conns > 0 {
			return // one of those will become free
		}
		// Nothing would ever serve the wait: one connection is always allowed, as in Envoy.
		p.cluster.AcquireAnyway(upstream.Connections, p.key.priority)
	}
	p.dial(p.key.priority)
}

// take removes a wait from the queue.
func (p *pool) take(w *stream.Wait) {
	w.Prev.Next, w.Next.Prev = w.Next, w.Prev
	w.Next, w.Prev, w.Canceller = nil, nil, nil
	p.waiting--
	p.cluster.Release(upstream.Pending, p.key.priority)
}

// CancelWait implements stream.Canceller.
func (p *pool) CancelWait(w *stream.Wait) {
	p.take(w)
	p.forgetIfEmpty()
}

// ready gives a connection that has nothing to do to who waits longest, else keeps it.
func (p *pool) ready(cc *clientConn) {
	for w := p.waits.Next; w != &p.waits; {
		next := w.Next
		if w.Fresh && cc.info.Requests > 0 {
			w = next
			continue
		}
		p.take(w)
		if p.cluster.Acquire(upstream.Requests, w.Priority) {
			cc.attach(w)
			return
		}
		w.Opener.OnOpenFailed(stream.Overflow, "")
		w = p.waits.Next // the queue may be another one now
	}
	p.keep(cc)
}

// keep puts a connection into the list of those that have nothing to do.
func (p *pool) keep(cc *clientConn) {
	if cc.worn() {
		cc.state = gone
		cc.c.Close()
		return
	}
	cc.prev, cc.next = &p.idle, p.idle.next
	cc.prev.next, cc.next.prev = cc, cc
	p.nIdle++
	l := p.pools.srv.loop
	cc.since = l.Now()
	if d := p.cluster.Config().IdleTimeout; d > 0 && !cc.armed {
		cc.armed = true
		l.StartTimer(&cc.timer, time.Duration(d))
	}
}

func (p *pool) unlink(cc *clientConn) {
	if cc.next != nil {
		cc.prev.next, cc.next.prev = cc.next, cc.prev
		cc.next, cc.prev = nil, nil
		p.nIdle--
	}
}

// drop closes a connection that has nothing to do.
func (p *pool) drop(cc *clientConn) {
	p.unlink(cc)
	cc.state = gone
	cc.c.Close()
}

// failAll tells everybody who waits that there will be no connection. All, because an endpoint that does not
// take one connection would let the others wait for nothing.
func (p *pool) failAll(reason stream.Reason, detail string) {
	for n := p.waiting; n > 0 && p.waits.Next != &p.waits; n-- {
		w := p.waits.Next
		p.take(w)
		w.Opener.OnOpenFailed(reason, detail)
	}
}

// closed is a connection's last word.
func (p *pool) closed(cc *clientConn) {
	p.conns--
	p.host.ActiveConns--
	p.cluster.Release(upstream.Connections, p.key.priority)
	p.pools.srv.deps.Shard.Stats.UpstreamClosed++
	if p.waiting > 0 {
		p.grow()
	}
	p.forgetIfEmpty()
}

// closing says that connections are not to be kept.
func (p *pool) closing() bool { return p.ended || p.host.Gone() }

// end closes what has nothing to do; the rest closes when it is done.
func (p *pool) end() {
	p.ended = true
	for cc := p.idle.next; cc != &p.idle; cc = p.idle.next {
		p.drop(cc)
	}
	p.forgetIfEmpty()
}

// forgetIfEmpty removes a pool that nothing is left of.
func (p *pool) forgetIfEmpty() {
	if p.removed || p.conns > 0 || p.waiting > 0 {
		return
	}
	p.removed = true
	ps := p.pools
	delete(ps.byKey, p.key)
	if first := ps.byHost[p.host]; first == p {
		if p.sibling == nil {
			delete(ps.byHost, p.host)
		} else {
			ps.byHost[p.host] = p.sibling
		}
	} else {
		for q := first; q != nil; q = q.sibling {
			if q.sibling == p {
				q.sibling = p.sibling
				break
			}
		}
	}
}

// hostRemoved: no new work for the host.
func (ps *Pools) hostRemoved(h *upstream.Host) {
	for p := ps.byHost[h]; p != nil; {
		next := p.sibling
		p.end()
		p = next
	}
}

// removeSource: the pod is gone, and its network namespace with it.
func (ps *Pools) removeSource(key uint64) {
	for k, p := range ps.byKey {
		if k.source == key {
			p.end()
		}
	}
}

// stats counts connections and waits.
func (ps *Pools) stats() (st Stats) {
	for _, p := range ps.byKey {
		st.Pools++
		st.UpstreamConnections += p.conns
		st.PoolIdle += p.nIdle
		st.PoolConnecting += p.connecting
		st.PoolWaiting += p.waiting
	}
	return st
}

var _ loop.Handler = (*clientConn)(nil)
var _ stream.ServerStream = (*session)(nil)
