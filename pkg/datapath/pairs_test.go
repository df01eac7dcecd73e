package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// meshed is a client pod whose connections to server's pod go through a proxy.
type meshed struct {
	w              *world
	d              *Datapath
	client, server *ns
	p              *proxy
}

func newMeshed(t testing.TB, change ...func(*Config)) *meshed {
	w := newWorld(t)
	m := &meshed{w: w, d: w.open(change...), client: w.pod(), server: w.pod()}
	m.p = startProxy(t, m.d, m.client)
	enrol(m.d, m.client, m.server)
	m.d.Reconciler().SetClaims([]mesh.Claim{
		claim(netip.MustParseAddrPort("0.0.0.0:8080")), claim(netip.MustParseAddrPort("[::]:8080")),
	})
	synced(t, m.d)
	return m
}

// roles counts the sockets that are listed, by role and by how they send.
func roles(t testing.TB, d *Datapath) map[string]int {
	t.Helper()
	socks, err := d.Sockets()
	must(t, err)
	got := map[string]int{}
	for _, s := range socks {
		got[s.Role+" "+s.State+" "+s.Sends]++
	}
	return got
}

func (f family) dial(n *ns, to netip.AddrPort) (*net.TCPConn, error) {
	if f.mapped {
		return n.dialMapped(to)
	}
	return n.dial(to)
}

func TestBothLegsAreRedirected(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	families(t, func(t *testing.T, fam family) {
		before, err := m.d.Counters()
		must(t, err)
		c, err := fam.dial(m.client, ap(fam.of(m.server), 8080))
		must(t, err)
		defer c.Close()
		talks(t, c, "b", 100_000)
		if !m.p.last().accelerated {
			t.Error("the proxy is told that the connection is not accelerated")
		}
		got := roles(t, m.d)
		want := []string{"client enrolled redirect", "downstream enrolled redirect", "upstream enrolled redirect", "server enrolled redirect"}
		for _, k := range want {
			if got[k] != 1 {
				t.Errorf("%d sockets are %q; all: %v", got[k], k, got)
			}
		}
		after, err := m.d.Counters()
		must(t, err)
		if n := after.RedirectedBytes - before.RedirectedBytes; n != 2*(2+2*100_000) {
			t.Errorf("%d bytes redirected, want the greeting and the echo on both legs: %d", n, 2*(2+2*100_000))
		}
		if after.PassedBytes != before.PassedBytes {
			t.Errorf("%d bytes of enrolled sockets went by TCP", after.PassedBytes-before.PassedBytes)
		}
		socks, err := m.d.Sockets()
		must(t, err)
		cookies := map[uint64]bool{}
		for _, s := range socks {
			cookies[s.Cookie] = true
		}
		for _, s := range socks {
			if s.Peer == 0 || !cookies[s.Peer] || s.Peer == s.Cookie {
				t.Errorf("socket %+v has no peer in the list", s)
			}
		}
		c.Close()
		eventually(t, "the pairs leave the map", func() bool { return m.d.Status().Acceleration.Pairs == 0 && len(roles(t, m.d)) == 0 })
	})
}

// echo writes n random bytes and reads them back.
func echo(t testing.TB, c net.Conn, n int) {
	t.Helper()
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(rand.Uint32())
	}
	go c.Write(out)
	in := make([]byte, n)
	if _, err := io.ReadFull(c, in); err != nil {
		t.Fatal("echo:", err)
	}
	if !bytes.Equal(in, out) {
		t.Fatal("the echo differs from what was sent")
	}
}

func TestWithoutAccelerationEverythingWorksTheSame(t *testing.T) {
	m := newMeshed(t, func(c *Config) { c.Acceleration = false })
	m.server.server("b", 8080)
	families(t, func(t *testing.T, fam family) {
		c, err := fam.dial(m.client, ap(fam.of(m.server), 8080))
		must(t, err)
		defer c.Close()
		talks(t, c, "b", 100_000)
	})
	s := m.d.Status().Acceleration
	if s.Active || s.Mode != "off" || s.RedirectedBytes != 0 || s.Reason == "" {
		t.Errorf("status says %+v", s)
	}
}

// stream is a deterministic sequence of random writes: what one side says in a conversation.
type stream struct {
	data   []byte
	chunks []int
	pause  []time.Duration
}

