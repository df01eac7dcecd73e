package proxy

import (
	"log/slog"
	"net/netip"
	"sync/atomic"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/tcp"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Worker is one loop and everything that lives on it. Its fields are used only on that loop, except load and pulse.
type Worker struct {
	e         *Engine
	loop      *loop.Loop
	log       *slog.Logger
	snap      *mesh.Snapshot // what this loop works with; nil before the first
	upstreams *upstream.Manager
	tcp       *tcp.Server
	http      HTTPServer
	shard     *telemetry.Shard

	pods  map[uint64]*podState
	input mesh.ChainInput // of the connection that is being classified
	conns downstream      // list head: accepted connections
	load  atomic.Int64    // accepted connections assigned to this loop
	pulse pulse
}

// downstream is an accepted connection, whoever handles it.
type downstream struct {
	w          *Worker
	pod        *podState // nil: the node's own
	conn       *loop.Conn
	info       stream.ConnInfo
	next, prev *downstream
}

func newWorker(e *Engine, index int) (*Worker, error) {
	l, err := loop.New(loop.Config{Index: index, IO: e.cfg.IO, Logger: e.log})
	if err != nil {
		return nil, err
	}
	w := &Worker{e: e, loop: l, log: e.log.With("loop", index), pods: map[uint64]*podState{}}
	w.conns.next, w.conns.prev = &w.conns, &w.conns
	w.upstreams = upstream.NewManager(l, upstream.Config{Shared: e.shared, Snapshot: w.Snapshot, Logger: w.log})
	w.shard = e.cfg.Metrics.NewShard(func(fn func()) {
		if !l.Post(fn) { // nobody else touches the shard once the loop has ended
			l.Wait()
			fn()
		}
	})
	w.tcp = tcp.NewServer(tcp.Deps{
		Loop: l, Upstreams: w.upstreams, Snapshot: w.Snapshot, Shard: w.shard, Logs: e.cfg.Logs, Own: e.cfg.Own, Logger: w.log,
		StepAside: e.cfg.StepAside, StepAsideAfter: e.cfg.StepAsideAfter,
	})
	w.http = e.cfg.NewHTTP(w)
	return w, nil
}

// Loop, Upstreams, Shard and Snapshot are what an HTTPServer is made of.
func (w *Worker) Loop() *loop.Loop { return w.loop }

// Upstreams is the loop's view of the clusters.
func (w *Worker) Upstreams() *upstream.Manager { return w.upstreams }

// Shard holds the loop's metrics.
func (w *Worker) Shard() *telemetry.Shard { return w.shard }

// Snapshot is the configuration that this loop works with. Only on the loop.
func (w *Worker) Snapshot() *mesh.Snapshot { return w.snap }

// close ends the metrics once the loop has ended.
func (w *Worker) close() { w.shard.Close() }

// update switches the loop to another snapshot.
func (w *Worker) update(s *mesh.Snapshot) {
	w.snap = s
	w.upstreams.Update()
	gone := false
	for d := w.conns.next; d != &w.conns; d = d.next {
		if d.info.Listener != nil && !w.follow(d) {
			gone = true
		}
	}
	if gone {
		w.http.DrainListener(func(in *stream.ConnInfo) bool { return w.listener(in.Listener.Name) != in.Listener })
	}
}

// follow brings an open connection up to date with its listener, so that the requests to come use the routes
// in force. It returns false if the connection can't follow, because the listener is gone or would treat it
// as another kind of traffic; it keeps what it has then.
func (w *Worker) follow(d *downstream) bool {
	l := w.listener(d.info.Listener.Name)
	if l == d.info.Listener {
		return true
	}
	if l == nil {
		return false
	}
	chain := l.Chain(d.chainInput())
	if chain == nil || (chain.HTTP == nil) != (d.info.Chain.HTTP == nil) {
		return false
	}
	d.info.Listener, d.info.Chain = l, chain
	return true
}

// listener finds a listener of the loop's snapshot by name; they are ordered.
func (w *Worker) listener(name string) *mesh.Listener {
	if w.snap == nil {
		return nil
	}
	list := w.snap.Listeners
	lo, hi := 0, len(list)
	for lo < hi {
		if mid := (lo + hi) / 2; list[mid].Name < name {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(list) && list[lo].Name == name {
		return list[lo]
	}
	return nil
}

// chainInput is what a filter chain is chosen by, valid until it is called for another connection of the loop.
func (d *downstream) chainInput() *mesh.ChainInput {
	d.w.input = mesh.ChainInput{
		Dst: d.info.Orig, Src: d.info.Peer, DirectSrc: d.info.Peer.Addr(), Transport: "raw_buffer",
		SrcIsLocal: d.info.Peer.Addr().IsLoopback() || d.info.Peer.Addr() == d.info.Orig.Addr(),
	}
	return &d.w.input
}

// ConnClosed implements loop.Owner.
func (d *downstream) ConnClosed(*loop.Conn) {
	d.next.prev, d.prev.next = d.prev, d.next
	d.w.shard.Stats.ConnectionsClosed++
	d.w.released(d.pod)
}

// serve takes an accepted connection on the loop that was chosen for it.
func (w *Worker) serve(fd int, peer netip.AddrPort, from *acceptor) {
	d := &downstream{w: w, pod: from.pod}
	d.info.Source, d.info.ID = w.e.node, w.e.nextID.Add(1)
	if from.pod != nil {
		d.info.Source = from.pod.source
	}
	if why := w.classify(d, fd, peer, from); why != admitted {
		w.refuse(d, fd, why)
		return
	}
	w.e.accepted.Add(1)
	w.shard.Stats.ConnectionsAccepted++
	var o loop.Options
	if d.info.Chain.TCP != nil {
		o = w.tcp.Options(&d.info)
	} else {
		o = loop.Options{BufferLimit: int(d.info.Listener.BufferLimit)}
	}
	o.Owner = d
	d.prev, d.next = w.conns.prev, &w.conns
	d.prev.next, w.conns.prev = d, d
	d.conn = w.loop.Adopt(fd, peer, nil, o)
	if d.info.Chain.TCP != nil {
		w.tcp.ServeConn(d.conn, &d.info)
	} else {
		w.http.ServeConn(d.conn, &d.info)
	}
}
