package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// enrol tells the datapath of pods, all enrolled.
func enrol(d *Datapath, pods ...*ns) {
	var list []Pod
	for i, p := range pods {
		list = append(list, Pod{Namespace: "default", Name: fmt.Sprint("pod", i), Cookie: p.cookie, IPs: []netip.Addr{p.v4, p.v6}, Enrolled: true})
	}
	d.Reconciler().SetPods(list)
}

func claim(addr netip.AddrPort) mesh.Claim {
	return mesh.Claim{Addr: addr, Listener: "l-" + addr.String()}
}

func TestClaimedConnectionReachesTheProxyWithItsOrigin(t *testing.T) {
	w := newWorld(t)
	d := w.open(func(c *Config) { c.OriginalDstSockopt = true })
	client, b, stranger := w.pod(), w.pod(), w.pod()
	b.server("b", 8080)
	p := startProxy(t, d, client)
	enrol(d, client)
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
		d.Reconciler().SetClaims([]mesh.Claim{claim(fam.vip)})
		synced(t, d)
		before := len(p.seen())
		if got, err := fam.ask(client, fam.vip); err != nil || got != "b" {
			t.Fatalf("through the proxy: %q, %v", got, err)
		}
		seen := p.seen()
		if len(seen) != before+1 { // the proxy's own connection, marked, must not come back to it
			t.Fatalf("the proxy accepted %d connections, want 1", len(seen)-before)
		}
		o := p.last()
		if o.addr != fam.vip || o.sockopt != fam.vip {
			t.Errorf("origin %v by storage, %v by getsockopt; want %v", o.addr, o.sockopt, fam.vip)
		}
		if got, err := fam.ask(stranger, fam.vip); err != nil || got != "b" {
			t.Errorf("a pod that isn't enrolled: %q, %v", got, err)
		}
		if n := len(p.seen()); n != before+1 {
			t.Errorf("a pod that isn't enrolled was sent to a proxy")
		}
	})
}

func TestPeerNameOfAProxiedConnectionIsItsOrigin(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	startProxy(t, d, client)
	enrol(d, client)
	families(t, func(t *testing.T, fam family) {
		to := ap(fam.of(b), 8080) // no Service at all
		d.Reconciler().SetClaims([]mesh.Claim{claim(to)})
		synced(t, d)
		var peer string
		if fam.mapped {
			c, err := client.dialMapped(to)
			must(t, err)
			defer c.Close()
			peer = c.RemoteAddr().String()
		} else {
			c, err := client.dial(to)
			must(t, err)
			defer c.Close()
			peer = c.RemoteAddr().String()
		}
		if peer != to.String() {
			t.Errorf("peer %s, want %s", peer, to)
		}
	})
}

func TestMostSpecificClaimWins(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, a, b := w.pod(), w.pod(), w.pod()
	for _, port := range []uint16{80, 81} {
		a.server(fmt.Sprint("a", port), port)
		b.server(fmt.Sprint("b", port), port)
	}
	p := startProxy(t, d, client)
	enrol(d, client)
	offload := func(addr, to netip.AddrPort) mesh.Claim {
		c := claim(addr)
		c.Offload = &mesh.Offload{Clusters: []mesh.OffloadCluster{{Name: "c", Weight: 1, Endpoints: []mesh.OffloadEndpoint{{Addr: to, Weight: 1}}}}}
		return c
	}
	for _, fam := range []family{{"v4", vip4, false}, {"v6", vip6, false}} {
		t.Run(fam.name, func(t *testing.T) {
			anyAddr := netip.IPv4Unspecified()
			if fam.vip.Addr().Is6() {
				anyAddr = netip.IPv6Unspecified()
			}
			exact := ap(fam.of(a), 80)
			step := func(want string, proxied bool, to netip.AddrPort, claims ...mesh.Claim) {
				t.Helper()
				d.Reconciler().SetClaims(claims)
				synced(t, d)
				before := len(p.seen())
				got, err := client.ask(to)
				if err != nil || got != want || (len(p.seen()) > before) != proxied {
					t.Errorf("%v with %d claims: %q, %v, proxied %v; want %q, %v", to, len(claims), got, err, len(p.seen()) > before, want, proxied)
				}
			}
			port80, all := claim(ap(anyAddr, 80)), claim(ap(anyAddr, 0))
			step("b80", false, exact, offload(exact, ap(fam.of(b), 80)), port80, all)
			step("a80", true, exact, port80)
			step("a81", false, ap(fam.of(a), 81), port80)
			step("a81", true, ap(fam.of(a), 81), port80, all)
			step("a80", false, exact)
		})
	}
}