func newStream(r *rand.Rand) stream {
	var s stream
	for range r.IntN(30) {
		n := 1 + r.IntN(1<<uint(1+r.IntN(17)))
		s.chunks = append(s.chunks, n)
		var p time.Duration
		if r.IntN(4) == 0 {
			p = time.Duration(r.IntN(3000)) * time.Microsecond
		}
		s.pause = append(s.pause, p)
		for range n {
			s.data = append(s.data, byte(r.Uint32()))
		}
	}
	return s
}

// play sends the stream, closes the write side, and returns what came back until EOF.
func (s stream) play(c *net.TCPConn) ([]byte, error) {
	sent := make(chan error, 1)
	go func() {
		rest := s.data
		for i, n := range s.chunks {
			time.Sleep(s.pause[i])
			if _, err := c.Write(rest[:n]); err != nil {
				sent <- err
				return
			}
			rest = rest[n:]
		}
		sent <- c.CloseWrite()
	}()
	got, err := io.ReadAll(onlyReader{c})
	return got, errors.Join(err, <-sent)
}

// Conversations of random writes in both directions at once, ended by half-close on both sides, must carry the same
// bytes as over plain TCP.
func TestRandomConversationsAreByteExact(t *testing.T) {
	m := newMeshed(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	type result struct {
		got []byte
		err error
	}
	var serverSays stream
	results := make(chan result, 1)
	answer := func(c *net.TCPConn) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(60 * time.Second))
		got, err := serverSays.play(c)
		results <- result{got, err}
	}
	m.server.serve(8080, answer) // through the proxy
	m.server.serve(8081, answer) // plain
	before, err := m.d.Counters()
	must(t, err)
	families(t, func(t *testing.T, fam family) {
		for i := range 60 {
			clientSays := newStream(r)
			serverSays = newStream(r)
			for _, port := range []uint16{8080, 8081} {
				c, err := fam.dial(m.client, ap(fam.of(m.server), port))
				must(t, err)
				got, err := clientSays.play(c)
				c.Close()
				res := <-results
				if err != nil || res.err != nil {
					t.Fatalf("conversation %d on port %d, seed %d: client %v, server %v", i, port, seed, err, res.err)
				}
				if !bytes.Equal(got, serverSays.data) || !bytes.Equal(res.got, clientSays.data) {
					t.Fatalf("conversation %d on port %d, seed %d: bytes differ (client got %d of %d, server %d of %d)",
						i, port, seed, len(got), len(serverSays.data), len(res.got), len(clientSays.data))
				}
			}
		}
	})
	after, err := m.d.Counters()
	must(t, err)
	t.Logf("redirected %d bytes, passed %d", after.RedirectedBytes-before.RedirectedBytes, after.PassedBytes-before.PassedBytes)
	if after.RedirectedBytes == before.RedirectedBytes {
		t.Error("nothing was redirected")
	}
}

func TestBlockingClientIsNotAccelerated(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	families(t, func(t *testing.T, fam family) {
		before, err := m.d.Counters()
		must(t, err)
		c, err := fam.dialBlocking(m.client, ap(fam.of(m.server), 8080))
		must(t, err)
		defer c.Close()
		talks(t, c, "b", 1000)
		s := m.only(t, "client")
		if s.State != "plain" || !strings.Contains(s.Reason, "blocking when it connected") {
			t.Errorf("a blocking client is %+v", s)
		}
		after, err := m.d.Counters()
		must(t, err)
		if n := after.SkippedBlocking - before.SkippedBlocking; n != 1 {
			t.Errorf("counted %d blocking clients", n)
		}
		if m.p.last().accelerated {
			t.Error("the proxy is told that the connection is accelerated")
		}
		m.gone(t, c)
	})
}

// only is the one socket with that role.
func (m *meshed) only(t testing.TB, role string) (found Socket) {
	t.Helper()
	socks, err := m.d.Sockets()
	must(t, err)
	n := 0
	for _, s := range socks {
		if s.Role == role {
			found = s
			n++
		}
	}
	if n != 1 {
		t.Fatalf("%d sockets have the role %s: %+v", n, role, socks)
	}
	return found
}

// listed is what the datapath knows of that socket.
func (m *meshed) listed(t testing.TB, c *net.TCPConn) Socket {
	t.Helper()
	var cookie uint64
	rc, err := c.SyscallConn()
	must(t, err)
	must(t, rc.Control(func(fd uintptr) { cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE) }))
	must(t, err)
	socks, err := m.d.Sockets()
	must(t, err)
	for _, s := range socks {
		if s.Cookie == cookie {
			return s
		}
	}
	t.Fatalf("the socket %d is not listed: %+v", cookie, socks)
	return Socket{}
}

