package datapath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// claimedPod is a client pod whose connections to 8080 of the server's pod a proxy claims.
func claimedPod(t *testing.T, change ...func(*Config)) *meshed {
	m := newMeshed(t, change...)
	m.server.server("b", 8080)
	return m
}

// proxied tells whether the proxy took a connection of the client, which must be answered either way.
func (m *meshed) proxied(to netip.AddrPort, opts ...dialOption) bool {
	m.w.t.Helper()
	before := len(m.p.seen())
	if got, err := m.client.ask(to, opts...); err != nil || got != "b" {
		m.w.t.Fatal(got, err)
	}
	return len(m.p.seen()) == before+1
}

// Whoever may set SO_MARK (CAP_NET_RAW since Linux 5.17) may set any: no mark makes a socket the proxy's.
func TestNoMarkExemptsAPodFromItsClaims(t *testing.T) {
	m := claimedPod(t)
	for _, mark := range []int{1, 0x534d0001, 0x7fffffff} {
		families(t, func(t *testing.T, fam family) {
			marked := func(d *net.Dialer) {
				d.Control = control(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) })
			}
			if !fam.mapped && !m.proxied(ap(fam.of(m.server), 8080), marked) {
				t.Errorf("a socket with the mark %#x went past the proxy", mark)
			}
		})
	}
}

// The proxy's own sockets are exempt, and only once: a socket that connects again is decided anew.
func TestTheProxysOwnSocketIsExempt(t *testing.T) {
	m := claimedPod(t)
	families(t, func(t *testing.T, fam family) {
		if !fam.mapped && m.proxied(ap(fam.of(m.server), 8080), owned(m.d)) {
			t.Error("the proxy's own connection was sent to the proxy")
		}
	})
}

// reuse sets SO_REUSEPORT and SO_REUSEADDR, as whoever wants into a group would.
func reuse(fd int) error {
	return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
}

// A process of the pod with the agent's own user id, which the kernel would let into the group, can't bind the proxy's
// port beside its listener, on any address.
func TestNobodyBindsTheProxysPortBesideIt(t *testing.T) {
	m := claimedPod(t)
	for _, addr := range []string{"127.0.0.1:15001", "0.0.0.0:15001", "[::1]:15001", "[::]:15001", "[::ffff:127.0.0.1]:15001", m.client.v4.String() + ":15001"} {
		m.client.do(func() {
			lc := net.ListenConfig{Control: control(reuse)}
			l, err := lc.Listen(context.Background(), "tcp", addr)
			if !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("listen on %s: %v, want EADDRINUSE", addr, err)
			}
			if err == nil {
				l.Close()
			}
		})
	}
	before, err := m.d.Counters()
	must(t, err)
	if before.BindRefused == 0 {
		t.Error("the refusals are not counted")
	}
	// Elsewhere the port is like any other: in a pod without the proxy, and other ports in this one.
	m.server.listen("127.0.0.1:15001", func(c *net.TCPConn) { c.Close() }, reuse)
	m.client.listen("127.0.0.1:15006", func(c *net.TCPConn) { c.Close() }, reuse)
	if !m.proxied(ap(m.server.v4, 8080)) {
		t.Error("the proxy does not get the pod's connections any more")
	}
}

// Who holds the proxy's port without being the proxy gets nothing: the pod's connections meet the fail mode.
func TestAStrangerOnTheProxysPortGetsNothing(t *testing.T) {
	for _, closed := range []bool{false, true} {
		w := newWorld(t)
		d := w.open(func(c *Config) { c.FailClosed = closed })
		client, server := w.pod(), w.pod()
		server.server("b", 8080)
		for _, addr := range []string{"127.0.0.1:15001", "[::1]:15001"} {
			client.listen(addr, func(c *net.TCPConn) {
				t.Errorf("a stranger got the connection of %s", c.RemoteAddr())
				c.Close()
			})
		}
		enrol(d, client, server)
		d.Reconciler().SetClaims([]mesh.Claim{
			claim(netip.MustParseAddrPort("0.0.0.0:8080")), claim(netip.MustParseAddrPort("[::]:8080")),
		})
		synced(t, d)
		families(t, func(t *testing.T, fam family) {
			got, err := fam.ask(client, ap(fam.of(server), 8080))
			if closed && !errors.Is(err, unix.ECONNREFUSED) || !closed && (err != nil || got != "b") {
				t.Errorf("fail mode closed %v: %q, %v", closed, got, err)
			}
		})
	}
}