func TestProxyAway(t *testing.T) {
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprintf("fail closed %v", closed), func(t *testing.T) {
			w := newWorld(t)
			d := w.open(func(c *Config) { c.FailClosed = closed })
			client, b := w.pod(), w.pod()
			b.server("b", 8080)
			enrol(d, client)
			families(t, func(t *testing.T, fam family) {
				d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
				d.Reconciler().SetClaims([]mesh.Claim{claim(fam.vip)})
				synced(t, d)
				p := startProxy(t, d, client)
				if got, err := fam.ask(client, fam.vip); err != nil || got != "b" {
					t.Fatalf("with the proxy: %q, %v", got, err)
				}
				p.stop()
				got, err := fam.ask(client, fam.vip)
				if closed && !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("without the proxy: %q, %v; want connection refused", got, err)
				}
				if !closed && (err != nil || got != "b") {
					t.Errorf("without the proxy: %q, %v; want the Service's backend", got, err)
				}
			})
			c, err := d.Counters()
			must(t, err)
			if closed && c.FailClosed != 3 || !closed && c.FailOpen != 3 {
				t.Errorf("counted %+v", c)
			}
		})
	}
}

func TestDialingTheProxyDirectlyHasNoOrigin(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client := w.pod()
	p := startProxy(t, d, client)
	enrol(d, client)
	d.Reconciler().SetClaims([]mesh.Claim{claim(netip.MustParseAddrPort("0.0.0.0:0"))})
	synced(t, d)
	if got, err := client.ask(netip.MustParseAddrPort("127.0.0.1:15001")); err == nil {
		t.Errorf("got %q", got)
	}
	eventually(t, "the proxy sees a connection without origin", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.orphans == 1 && len(p.origins) == 0
	})
	c, err := d.Counters()
	must(t, err)
	if c.OriginMissing != 1 {
		t.Errorf("counted %d connections without origin", c.OriginMissing)
	}
}

func TestOffloadedListenerHonoursWeights(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client := w.pod()
	var pods []*ns
	for _, name := range []string{"v1a", "v1b", "v2"} {
		p := w.pod()
		p.server(name, 8080)
		pods = append(pods, p)
	}
	enrol(d, client)
	families(t, func(t *testing.T, fam family) {
		c := claim(fam.vip)
		c.Offload = &mesh.Offload{Clusters: []mesh.OffloadCluster{
			{Name: "v1", Weight: 80, Endpoints: []mesh.OffloadEndpoint{{Addr: ap(fam.of(pods[0]), 8080), Weight: 3}, {Addr: ap(fam.of(pods[1]), 8080), Weight: 1}}},
			{Name: "v2", Weight: 20, Endpoints: []mesh.OffloadEndpoint{{Addr: ap(fam.of(pods[2]), 8080), Weight: 7}}},
		}}
		d.Reconciler().SetClaims([]mesh.Claim{c})
		synced(t, d)
		const draws = 1000
		got := map[string]int{}
		for range draws {
			name, err := fam.ask(client, fam.vip)
			must(t, err)
			got[name]++
		}
		chi := 0.0
		for name, share := range map[string]float64{"v1a": 0.6, "v1b": 0.2, "v2": 0.2} {
			diff := float64(got[name]) - draws*share
			chi += diff * diff / (draws * share)
		}
		if chi > 25 {
			t.Errorf("%v is not 60:20:20: chi-square %.1f", got, chi)
		}
		c.Offload.Clusters[0].Weight, c.Offload.Clusters[1].Weight = 0, 1
		d.Reconciler().SetClaims([]mesh.Claim{c})
		flush(t, d)
		for range 50 {
			if name, err := fam.ask(client, fam.vip); err != nil || name != "v2" {
				t.Fatalf("weights 0:100: %q, %v", name, err)
			}
		}
	})
}

func TestShareOfAClusterWithoutEndpointsIsRefused(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	enrol(d, client)
	c := claim(vip4)
	c.Offload = &mesh.Offload{Clusters: []mesh.OffloadCluster{
		{Name: "there", Weight: 1, Endpoints: []mesh.OffloadEndpoint{{Addr: ap(b.v4, 8080), Weight: 1}}},
		{Name: "empty", Weight: 1},
	}}
	d.Reconciler().SetClaims([]mesh.Claim{c})
	synced(t, d)
	refused := 0
	for range 200 {
		if _, err := client.ask(vip4); errors.Is(err, syscall.ECONNREFUSED) {
			refused++
		}
	}
	if refused < 60 || refused > 140 {
		t.Errorf("%d of 200 refused, want about half", refused)
	}
}

func TestSocketsThatAreBoundStillConnect(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	p := startProxy(t, d, client)
	enrol(d, client, b)
	d.Reconciler().SetService(svc("web", vip4, ap(b.v4, 8080)))
	d.Reconciler().SetClaims([]mesh.Claim{claim(vip4)})
	synced(t, d)
	source := func(dl *net.Dialer) { dl.LocalAddr = net.TCPAddrFromAddrPort(ap(client.v4, 0)) }
	if got, err := client.ask(vip4, source); err != nil || got != "b" || len(p.seen()) != 1 {
		t.Errorf("bound to the pod's address: %q, %v, %d proxied", got, err, len(p.seen()))
	}
	device := func(dl *net.Dialer) {
		dl.Control = func(_, _ string, rc syscall.RawConn) (err error) {
			if e := rc.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "eth0") }); e != nil {
				return e
			}
			return err
		}
	}
	if got, err := client.ask(vip4, device); err != nil || got != "b" || len(p.seen()) != 1 {
		t.Errorf("bound to a device, which the proxy on loopback isn't reached from: %q, %v, %d proxied", got, err, len(p.seen()))
	}
}