// gone closes a connection and waits until nothing is listed any more.
func (m *meshed) gone(t testing.TB, c net.Conn) {
	t.Helper()
	c.Close()
	eventually(t, "the sockets are gone", func() bool { return len(roles(t, m.d)) == 0 })
}

func TestBlockingClientOfAPodThatOptedInIsAccelerated(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	m.d.Reconciler().SetPods([]Pod{
		{Name: "client", Cookie: m.client.cookie, IPs: []netip.Addr{m.client.v4, m.client.v6}, Enrolled: true, AccelerateBlocking: true},
		{Name: "server", Cookie: m.server.cookie, IPs: []netip.Addr{m.server.v4, m.server.v6}},
	})
	flush(t, m.d)
	families(t, func(t *testing.T, fam family) {
		c, err := fam.dialBlocking(m.client, ap(fam.of(m.server), 8080))
		must(t, err)
		defer c.Close()
		talks(t, c, "b", 1000)
		if got := roles(t, m.d); got["client enrolled redirect"] != 1 || got["server enrolled redirect"] != 1 {
			t.Errorf("sockets: %v", got)
		}
		m.gone(t, c)
	})
}

func TestEndpointElsewhereLeavesTheSecondLegPlain(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	enrol(m.d, m.client) // the server's pod is on another node now
	flush(t, m.d)
	families(t, func(t *testing.T, fam family) {
		c, err := fam.dial(m.client, ap(fam.of(m.server), 8080))
		must(t, err)
		defer c.Close()
		talks(t, c, "b", 1000)
		got := roles(t, m.d)
		if got["client enrolled redirect"] != 1 || got["downstream enrolled redirect"] != 1 || got["upstream plain "] != 1 {
			t.Errorf("sockets: %v", got)
		}
		if s := m.only(t, "upstream"); !strings.Contains(s.Reason, "not a pod of this node") {
			t.Errorf("the reason is %q", s.Reason)
		}
		m.gone(t, c)
	})
}

// The client's first bytes leave before the server's end has seen the handshake's last packet. Order must hold, and
// the client must be an ordinary socket afterwards, not one half in the map.
func TestFirstBytesBeforeThePeerIsEnrolledGoByTCP(t *testing.T) {
	m := newMeshed(t, func(c *Config) { c.AcceleratePods = true })
	m.d.Reconciler().SetClaims(nil)
	flush(t, m.d)
	m.server.server("b", 8080)
	families(t, func(t *testing.T, fam family) {
		before, err := m.d.Counters()
		must(t, err)
		release := m.client.dropBareACKs()
		c, err := fam.dial(m.client, ap(fam.of(m.server), 8080))
		must(t, err)
		defer c.Close()
		if _, err := c.Write([]byte("early")); err != nil {
			t.Fatal(err)
		}
		release()
		if got, err := greeting(c); err != nil || got != "b" {
			t.Fatal(got, err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "early" {
			t.Fatalf("%q, %v", b, err)
		}
		echo(t, c, 10_000)
		got := roles(t, m.d)
		if got["pod-client removed tcp"] != 1 || got["pod-server plain "] != 1 {
			t.Errorf("sockets: %v", got)
		}
		for _, role := range []string{"pod-client", "pod-server"} {
			if s := m.only(t, role); !strings.Contains(s.Reason, "the first bytes left before the other end was enrolled") {
				t.Errorf("the reason of the %s is %q", role, s.Reason)
			}
		}
		if n := countEntries(m.d.objs.pairs()); n != 0 {
			t.Errorf("%d sockets are still in sm_pairs", n)
		}
		after, err := m.d.Counters()
		must(t, err)
		if n := after.Late - before.Late; n != 1 {
			t.Errorf("counted %d late peers", n)
		}
		m.gone(t, c)
	})
}

// dropBareACKs drops TCP segments that the pod sends without payload, but for SYNs, which are longer: the end of its
// handshakes is lost, and the other side is ESTABLISHED only with the first data.
func (n *ns) dropBareACKs() (release func()) {
	return n.dropOnEgress(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, 0, asm.Word), // skb->len
		asm.JEq.Imm(asm.R7, 14+20+32, "shot"),    // IPv4; ARP is shorter
		asm.JNE.Imm(asm.R7, 14+40+32, "ok"),      // IPv6, and neighbour discovery
		asm.LoadAbs(14+6, asm.Byte),              // the next header
		asm.JNE.Imm(asm.R0, unix.IPPROTO_TCP, "ok"),
		asm.Mov.Imm(asm.R0, 2).WithSymbol("shot"), // TC_ACT_SHOT
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("ok"), // TC_ACT_OK
		asm.Return(),
	})
}

