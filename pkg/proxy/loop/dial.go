package loop

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrConnectTimeout is what OnConnect gets when DialOptions.Timeout passes first.
var ErrConnectTimeout = errors.New("connect time-out")

// Keepalive of a socket; zero fields keep the kernel's defaults.
type Keepalive struct {
	Probes         int
	Time, Interval time.Duration
}

// DialOptions of an outgoing connection. The zero value works.
type DialOptions struct {
	Options
	// Own is called with the socket before it connects: the datapath exempts the proxy's own connections. nil: none.
	Own func(fd int) error
	// Timeout of the connect; 0: the kernel's (minutes).
	Timeout time.Duration
	// Keepalive of the socket; nil: off.
	Keepalive *Keepalive
	// BindAddr is the source address; invalid: the kernel chooses.
	BindAddr netip.Addr
}

// Dial connects to addr from within the network namespace ns (nil: the node's own), so that the connection has
// the pod's address and meets the pod's policies. It never calls back before it has returned: OnConnect tells
// the outcome, after a failure OnClose follows. What is written before OnConnect is sent once connected.
func (l *Loop) Dial(ns *Netns, addr netip.AddrPort, h Handler, o *DialOptions) *Conn {
	if o == nil {
		o = &DialOptions{}
	}
	c := &Conn{l: l, h: h, fd: -1, state: stateConnecting, remote: addr, dialled: true}
	c.configure(&o.Options)
	l.stats.conns++
	l.stats.dialled++
	c.slot, c.gen = l.take(c, nil)
	if err := l.dial(ns, c, o); err != nil {
		c.connectErr = fmt.Errorf("connect to %s: %w", addr, err)
		l.kill(c, c.connectErr)
		return c
	}
	if o.Timeout > 0 {
		c.timer.Init(c.timedOut)
		l.StartTimer(&c.timer, o.Timeout)
	}
	return c
}

func (l *Loop) dial(ns *Netns, c *Conn, o *DialOptions) error {
	var to sockaddr
	if err := to.set(c.remote); err != nil {
		return err
	}
	if err := l.enterNetns(ns); err != nil {
		return err
	}
	family := unix.AF_INET
	if c.remote.Addr().Is6() {
		family = unix.AF_INET6
	}
	// IPPROTO_TCP by name: a system-wide default of MPTCP would not go into a sockmap.
	fd, _, e := syscall.RawSyscall(unix.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	l.stats.syscalls += 3
	if e != 0 {
		return fmt.Errorf("socket: %w", e)
	}
	c.fd = int32(fd)
	if e = sysSetInt(c.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); e != 0 {
		return fmt.Errorf("TCP_NODELAY: %w", e)
	}
	if o.Own != nil {
		if err := o.Own(int(c.fd)); err != nil {
			return err
		}
		l.stats.syscalls++
	}
	if o.Keepalive != nil {
		if err := setKeepalive(c.fd, o.Keepalive); err != nil {
			return err
		}
	}
	if o.BindAddr.IsValid() {
		var from sockaddr
		if err := from.set(netip.AddrPortFrom(o.BindAddr, 0)); err != nil {
			return err
		}
		// The port is chosen at connect, by the whole four-tuple: otherwise 28,000 connections are all.
		_ = sysSetInt(c.fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		if e = sysBind(c.fd, &from); e != 0 {
			return fmt.Errorf("binding to %s: %w", o.BindAddr, e)
		}
	}
	// EINTR: a signal came while the connection was being established; it goes on.
	if e = sysConnect(c.fd, &to); e != 0 && e != unix.EINPROGRESS && e != unix.EINTR {
		return e
	}
	return l.backend.attach(c)
}

func setKeepalive(fd int32, k *Keepalive) error {
	set := func(level, name, value int, what string) error {
		if value <= 0 {
			return nil
		}
		if e := sysSetInt(fd, level, name, value); e != 0 {
			return fmt.Errorf("%s=%d: %w", what, value, e)
		}
		return nil
	}
	seconds := func(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }
	return errors.Join(
		set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1, "SO_KEEPALIVE"),
		set(unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Probes, "TCP_KEEPCNT"),
		set(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(k.Time), "TCP_KEEPIDLE"),
		set(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(k.Interval), "TCP_KEEPINTVL"),
	)
}

// connected is the backend's word that a connect has ended.
func (l *Loop) connected(c *Conn, errno syscall.Errno) {
	if errno != 0 {
		c.connectErr = fmt.Errorf("connect to %s: %w", c.remote, errno)
		l.kill(c, c.connectErr)
		return
	}
	c.timer.Stop()
	c.state = stateOpen
	c.h.OnConnect(c, nil)
	if c.state != stateDead && (c.outLen > 0 || c.shutWrite) {
		c.markDirty()
	}
}
