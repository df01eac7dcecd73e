package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// What clients outside get at the addresses of Services.

// serving is a pod with a TCP and a UDP server that say whom they see.
func serving(p *ns) *ns {
	p.seen(8080)
	p.seenUDP(5353)
	return p
}

// offer serves both protocols at port 30080 of front.
func offer(t testing.TB, d *Datapath, front netip.Addr, e service.External, v4 bool, pods ...*ns) {
	t.Helper()
	family := map[bool]string{true: "4", false: "6"}[v4]
	var tcp, udp []netip.AddrPort
	for _, p := range pods {
		tcp, udp = append(tcp, ap(p.addr(v4), 8080)), append(udp, ap(p.addr(v4), 5353))
	}
	d.Reconciler().SetService(external("tcp"+family, service.TCP, ap(front, 30080), e, tcp...))
	d.Reconciler().SetService(external("udp"+family, service.UDP, ap(front, 30080), e, udp...))
	flush(t, d)
}

// expectSeen asks by both protocols, and compares whom the server saw.
func expectSeen(t testing.TB, client *ns, front, want netip.Addr) {
	t.Helper()
	if got, err := client.askSeen(ap(front, 30080)); err != nil || got.Addr().Unmap() != want {
		t.Errorf("TCP: the server saw %v, %v; want %v", got, err, want)
	}
	if got, err := client.askUDP(ap(front, 30080)); err != nil || got.Addr().Unmap() != want {
		t.Errorf("UDP: the server saw %v, %v; want %v", got, err, want)
	}
}

func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
func isReset(err error) bool   { return errors.Is(err, syscall.ECONNRESET) }

// nodePort is the upstream scenario "functioning NodePort", wherever the backend is and by whatever address the client comes:
// with policy Cluster the server sees the node, with Local the client.
func nodePort(t *testing.T, o *outer, d *Datapath) {
	bridged, routed, remote := serving(o.pod()), serving(o.routed()), serving(o.second())
	serving(o.node)
	host := &ns{v4: node4, v6: node6} // a pod in the node's network has the node's own address
	eventually(t, "the pods' devices have their programs", func() bool {
		served := 0
		for _, dev := range d.Status().Outside.Devices {
			if dev.Mode != "" {
				served++
			}
		}
		return served >= 4
	})
	synced(t, d)
	peer := netip.MustParseAddr("172.30.0.1")
	bothFamilies(t, func(t *testing.T, v4 bool) {
		node := choose(v4, node4, node6)
		bridge := choose(v4, o.node.v4, o.node.v6)
		if !v4 {
			peer = netip.MustParseAddr("fd30::1")
		}
		for _, c := range []struct {
			name    string
			backend *ns
			front   netip.Addr
			local   bool
			want    netip.Addr // invalid: an address of the node, whichever
		}{
			{"Cluster, bridged pod", bridged, node, false, bridge},
			{"Local, bridged pod", bridged, node, true, o.client.addr(v4)},
			{"Cluster, routed pod", routed, node, false, netip.Addr{}},
			{"Local, routed pod", routed, node, true, o.client.addr(v4)},
			{"Cluster, pod of another node", remote, node, false, peer},
			{"Cluster, host network", host, node, false, o.client.addr(v4)},
			{"Cluster, another address of the node", bridged, bridge, false, bridge},
			{"Local, load balancer's address", routed, choose(v4, lb4, lb6), true, o.client.addr(v4)},
			{"Cluster, load balancer's address", remote, choose(v4, lb4, lb6), false, peer},
		} {
			t.Run(c.name, func(t *testing.T) {
				offer(t, d, c.front, service.External{Local: c.local}, v4, c.backend)
				if c.want.IsValid() {
					expectSeen(t, o.client, c.front, c.want)
					return
				}
				got, err := o.client.askSeen(ap(c.front, 30080))
				if err != nil || got.Addr().Unmap() == o.client.addr(v4) {
					t.Errorf("the server saw %v, %v; want an address of the node", got, err)
				}
				if got, err := o.client.askUDP(ap(c.front, 30080)); err != nil || got.Addr().Unmap() == o.client.addr(v4) {
					t.Errorf("UDP: the server saw %v, %v; want an address of the node", got, err)
				}
			})
		}
	})
	o.say(d)
}

func TestFunctioningNodePort(t *testing.T) {
	o := newOuter(t)
	nodePort(t, o, o.open())
}

