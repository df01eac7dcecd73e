package loop

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// acceptBatch bounds how many connections one wake-up takes from one listener.
	acceptBatch = 64
	// acceptPause is how long a listener rests when the process or the kernel is out of descriptors or
	// memory: connections wait in the backlog meanwhile.
	acceptPause = 100 * time.Millisecond
)

// Listener accepts connections on a loop.
type Listener struct {
	l         *Loop
	fd        int32
	slot, gen int32
	accept    func(fd int, peer netip.AddrPort)
	timer     Timer
	resting   bool
	closed    bool
	lastLog   int64
}

// Listen accepts connections on the listening socket fd, which becomes the Listener's. The function gets
// non-blocking, close-on-exec sockets with Nagle's algorithm off, and owns them.
func (l *Loop) Listen(fd int, accept func(fd int, peer netip.AddrPort)) (*Listener, error) {
	ln := &Listener{l: l, fd: int32(fd), accept: accept}
	ln.timer.Init(ln.resume)
	// Accepted sockets inherit it, which saves a system call for each.
	if e := sysSetInt(ln.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); e != 0 {
		sysClose(ln.fd)
		return nil, fmt.Errorf("listening socket: TCP_NODELAY: %w", e)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		sysClose(ln.fd)
		return nil, fmt.Errorf("listening socket: O_NONBLOCK: %w", err)
	}
	ln.slot, ln.gen = l.take(nil, ln)
	if err := l.backend.attachListener(ln); err != nil {
		l.vacate(ln.slot)
		sysClose(ln.fd)
		return nil, err
	}
	l.stats.listeners++
	return ln, nil
}

// FD is the listening socket; it stays the Listener's.
func (ln *Listener) FD() int { return int(ln.fd) }

// PassOn gives new connections to another listener of the SO_REUSEPORT group, by its place in the order of joining: at an
// upgrade 1 is the successor's, and 0 that of the agent that was there before. It may go on accepting while this one closes;
// a connection that comes between the last accept and close would be reset. In a group of one nothing changes.
func (ln *Listener) PassOn(to int) error {
	if ln.closed {
		return nil
	}
	// The program's value is an index into the group; where there is no such listener the kernel draws one, as it does without
	// a program (net/core/sock_reuseport.c). It stays with the group until another is attached: without effect while there is one
	// listener, and with two it says which of two agents, that both serve, gets the connections.
	place := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: uint32(to)}}
	err := unix.SetsockoptSockFprog(int(ln.fd), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(place)), Filter: &place[0]})
	if err != nil {
		return fmt.Errorf("pass connections on to another listener: SO_ATTACH_REUSEPORT_CBPF: %w", err)
	}
	return nil
}

// Drain accepts what is waiting, which closing would reset, and closes the socket.
func (ln *Listener) Drain() {
	for n := ln.l.stats.accepted; !ln.closed && !ln.resting; n = ln.l.stats.accepted {
		ln.l.acceptable(ln)
		if ln.l.stats.accepted == n {
			break
		}
	}
	ln.Close()
}

// Close stops accepting and closes the socket.
func (ln *Listener) Close() {
	if ln.closed {
		return
	}
	ln.closed = true
	ln.timer.Stop()
	ln.l.backend.detachListener(ln)
	ln.l.vacate(ln.slot)
	sysClose(ln.fd)
	ln.l.stats.listeners--
}

func (ln *Listener) resume() {
	if ln.resting && !ln.closed {
		ln.resting = false
		ln.l.backend.updateListener(ln, true)
	}
}

// acceptable takes what waits in a listener's queue.
func (l *Loop) acceptable(ln *Listener) {
	var peer sockaddr
	for range acceptBatch {
		if ln.closed || ln.resting {
			return
		}
		fd, errno := sysAccept(ln.fd, &peer)
		l.stats.syscalls++
		switch errno {
		case 0:
			l.stats.accepted++
			ln.accept(int(fd), unmap(peer.get()))
		case unix.EAGAIN:
			return
		case unix.EINTR, unix.ECONNABORTED, unix.EPROTO, unix.ENETDOWN, unix.EHOSTUNREACH, unix.ENETUNREACH,
			unix.EHOSTDOWN, unix.ENONET, unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.EPERM:
			// The error of one connection (accept(2) passes on what its network says), not of the listener.
			l.stats.acceptErrors++
		default:
			l.stats.acceptErrors++
			ln.resting = true
			l.backend.updateListener(ln, false)
			l.StartTimer(&ln.timer, acceptPause)
			if l.now-ln.lastLog >= int64(10*time.Second) || ln.lastLog == 0 {
				ln.lastLog = l.now
				cure := ""
				if errors.Is(errno, unix.EMFILE) || errors.Is(errno, unix.ENFILE) {
					cure = "raise the descriptor limit (LimitNOFILE, ulimit -n)"
				}
				l.log.Warn("cannot accept connections, trying again shortly", "error", errno, "cure", cure)
			}
			return
		}
	}
}