// dropOnEgress has a program decide on what the pod sends.
func (n *ns) dropOnEgress(program asm.Instructions) (release func()) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: program})
	must(n.t, err)
	var l link.Link
	n.do(func() {
		eth0, err := netlink.LinkByName("eth0")
		must(n.t, err)
		l, err = link.AttachTCX(link.TCXOptions{Interface: eth0.Attrs().Index, Program: prog, Attach: ebpf.AttachTCXEgress})
		must(n.t, err)
	})
	return func() { l.Close(); prog.Close() }
}

func TestPodsWithoutProxyAreRedirectedWhereAsked(t *testing.T) {
	for _, on := range []bool{true, false} {
		t.Run(fmt.Sprint(on), func(t *testing.T) {
			m := newMeshed(t, func(c *Config) { c.AcceleratePods = on })
			m.d.Reconciler().SetClaims(nil)
			m.server.server("b", 8080)
			families(t, func(t *testing.T, fam family) {
				m.d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(m.server), 8080)))
				flush(t, m.d)
				c, err := fam.dial(m.client, fam.vip)
				must(t, err)
				defer c.Close()
				talks(t, c, "b", 5000)
				got := roles(t, m.d)
				if redirected := got["service enrolled redirect"] == 1 && got["pod-server enrolled redirect"] == 1; redirected != on {
					t.Errorf("sockets: %v", got)
				}
				if c.RemoteAddr().String() != fam.vip.String() {
					t.Errorf("peer is %s", c.RemoteAddr())
				}
				c.Close()
				eventually(t, "the sockets are gone", func() bool { return len(roles(t, m.d)) == 0 })
			})
		})
	}
}

// A client whose sockets are MPTCP's is not redirected, and works; so does a server whose listener is, as Go's are unasked.
func TestMPTCPSocketsWorkUnaccelerated(t *testing.T) {
	m := newMeshed(t)
	m.server.server("b", 8080)
	m.server.do(func() {
		var lc net.ListenConfig
		lc.SetMultipathTCP(true)
		l, err := lc.Listen(context.Background(), "tcp", "[::]:8081")
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					io.WriteString(c, "multi\n")
					io.Copy(onlyWriter{c}, onlyReader{c})
				}()
			}
		}()
	})
	m.d.Reconciler().SetClaims([]mesh.Claim{
		claim(netip.MustParseAddrPort("0.0.0.0:0")), claim(netip.MustParseAddrPort("[::]:0")),
	})
	flush(t, m.d)
	families(t, func(t *testing.T, fam family) {
		before, err := m.d.Counters()
		must(t, err)
		af, sa := fam.sockaddr(ap(fam.of(m.server), 8080))
		c, err := finishConnect(m.client.stream(af, unix.SOCK_NONBLOCK, unix.IPPROTO_MPTCP), sa)
		must(t, err)
		defer c.Close()
		talks(t, c, "b", 1000)
		// The application's own TCP socket has no descriptor and isn't listed.
		if s := m.only(t, "downstream"); s.State != "plain" || !strings.Contains(s.Reason, "the other end could not be enrolled") {
			t.Errorf("the proxy's socket is %+v", s)
		}
		if got := roles(t, m.d); got["upstream enrolled redirect"] != 1 || got["server enrolled redirect"] != 1 {
			t.Errorf("the second leg: %v", got)
		}
		after, err := m.d.Counters()
		must(t, err)
		if n := after.SkippedMptcp - before.SkippedMptcp; n != 1 {
			t.Errorf("counted %d MPTCP sockets", n)
		}
		m.gone(t, c)

		plain, err := fam.dial(m.client, ap(fam.of(m.server), 8081))
		must(t, err)
		defer plain.Close()
		talks(t, plain, "multi", 1000)
		// A client without MPTCP makes an MPTCP listener accept ordinary sockets.
		if got := roles(t, m.d); got["server enrolled redirect"] != 1 {
			t.Errorf("sockets: %v", got)
		}
		m.gone(t, plain)
	})
}
