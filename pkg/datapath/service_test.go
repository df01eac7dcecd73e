package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
)

// families runs a test for IPv4, for IPv6, and for IPv4 addresses on IPv6 sockets.
func families(t *testing.T, f func(t *testing.T, fam family)) {
	for _, fam := range []family{{"v4", vip4, false}, {"v6", vip6, false}, {"mapped", vip4, true}} {
		t.Run(fam.name, func(t *testing.T) { f(t, fam) })
	}
}

type family struct {
	name   string
	vip    netip.AddrPort
	mapped bool
}

func (f family) of(n *ns) netip.Addr {
	if f.vip.Addr().Is6() {
		return n.v6
	}
	return n.v4
}

func (f family) ask(n *ns, to netip.AddrPort) (string, error) {
	if !f.mapped {
		return n.ask(to)
	}
	c, err := n.dialMapped(to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return greeting(c)
}

func TestServiceSpreadsConnectionsEvenly(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client := w.pod()
	const n = 5
	var backends []*ns
	for i := range n {
		p := w.pod()
		p.server(fmt.Sprint("b", i), 8080)
		backends = append(backends, p)
	}
	families(t, func(t *testing.T, fam family) {
		var addrs []netip.AddrPort
		for _, b := range backends {
			addrs = append(addrs, ap(fam.of(b), 8080))
		}
		d.Reconciler().SetService(svc("web", fam.vip, addrs...))
		synced(t, d)
		const draws = 1000
		got := map[string]int{}
		for range draws {
			name, err := fam.ask(client, fam.vip)
			must(t, err)
			got[name]++
		}
		chi := 0.0
		for i := range n {
			diff := float64(got[fmt.Sprint("b", i)]) - draws/n
			chi += diff * diff / (draws / n)
		}
		if chi > 30 { // 4 degrees of freedom: a fair draw exceeds this once in 200,000 runs
			t.Errorf("%v is not a fair draw: chi-square %.1f", got, chi)
		}
	})
	c, err := d.Counters()
	must(t, err)
	if c.Service != 3000 {
		t.Errorf("counted %d Service connections, want 3000", c.Service)
	}
}

func TestServiceWithoutBackendsRefusesAtOnce(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client := w.pod()
	d.Reconciler().SetService(svc("four", vip4))
	d.Reconciler().SetService(svc("six", vip6))
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		if _, err := fam.ask(client, fam.vip); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want connection refused", err)
		}
	})
}

func TestServiceFollowsItsEndpoints(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, a, b := w.pod(), w.pod(), w.pod()
	a.server("a", 8080)
	b.server("b", 8080)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		seen := func() map[string]bool {
			got := map[string]bool{}
			for range 40 {
				name, err := fam.ask(client, fam.vip)
				must(t, err)
				got[name] = true
			}
			return got
		}
		both := svc("web", fam.vip, ap(fam.of(a), 8080), ap(fam.of(b), 8080))
		d.Reconciler().SetService(both)
		flush(t, d)
		if got := seen(); !got["a"] || !got["b"] {
			t.Errorf("two endpoints: saw %v", got)
		}
		d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
		flush(t, d)
		if got := seen(); got["a"] || !got["b"] {
			t.Errorf("one endpoint left: saw %v", got)
		}
		d.Reconciler().SetService(svc("web", fam.vip))
		flush(t, d)
		if _, err := fam.ask(client, fam.vip); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("no endpoint left: %v", err)
		}
		d.Reconciler().DeleteService(both.Name)
		flush(t, d)
	})
	for _, name := range []string{"sm_frontends", "sm_slots", "sm_backends"} {
		if e, err := d.Dump(name); err != nil || len(e) > 0 {
			t.Errorf("%s after the Service is gone: %v %v", name, e, err)
		}
	}
}

func TestPeerNameIsTheServiceAddress(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	synced(t, d)
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
		flush(t, d)
		dial := func(n *ns) (netip.AddrPort, error) {
			if fam.mapped {
				c, err := n.dialMapped(fam.vip)
				if err != nil {
					return netip.AddrPort{}, err
				}
				defer c.Close()
				return netip.ParseAddrPort(c.RemoteAddr().String())
			}
			c, err := n.dial(fam.vip)
			if err != nil {
				return netip.AddrPort{}, err
			}
			defer c.Close()
			return netip.ParseAddrPort(c.RemoteAddr().String())
		}
		for name, n := range map[string]*ns{"pod": client, "host process": w.node} {
			if peer, err := dial(n); err != nil || peer != fam.vip {
				t.Errorf("%s sees peer %v, %v; want %v", name, peer, err, fam.vip)
			}
		}
	})
}

func TestSameAddressOfTwoServicesGoesToTheFirstByName(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, a, b := w.pod(), w.pod(), w.pod()
	a.server("a", 8080)
	b.server("b", 8080)
	first, second := svc("aaa", vip4, ap(a.v4, 8080)), svc("bbb", vip4, ap(b.v4, 8080))
	expect := func(want string) {
		t.Helper()
		flush(t, d)
		if got, err := client.ask(vip4); err != nil || got != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
	r := d.Reconciler()
	r.SetService(second)
	synced(t, d)
	expect("b")
	r.SetService(first)
	expect("a")
	if e := d.Status().Reconciler.Errors; len(e) != 1 || e[0].Name != "default/bbb" {
		t.Errorf("status says %+v, want that default/bbb comes second", e)
	}
	r.DeleteService(first.Name)
	expect("b")
}

func TestUnrelatedConnectionsAreLeftAlone(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	synced(t, d)
	c, err := client.dial(ap(b.v4, 8080))
	must(t, err)
	defer c.Close()
	if got := c.RemoteAddr().String(); got != ap(b.v4, 8080).String() {
		t.Errorf("peer %s", got)
	}
	socks, err := d.Sockets()
	must(t, err)
	if len(socks) != 0 {
		t.Errorf("the datapath keeps state for a connection that isn't its own: %+v", socks)
	}
}

func TestIPv6EndpointOfAnIPv4AddressIsReportedAndLeftOut(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	b := w.pod()
	d.Reconciler().SetService(svc("odd", vip4, ap(b.v6, 8080)))
	if err := d.Reconciler().Flush(t.Context()); err == nil {
		t.Fatal("no error")
	}
	e := d.Status().Reconciler.Errors
	if len(e) != 1 || e[0].Kind != "frontend" || e[0].Name != "default/odd" {
		t.Errorf("status says %+v", e)
	}
}
