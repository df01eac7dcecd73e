package proxy

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// refusal is why a connection was closed instead of served.
type refusal uint8

const (
	admitted refusal = iota
	noOriginalDst
	noListener
	noChain
	overGlobalLimit
	overPodLimit
	shuttingDown
	refusals
)

// acceptor is a listening socket's side of the story.
type acceptor struct {
	pod   *podState      // nil: a socket on the node
	local netip.AddrPort // where the socket listens
	name  string         // of the listener, for sockets on the node
}

// accept is called on the loop that owns the listening socket. It holds the limits and finds the loop that has
// the least to do.
func (w *Worker) accept(fd int, peer netip.AddrPort, from *acceptor) {
	e := w.e
	why := admitted
	if e.active.Add(1) > int64(e.cfg.MaxConns) {
		why = overGlobalLimit
	} else if from.pod != nil && from.pod.active.Add(1) > int64(e.cfg.MaxConnsPerPod) {
		from.pod.active.Add(-1)
		why = overPodLimit
		if !from.pod.flooding.Swap(true) {
			p := from.pod.source.Workload
			w.log.Warn("a pod has more connections than it may: further ones are reset until some have ended",
				"namespace", p.Namespace, "pod", p.Pod, "limit", e.cfg.MaxConnsPerPod, "cure", "--max-connections-per-pod")
		}
	}
	if why != admitted {
		e.active.Add(-1)
		w.turnAway(fd, why)
		return
	}
	to := w
	least := w.load.Load()
	for _, other := range e.workers {
		if n := other.load.Load(); n < least {
			to, least = other, n
		}
	}
	to.load.Add(1)
	if to == w {
		w.serve(fd, peer, from)
	} else if !to.loop.Post(func() { to.serve(fd, peer, from) }) {
		to.released(from.pod)
		w.turnAway(fd, shuttingDown)
	}
}

// released gives back what accept took.
func (w *Worker) released(pod *podState) {
	w.load.Add(-1)
	w.e.active.Add(-1)
	if pod == nil {
		return
	}
	if n := pod.active.Add(-1); pod.flooding.Load() && n <= int64(w.e.cfg.MaxConnsPerPod)/2 {
		pod.flooding.Store(false)
	}
}

// turnAway resets a connection: a refusal must not look like an orderly, empty answer.
func (w *Worker) turnAway(fd int, why refusal) {
	w.e.refused[why].Add(1)
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Close(fd)
}

// refuse turns away a connection that had been assigned to the loop.
func (w *Worker) refuse(d *downstream, fd int, why refusal) {
	if why == noOriginalDst {
		w.shard.Stats.NoOriginalDst++
	}
	if l := d.info.Listener; l != nil && len(l.AccessLog) > 0 && w.e.cfg.Logs != nil {
		now := w.loop.Now()
		w.tcp.Log(l.AccessLog, &telemetry.Record{
			StartTime: time.Now().UnixNano(), Begin: now, End: now, Flags: telemetry.NR, Listener: l.Name,
			ConnectionID: d.info.ID, Details: "filter_chain_not_found", Source: d.info.Source.Workload,
			DownstreamRemote: d.info.Peer, DownstreamDirect: d.info.Peer, DownstreamLocal: d.info.Orig,
		})
	}
	w.turnAway(fd, why)
	w.released(d.pod)
}

// classify finds out where a connection wanted to go and what the configuration says of that.
func (w *Worker) classify(d *downstream, fd int, peer netip.AddrPort, from *acceptor) refusal {
	d.info.Peer = peer
	if from.pod == nil {
		d.info.Orig = from.local
		if from.local.Addr().IsUnspecified() {
			d.info.Orig = localAddr(fd)
		}
		d.info.Listener = w.listener(from.name)
	} else {
		if from.pod.gone.Load() {
			return shuttingDown
		}
		o, err := w.e.cfg.OriginalDst(fd)
		orig := netip.AddrPortFrom(o.Addr.Addr().Unmap(), o.Addr.Port())
		if err != nil || !orig.IsValid() || orig == from.local {
			return noOriginalDst
		}
		d.info.Orig, d.info.Accelerated = orig, o.Accelerated
		d.info.Peer = from.pod.appears(peer, orig)
		d.info.Listener = w.outbound(orig)
	}
	if d.info.Listener == nil {
		return noListener
	}
	if d.info.Chain = d.info.Listener.Chain(d.chainInput()); d.info.Chain == nil {
		return noChain
	}
	return admitted
}

func (w *Worker) outbound(orig netip.AddrPort) *mesh.Listener {
	if w.snap == nil {
		return nil
	}
	return w.snap.Outbound(orig)
}
