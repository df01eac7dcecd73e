package proxy

import (
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Pod is a pod whose connections the proxy takes.
type Pod struct {
	Key                                  uint64 // netns cookie
	Namespace, Name, UID, ServiceAccount string
	// Workload is the name of what the pod belongs to, as far as known.
	Workload string
	IPs      []netip.Addr
	// Netns is the pod's network namespace. The engine duplicates it.
	Netns *os.File
}

// podState is a pod as the engine knows it.
type podState struct {
	source    *stream.Source
	listeners []*podListener
	active    atomic.Int64
	flooding  atomic.Bool // over its limit; said once, until it is well below again
	gone      atomic.Bool
	left      atomic.Int64 // loops that still have to forget the pod
}

type podListener struct {
	w  *Worker
	ln *loop.Listener // used only on w's loop
}

// AddPod begins to serve a pod. The listening sockets, which are inside the pod's network namespace, are the
// engine's from now on, whatever it returns.
func (e *Engine) AddPod(pod Pod, listenerFDs []int) error {
	fail := func(err error) error {
		for _, fd := range listenerFDs {
			_ = unix.Close(fd)
		}
		return fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if pod.Key == 0 {
		return fail(fmt.Errorf("no network namespace cookie"))
	}
	if pod.Netns == nil {
		return fail(fmt.Errorf("no network namespace"))
	}
	ns, err := loop.NewNetns(pod.Netns, pod.Key)
	if err != nil {
		return fail(err)
	}
	workload := &telemetry.Workload{
		Namespace: pod.Namespace, Pod: pod.Name, Name: pod.Workload, ServiceAccount: pod.ServiceAccount, UID: pod.UID,
	}
	if workload.Name == "" {
		workload.Name = pod.Name
	}
	p := &podState{source: &stream.Source{Key: pod.Key, Netns: ns, IPs: unmapAll(pod.IPs), Workload: workload}}

	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed, e.draining:
		ns.Close()
		return fail(ErrClosed)
	case e.pods[pod.Key] != nil:
		ns.Close()
		return fail(fmt.Errorf("network namespace %d is served already, for pod %s", pod.Key, e.pods[pod.Key].source.Workload.Pod))
	}
	e.pods[pod.Key] = p
	// Every loop knows the pod before any can accept for it.
	for _, w := range e.workers {
		w.loop.Post(func() { w.addPod(p) })
	}
	for _, fd := range listenerFDs {
		w := e.workers[e.nextLoop%len(e.workers)]
		e.nextLoop++
		pl := &podListener{w: w}
		p.listeners = append(p.listeners, pl)
		from := &acceptor{pod: p, local: localAddr(fd)}
		w.loop.Post(func() {
			ln, err := w.loop.Listen(fd, func(fd int, peer netip.AddrPort) { w.accept(fd, peer, from) })
			if err != nil {
				w.log.Error("cannot accept a pod's connections", "namespace", pod.Namespace, "pod", pod.Name, "error", err)
				return
			}
			pl.ln = ln
		})
	}
	return nil
}

// RemovePod stops accepting a pod's connections, which is done when it returns, and ends those that are open after
// Config.PodDrain, for which it does not wait.
func (e *Engine) RemovePod(key uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.pods[key]
	if p == nil || e.closed {
		return
	}
	delete(e.pods, key)
	e.removing[p] = struct{}{}
	e.closeListeners(p)
	p.left.Store(int64(len(e.workers)))
	for _, w := range e.workers {
		w.loop.Post(func() { w.removePod(p) })
	}
}

// leave has new connections go elsewhere while a pod's listeners still take those that are on their way.
// e.mu is held.
func (e *Engine) leave(p *podState) {
	for _, pl := range p.listeners {
		pl.w.loop.Post(func() {
			if pl.ln == nil || e.cfg.Leave == nil {
				return
			}
			heir, err := e.cfg.Leave(pl.ln.FD())
			if err == nil && heir != NoHeir {
				err = pl.ln.PassOn(heir)
			}
			if err != nil {
				e.log.Warn("new connections may meet a listener that closes", "pod", p.source.Workload.Pod, "error", err)
			}
		})
	}
}

// closeListeners closes a pod's listening sockets, after taking what waits in their queues: closing resets it.
// e.mu is held.
func (e *Engine) closeListeners(p *podState) {
	closed := make(chan struct{}, len(p.listeners))
	asked := 0
	for _, pl := range p.listeners {
		if pl.w.loop.Post(func() {
			if pl.ln != nil {
				pl.ln.Drain()
			}
			closed <- struct{}{}
		}) {
			asked++
		}
	}
	p.listeners = nil
	e.await(closed, asked, "closed a pod's listeners")
}

// addPod makes a pod known to a loop. If it was there before and has not quite left, that ends now: pools and
// sockets of the two must not mix.
func (w *Worker) addPod(p *podState) {
	if old := w.pods[p.source.Key]; old != nil {
		w.forgetPod(old)
	}
	w.pods[p.source.Key] = p
}

// removePod lets a loop's connections of a pod end.
func (w *Worker) removePod(p *podState) {
	if w.pods[p.source.Key] != p {
		return
	}
	w.http.DrainListener(func(in *stream.ConnInfo) bool { return in.Source == p.source })
	if w.e.cfg.PodDrain < 0 || p.active.Load() == 0 {
		w.forgetPod(p)
		return
	}
	// Looked at again and again, because mostly the pod's processes are dead and its connections end now.
	end := w.loop.Now() + int64(w.e.cfg.PodDrain)
	t := new(loop.Timer)
	t.Init(func() {
		if w.pods[p.source.Key] != p {
			return
		}
		if p.active.Load() == 0 || w.loop.Now() >= end {
			w.forgetPod(p)
			return
		}
		w.loop.StartTimer(t, 100*time.Millisecond)
	})
	w.loop.StartTimer(t, 10*time.Millisecond)
}

// forgetPod ends what a loop still has of a pod; the last loop closes its network namespace.
func (w *Worker) forgetPod(p *podState) {
	delete(w.pods, p.source.Key)
	p.gone.Store(true)
	for d := w.conns.next; d != &w.conns; d = d.next {
		if d.pod == p {
			d.conn.Abort()
		}
	}
	w.http.RemoveSource(p.source.Key)
	w.loop.LeaveNetns(p.source.Netns)
	if p.left.Add(-1) == 0 {
		p.close()
		e := w.e
		go func() { // not on the loop: the lock may be held for long
			e.mu.Lock()
			delete(e.removing, p)
			e.mu.Unlock()
		}()
	}
}

func (p *podState) close() { p.source.Netns.Close() }

// appears is the client's address as its pod sees it: the datapath has made it connect to loopback, so that it
// seems to come from there.
func (p *podState) appears(peer, orig netip.AddrPort) netip.AddrPort {
	if !peer.Addr().IsLoopback() {
		return peer
	}
	for _, ip := range p.source.IPs {
		if ip.Is4() == orig.Addr().Is4() {
			return netip.AddrPortFrom(ip, peer.Port())
		}
	}
	return peer
}

func unmapAll(ips []netip.Addr) []netip.Addr {
	out := make([]netip.Addr, len(ips))
	for i, ip := range ips {
		out[i] = ip.Unmap()
	}
	return out
}
