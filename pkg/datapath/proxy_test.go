package datapath

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// proxy is the least that a proxy has to do with the datapath: listen in the pod, ask for the origin, connect there
// from the pod's namespace by a socket that the datapath knows, and pass bytes both ways with half-close.
type proxy struct {
	t    testing.TB
	d    *Datapath
	pod  *ns
	stop func()
	// to overrides where connections go; the zero value sends them to their origin.
	to netip.AddrPort

	mu      sync.Mutex
	origins []origin // guarded by mu
	orphans int      // guarded by mu; connections without an origin
}

type origin struct {
	addr        netip.AddrPort
	accelerated bool
	sockopt     netip.AddrPort // by getsockopt
	client      netip.AddrPort
}

func startProxy(t testing.TB, d *Datapath, pod *ns) *proxy {
	p := &proxy{t: t, d: d, pod: pod}
	stop4 := pod.listen("127.0.0.1:15001", p.handle, d.OwnListener)
	stop6 := pod.listen("[::1]:15001", p.handle, d.OwnListener)
	p.stop = func() { stop4(); stop6() }
	return p
}

func (p *proxy) handle(c *net.TCPConn) {
	defer c.Close()
	o, err := p.originOf(c)
	p.mu.Lock()
	if err != nil {
		p.orphans++
	} else {
		p.origins = append(p.origins, o)
	}
	p.mu.Unlock()
	if err != nil {
		return
	}
	to := o.addr
	if p.to.IsValid() {
		to = p.to
	}
	up, err := p.pod.dial(to, owned(p.d))
	if err != nil {
		c.SetLinger(0) // a reset, as a proxy without upstream would
		return
	}
	defer up.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	var wg sync.WaitGroup
	wg.Go(func() { relay(up, c) })
	wg.Go(func() { relay(c, up) })
	wg.Wait()
}

func relay(to, from *net.TCPConn) {
	if _, err := io.Copy(onlyWriter{to}, onlyReader{from}); err != nil {
		to.SetLinger(0)
		to.Close()
		return
	}
	to.CloseWrite()
}

func (p *proxy) originOf(c *net.TCPConn) (o origin, err error) {
	o.client, _ = netip.ParseAddrPort(c.RemoteAddr().String())
	rc, err := c.SyscallConn()
	if err != nil {
		return o, err
	}
	if e := rc.Control(func(fd uintptr) {
		o.addr, o.accelerated, err = p.d.OriginalDst(int(fd))
		o.sockopt = originByGetsockopt(int(fd))
	}); e != nil {
		return o, e
	}
	return o, err
}

// originByGetsockopt asks as a foreign proxy would; the zero value means no answer.
func originByGetsockopt(fd int) netip.AddrPort {
	// IPv6Mreq and IPv6MTUInfo are x/sys/unix's ways to read 16 and 32 bytes of any option.
	if m, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, 80); err == nil {
		b := m.Multiaddr
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
	}
	if m, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, 80); err == nil {
		return netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), m.Addr.Port<<8|m.Addr.Port>>8)
	}
	return netip.AddrPort{}
}

func (p *proxy) seen() []origin {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]origin(nil), p.origins...)
}

func (p *proxy) last() origin {
	s := p.seen()
	if len(s) == 0 {
		return origin{}
	}
	return s[len(s)-1]
}

// eventually waits for something that another goroutine, or the kernel's softirq, is about to do.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never happened: ", what)
		}
	}
}