func TestFunctioningNodePortByClsact(t *testing.T) {
	o := newOuter(t)
	d := o.open(func(c *Config) { c.ForceClsact = true })
	nodePort(t, o, d)
	for _, dev := range d.Status().Outside.Devices {
		if dev.Mode == "tcx" {
			t.Errorf("%+v", dev)
		}
	}
}

func TestClientsOutsideAreRefusedOrLeftWithoutAnswer(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, lb4, lb6)
		to := ap(front, 30080)
		silent := func(what string) {
			t.Helper()
			var ne net.Error
			if _, err := o.client.ask(to, briefly); !errors.As(err, &ne) || !ne.Timeout() {
				t.Errorf("%s, TCP: %v; want no answer", what, err)
			}
			c, err := o.client.dialUDP(to)
			must(t, err)
			defer c.Close()
			c.Write([]byte("hello"))
			c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			if _, err := c.Read(make([]byte, 100)); !errors.As(err, &ne) || !ne.Timeout() {
				t.Errorf("%s, UDP: %v; want no answer", what, err)
			}
		}
		offer(t, d, front, service.External{}, v4)
		if _, err := o.client.ask(to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("no backend, TCP: %v; want connection refused", err)
		}
		if _, err := o.client.askUDP(to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("no backend, UDP: %v; want connection refused", err)
		}
		offer(t, d, front, service.External{Local: true, Silent: true}, v4)
		silent("backends on other nodes")
		mine := netip.PrefixFrom(o.client.addr(v4), o.client.addr(v4).BitLen())
		other := netip.MustParsePrefix(map[bool]string{true: "198.51.100.128/25", false: "2001:db8:2:8000::/49"}[v4])
		offer(t, d, front, service.External{Local: true, Sources: []netip.Prefix{other}}, v4, pod)
		silent("not in the ranges")
		offer(t, d, front, service.External{Local: true, Sources: []netip.Prefix{other, mine}}, v4, pod)
		expectSeen(t, o.client, front, o.client.addr(v4))
	})
	c, err := d.Counters()
	must(t, err)
	if c.OutsideRefused < 4 || c.OutsideSilent < 4 || c.OutsideDenied < 4 {
		t.Errorf("counted %+v", c)
	}
	o.say(d)
}

func TestNodePortAffinity(t *testing.T) {
	o := newOuter(t)
	a, b := o.pod(), o.pod()
	a.server("a", 8080)
	b.server("b", 8080)
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		to := ap(choose(v4, node4, node6), 30080)
		set := func(timeout time.Duration) {
			s := external("tcp", service.TCP, to, service.External{}, ap(a.addr(v4), 8080), ap(b.addr(v4), 8080))
			s.Frontends[0].Affinity = timeout
			d.Reconciler().SetService(s)
			flush(t, d)
		}
		names := func() map[string]int {
			got := map[string]int{}
			for range 30 {
				name, err := o.client.ask(to)
				must(t, err)
				got[name]++
			}
			return got
		}
		set(0)
		if got := names(); len(got) != 2 {
			t.Errorf("without affinity: %v", got)
		}
		set(time.Hour)
		if got := names(); len(got) != 1 {
			t.Errorf("with affinity: %v", got)
		}
		set(time.Second)
		first, err := o.client.ask(to)
		must(t, err)
		// Anew means by chance: one of two, each time.
		for again, draws := first, 0; again == first; draws++ {
			if draws == 20 {
				t.Fatal("the client was never balanced anew after the time-out")
			}
			time.Sleep(2500 * time.Millisecond)
			again, err = o.client.ask(to)
			must(t, err)
		}
	})
}

