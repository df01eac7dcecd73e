package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// The floor is a bare forwarder on epoll, one thread: bytes from each side to the other, no parsing, no routing, a
// connection of its own to the server for every client. No proxy in Go that looks at what it forwards can cost less, so
// it shows what a proxy's own work costs.

func (w *world) startFloor(ctx context.Context, s scenario) (*lab.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return w.startProxy(ctx, "floor", self, "floor", outbound.String(), w.backend(s).String())
}

// side is one of the two sockets of a forwarded connection.
type side struct {
	fd      int
	other   *side
	pending []byte // read here, not yet written to the other side
	ended   bool   // no more will be read here
	dead    bool
}

type forwarder struct {
	epoll, listener int
	server          unix.Sockaddr
	sides           map[int]*side
	buf             []byte
}

func floor(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: bench floor LISTEN SERVER")
	}
	runtime.LockOSThread()
	listen, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	server, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return err
	}
	f := &forwarder{server: sockaddr(server), sides: map[int]*side{}, buf: make([]byte, 64<<10)}
	if f.epoll, err = unix.EpollCreate1(0); err != nil {
		return err
	}
	if f.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(f.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(f.listener, sockaddr(listen)); err != nil {
		return err
	}
	if err := unix.Listen(f.listener, 4096); err != nil {
		return err
	}
	if err := f.watch(unix.EPOLL_CTL_ADD, f.listener, unix.EPOLLIN); err != nil {
		return err
	}
	return f.run()
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

func (f *forwarder) watch(op, fd int, events uint32) error {
	return unix.EpollCtl(f.epoll, op, fd, &unix.EpollEvent{Fd: int32(fd), Events: events})
}

func (f *forwarder) run() error {
	events := make([]unix.EpollEvent, 256)
	for {
		n, err := unix.EpollWait(f.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("epoll_wait: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if int(e.Fd) == f.listener {
				f.accept()
				continue
			}
			s := f.sides[int(e.Fd)]
			if s == nil {
				continue
			}
			if e.Events&unix.EPOLLOUT != 0 {
				f.flush(s.other)
			}
			if e.Events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR) != 0 && !s.dead {
				f.forward(s)
			}
		}
	}
}

func (f *forwarder) accept() {
	for {
		fd, _, err := unix.Accept4(f.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		up, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			unix.Close(fd)
			return
		}
		a, b := &side{fd: fd}, &side{fd: up}
		a.other, b.other = b, a
		f.sides[fd], f.sides[up] = a, b
		for _, s := range []*side{a, b} {
			_ = unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		}
		if err := unix.Connect(up, f.server); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			f.close(a)
			continue
		}
		if f.watch(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN) != nil || f.watch(unix.EPOLL_CTL_ADD, up, unix.EPOLLIN) != nil {
			f.close(a)
		}
	}
}

// forward reads once and writes what came; what the other side does not take waits, and nothing is read meanwhile.
func (f *forwarder) forward(s *side) {
	if len(s.pending) > 0 || s.ended {
		return
	}
	n, err := unix.Read(s.fd, f.buf)
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return
	case err != nil:
		f.close(s)
		return
	case n == 0:
		f.end(s)
		return
	}
	m, err := unix.Write(s.other.fd, f.buf[:n])
	if errors.Is(err, unix.EAGAIN) {
		m, err = 0, nil
	}
	if err != nil {
		f.close(s)
		return
	}
	if m < n {
		s.pending = append(s.pending, f.buf[m:n]...)
		f.rearm(s)
	}
}

// flush writes what waits for the other side of s.
func (f *forwarder) flush(s *side) {
	if len(s.pending) == 0 {
		return
	}
	m, err := unix.Write(s.other.fd, s.pending)
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		f.close(s)
		return
	}
	s.pending = s.pending[:copy(s.pending, s.pending[max(m, 0):])]
	f.rearm(s)
}

// rearm asks for what each side waits for: bytes here unless some wait, room there if some do.
func (f *forwarder) rearm(s *side) {
	for _, x := range []*side{s, s.other} {
		var events uint32
		if len(x.pending) == 0 && !x.ended {
			events |= unix.EPOLLIN
		}
		if len(x.other.pending) > 0 {
			events |= unix.EPOLLOUT
		}
		_ = f.watch(unix.EPOLL_CTL_MOD, x.fd, events)
	}
}

// end passes a half-close on, and closes when both directions have ended.
func (f *forwarder) end(s *side) {
	s.ended = true
	if s.other.ended {
		f.close(s)
		return
	}
	_ = unix.Shutdown(s.other.fd, unix.SHUT_WR)
	f.rearm(s)
}

func (f *forwarder) close(s *side) {
	for _, x := range []*side{s, s.other} {
		if !x.dead {
			x.dead = true
			delete(f.sides, x.fd)
			unix.Close(x.fd)
		}
	}
}
