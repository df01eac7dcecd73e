package proxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
)

// bindAgain is when an address that could not be bound is tried again.
const bindAgain = 5 * time.Second

// ingress is a listening socket in the node's own network namespace.
type ingress struct {
	name string // of the listener
	addr netip.AddrPort
	w    *Worker
	ln   *loop.Listener // used only on w's loop
	err  error          // why the address isn't bound
}

// bind opens and closes listening sockets until they are those that the snapshot asks for. A socket whose
// address stays, stays; connections accepted from one that goes are not touched. e.mu is held.
func (e *Engine) bind(s *mesh.Snapshot) {
	wanted := map[netip.AddrPort]string{}
	for _, l := range s.Listeners {
		if !l.BindToPort {
			continue
		}
		for _, addr := range l.Addresses {
			if other, twice := wanted[addr]; twice && other != l.Name {
				e.log.Error("two listeners want to bind the same address", "address", addr, "used", other, "ignored", l.Name)
				continue
			}
			wanted[addr] = l.Name
		}
	}
	for addr, in := range e.ingress {
		if name := wanted[addr]; name != in.name || in.err != nil {
			e.closeIngress(in)
		}
	}
	failed := false
	for addr, name := range wanted {
		if e.ingress[addr] == nil {
			in := e.openIngress(addr, name)
			e.ingress[addr] = in
			failed = failed || in.err != nil
		}
	}
	if e.retry != nil {
		e.retry.Stop()
		e.retry = nil
	}
	if failed {
		e.retry = time.AfterFunc(bindAgain, func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			if s := e.snapshot.Load(); s != nil && !e.closed && !e.draining {
				e.bind(s)
			}
		})
	}
}

func (e *Engine) openIngress(addr netip.AddrPort, name string) *ingress {
	in := &ingress{name: name, addr: addr}
	fd, err := listenOn(addr)
	if err != nil {
		in.err = err
		e.log.Error("cannot open a listener", "listener", name, "address", addr, "error", err)
		return in
	}
	in.w = e.workers[e.nextLoop%len(e.workers)]
	e.nextLoop++
	from := &acceptor{local: localAddr(fd), name: name}
	w := in.w
	w.loop.Post(func() {
		ln, err := w.loop.Listen(fd, func(fd int, peer netip.AddrPort) { w.accept(fd, peer, from) })
		if err != nil {
			w.log.Error("cannot accept on a listener", "listener", name, "address", addr, "error", err)
			return
		}
		in.ln = ln
	})
	e.log.Info("listening", "listener", name, "address", from.local)
	return in
}

func (e *Engine) closeIngress(in *ingress) {
	delete(e.ingress, in.addr)
	if in.w == nil {
		return
	}
	closed := make(chan struct{}, 1)
	if in.w.loop.Post(func() {
		if in.ln != nil {
			in.ln.Drain()
		}
		closed <- struct{}{}
	}) { // waited for, because another listener may want the address right away
		e.await(closed, 1, "closed a listener")
	}
}

// unbind closes every listening socket of the node. e.mu is held.
func (e *Engine) unbind() {
	if e.retry != nil {
		e.retry.Stop()
		e.retry = nil
	}
	for _, in := range e.ingress {
		e.closeIngress(in)
	}
}

// listenOn opens a listening socket, v6 only if the address is v6: what a v4 wildcard means has its own entry.
func listenOn(addr netip.AddrPort) (int, error) {
	network := "tcp4"
	if addr.Addr().Is6() {
		network = "tcp6"
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return nil }}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), network, addr.String())
	if err != nil {
		switch {
		case strings.Contains(err.Error(), unix.EACCES.Error()):
			return -1, fmt.Errorf("%w (ports below 1024 need CAP_NET_BIND_SERVICE)", err)
		case strings.Contains(err.Error(), unix.EADDRINUSE.Error()):
			return -1, fmt.Errorf("%w (another program on this node listens there: see ss -ltnp)", err)
		}
		return -1, err
	}
	defer ln.Close()
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	if cerr := raw.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return -1, cerr
	}
	return fd, err
}

// localAddr is where a socket is bound, in the form in which addresses are compared.
func localAddr(fd int) netip.AddrPort {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}
	}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}