func TestUDPMovesAndTCPStaysWhenABackendGoes(t *testing.T) {
	o := newOuter(t)
	a, b := serving(o.pod()), serving(o.pod())
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, node4, node6)
		offer(t, d, front, service.External{Local: true}, v4, a)
		tcp, err := o.client.dial(ap(front, 30080))
		must(t, err)
		defer tcp.Close()
		_, err = greeting(tcp)
		must(t, err)
		udp, err := o.client.dialUDP(ap(front, 30080))
		must(t, err)
		defer udp.Close()
		for range 3 {
			_, err = sayHello(udp)
			must(t, err)
		}
		count := func(n *ns) uint64 {
			var total uint64
			e, err := d.Dump("sm_nat")
			must(t, err)
			for _, x := range e {
				if x.Key["backend"] == n.addr(v4).String() && x.Key["proto"] == uint8(17) {
					total++
				}
			}
			return total
		}
		if count(a) != 1 {
			t.Errorf("the UDP flow isn't established with a")
		}
		offer(t, d, front, service.External{Local: true}, v4, b)
		for range 3 {
			if _, err = sayHello(udp); err != nil {
				t.Errorf("the UDP flow after its backend has gone: %v", err)
			}
		}
		if count(a) != 0 || count(b) != 1 {
			t.Errorf("the UDP flow hasn't moved")
		}
		echo(t, tcp, 100_000)
		for _, name := range []string{"tcp4", "udp4", "tcp6", "udp6"} {
			d.Reconciler().DeleteService(service.Name{Namespace: "default", Name: name})
		}
		flush(t, d)
		echo(t, tcp, 1000) // the last frontend has gone, this connection hasn't
	})
	o.say(d)
}

// One socket's port, two frontends, one backend: for the backend and the node's stack these must differ.
func TestOneClientPortToTwoFrontendsOfOneBackend(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		for _, local := range []bool{true, false} {
			one, two := ap(choose(v4, node4, node6), 30080), ap(choose(v4, lb4, lb6), 80)
			d.Reconciler().SetService(external("one", service.TCP, one, service.External{Local: local}, ap(pod.addr(v4), 8080)))
			d.Reconciler().SetService(external("two", service.TCP, two, service.External{Local: local}, ap(pod.addr(v4), 8080)))
			flush(t, d)
			port := 41000
			if local {
				port++
			}
			from := func(d *net.Dialer) {
				d.LocalAddr = net.TCPAddrFromAddrPort(ap(o.client.addr(v4), uint16(port)))
				d.Control = func(_, _ string, rc syscall.RawConn) (err error) {
					if e := rc.Control(func(fd uintptr) {
						err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
					}); e != nil {
						return e
					}
					return err
				}
			}
			var seen []string
			for _, to := range []netip.AddrPort{one, two} {
				c, err := o.client.dial(to, from)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				who, err := greeting(c)
				if err != nil {
					t.Fatal(err)
				}
				seen = append(seen, who)
				echo(t, c, 10_000)
			}
			if seen[0] == seen[1] {
				t.Errorf("the pod saw %v twice", seen[0])
			}
		}
	})
	o.say(d)
}

func TestClientOnThePodsBridge(t *testing.T) {
	o := newOuter(t)
	pod, client := serving(o.pod()), o.pod()
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		for _, local := range []bool{false, true} {
			front := choose(v4, lb4, lb6)
			offer(t, d, front, service.External{Local: local}, v4, pod)
			// With the client's own address the pod would answer past the node.
			expectSeen(t, client, front, o.node.addr(v4))
		}
	})
	if t.Failed() {
		fmt.Println(d.Status().Outside)
	}
	o.say(d)
}

// A process of the host listens on the node port's number: from outside the Service has it (pkg/hostports finds the process,
// and the agent tells on the Service), and the process has it again when the Service goes.
func TestServiceHasItsNodePortBeforeASocketOfTheHost(t *testing.T) {
	o := newOuter(t)
	pod := serving(o.pod())
	o.node.server("host", 30080)
	o.node.seenUDP(30080)
	d := o.open()
	synced(t, d)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, node4, node6)
		to := ap(front, 30080)
		if name, err := o.client.ask(to); err != nil || name != "host" {
			t.Errorf("before the Service: %q, %v", name, err)
		}
		for _, local := range []bool{false, true} {
			offer(t, d, front, service.External{Local: local}, v4, pod)
			expectSeen(t, o.client, front, choose(local, o.client.addr(v4), o.node.addr(v4)))
		}
		offer(t, d, front, service.External{}, v4) // without a backend it's the Service that refuses
		if _, err := o.client.ask(to); !isRefused(err) {
			t.Errorf("without a backend: %v; want connection refused", err)
		}
		for _, name := range []string{"tcp4", "udp4", "tcp6", "udp6"} {
			d.Reconciler().DeleteService(service.Name{Namespace: "default", Name: name})
		}
		flush(t, d)
		if name, err := o.client.ask(to); err != nil || name != "host" {
			t.Errorf("after the Service: %q, %v", name, err)
		}
		if _, err := o.client.askUDP(to); err != nil {
			t.Errorf("after the Service, UDP: %v", err)
		}
	})
	o.say(d)
}