// Where the proxy may be another's, any listener on its port gets the pod's claimed connections, with and without
// acceleration, and is told where they were going; and anybody may bind the port. No agent has made any of these sockets.
func TestAForeignProxyGetsTheConnections(t *testing.T) {
	for _, accelerate := range []bool{false, true} {
		w := newWorld(t)
		d := w.open(func(c *Config) { c.Acceleration, c.AcceleratePods, c.OriginalDstSockopt = accelerate, accelerate, true })
		client, server := w.pod(), w.pod()
		server.server("b", 8080)
		for _, addr := range []string{"127.0.0.1:15001", "[::1]:15001"} {
			client.listen(addr, func(c *net.TCPConn) {
				defer c.Close()
				rc, err := c.SyscallConn()
				if err == nil {
					var to netip.AddrPort
					err = rc.Control(func(fd uintptr) { to = originByGetsockopt(int(fd)) })
					_, _ = io.WriteString(c, "foreign "+to.String()+"\n")
				}
				if err != nil {
					t.Error(err)
				}
			}, reuse)
		}
		enrol(d, client, server)
		d.Reconciler().SetClaims([]mesh.Claim{claim(vip4), claim(vip6)})
		synced(t, d)
		families(t, func(t *testing.T, fam family) {
			if got, err := fam.ask(client, fam.vip); err != nil || got != "foreign "+fam.vip.String() {
				t.Errorf("the claimed address: %q, %v", got, err)
			}
			if got, err := fam.ask(client, ap(fam.of(server), 8080)); err != nil || got != "b" {
				t.Errorf("an address that nobody claims: %q, %v", got, err)
			}
		})
		c, err := d.Counters()
		must(t, err)
		if (c.RedirectedBytes > 0) != accelerate {
			t.Errorf("acceleration %v, and %d bytes went from socket to socket", accelerate, c.RedirectedBytes)
		}
		client.do(func() {
			lc := net.ListenConfig{Control: control(reuse)}
			l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:15001")
			must(t, err)
			l.Close()
		})
		must(t, d.Close())
		must(t, Cleanup(w.cfg))
	}
}

// A note that an earlier connection of the same tuple left, because it was never accepted, does not become the origin of
// a connection that dials the proxy's port directly.
func TestAStaleNoteIsNobodysOrigin(t *testing.T) {
	m := claimedPod(t)
	for i, at := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		const port = 45001
		key := tupleKey{Local: addr16(at), Remote: addr16(at), LocalPort: port, RemotePort: OutboundPort, Netns: m.client.cookie}
		note := originValue{Addr: addr16(m.server.v4), Port: 8080, Role: uint8(RoleClient)}
		must(t, m.d.objs.maps[sockmeshMapSmOrigin].Put(key, note))
		c, err := m.client.dial(ap(at, OutboundPort), func(d *net.Dialer) {
			d.LocalAddr = &net.TCPAddr{IP: at.AsSlice(), Port: port}
			d.Control = control(reuse)
		})
		must(t, err)
		eventually(t, "the proxy knows of no origin", func() bool { m.p.mu.Lock(); defer m.p.mu.Unlock(); return m.p.orphans == i+1 })
		c.Close()
		if seen := m.p.seen(); len(seen) > 0 {
			t.Errorf("a forged origin: %v", seen)
		}
	}
}

// An agent knows the listeners of another on the same maps, and no stranger's.
func TestListenersOfAgentsAreKnownToEachOther(t *testing.T) {
	m := claimedPod(t)
	other, err := Open(m.w.cfg)
	must(t, err)
	defer other.Close()
	fd := func(own bool) uint64 {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		if own {
			must(t, m.d.OwnListener(fd))
		}
		cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		must(t, err)
		return cookie
	}
	for _, own := range []bool{true, false} {
		if got, err := other.OwnsListener(fd(own)); err != nil || got != own {
			t.Errorf("a listener that is an agent's: %v; known as such: %v, %v", own, got, err)
		}
	}
}
