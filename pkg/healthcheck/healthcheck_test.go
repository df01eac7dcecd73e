package healthcheck

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/service"
)

var (
	quiet    = slog.New(slog.DiscardHandler)
	web      = service.Name{Namespace: "shop", Name: "web"}
	loopback = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}
)

// world is a running Services, and what it said of ports that failed.
type world struct {
	*Services
	healthy atomic.Bool

	mu     sync.Mutex
	failed map[service.Name]string
}

func start(t *testing.T) *world {
	t.Helper()
	w := &world{}
	w.healthy.Store(true)
	w.Services = NewServices(ServicesConfig{Healthy: w.healthy.Load, Logger: quiet, Failed: func(m map[service.Name]string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.failed = maps.Clone(m)
	}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

func (w *world) failure(name service.Name) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed[name]
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not seen: " + what)
		}
	}
}

// freePort is free on both families now.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

var client = http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// ask gives "200 2 true": status, local endpoints and health; "" while nobody listens.
func ask(ip netip.Addr, port uint16) string {
	r, err := client.Get("http://" + netip.AddrPortFrom(ip, port).String())
	if err != nil {
		return ""
	}
	defer r.Body.Close()
	var body struct {
		Service             struct{ Namespace, Name string }
		LocalEndpoints      int
		ServiceProxyHealthy bool
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		return err.Error()
	}
	if got := r.Header.Get("X-Load-Balancing-Endpoint-Weight"); got != fmt.Sprint(body.LocalEndpoints) || r.Header.Get("Content-Type") != "application/json" {
		return fmt.Sprint("headers ", r.Header)
	}
	return fmt.Sprint(body.Service.Namespace, "/", body.Service.Name, " ", r.StatusCode, " ", body.LocalEndpoints, " ", body.ServiceProxyHealthy)
}

func TestEachFamilyIsToldItsOwnLocalEndpoints(t *testing.T) {
	w, port := start(t), freePort(t)
	w.Set(web, &service.HealthCheck{Port: port, Addresses: loopback, LocalReady4: 2})
	eventually(t, "the port open on both families", func() bool {
		return ask(loopback[0], port) == "shop/web 200 2 true" && ask(loopback[1], port) == "shop/web 503 0 true"
	})
	w.Set(web, &service.HealthCheck{Port: port, Addresses: loopback, LocalReady6: 1})
	if four, six := ask(loopback[0], port), ask(loopback[1], port); four != "shop/web 503 0 true" || six != "shop/web 200 1 true" {
		t.Errorf("after the endpoints changed: %q, %q", four, six)
	}
	w.healthy.Store(false)
	if six := ask(loopback[1], port); six != "shop/web 503 1 false" {
		t.Errorf("while the data plane does not serve: %q", six)
	}
	w.Set(web, nil)
	eventually(t, "the port closed", func() bool { return ask(loopback[0], port) == "" && ask(loopback[1], port) == "" })
}

func TestAPortMovesWithItsServiceAndItsAddresses(t *testing.T) {
	w, port, other := start(t), freePort(t), freePort(t)
	w.Set(web, &service.HealthCheck{Port: port, Addresses: loopback[:1], LocalReady4: 1})
	eventually(t, "open", func() bool { return ask(loopback[0], port) == "shop/web 200 1 true" })
	w.Set(web, &service.HealthCheck{Port: other, Addresses: loopback, LocalReady4: 1})
	eventually(t, "the new port open", func() bool {
		return ask(loopback[0], other) == "shop/web 200 1 true" && ask(loopback[1], other) != "" && ask(loopback[0], port) == ""
	})
	api := service.Name{Namespace: "shop", Name: "api"}
	w.Set(web, nil)
	w.Set(api, &service.HealthCheck{Port: other, Addresses: loopback, LocalReady4: 3})
	eventually(t, "the port with the other Service", func() bool { return ask(loopback[0], other) == "shop/api 200 3 true" })
	if addrs, problem := w.Open(api); len(addrs) != 2 || problem != "" {
		t.Errorf("open on %v, problem %q", addrs, problem)
	}
}

func TestAPortInUseIsSaidAndTakenWhenItIsFree(t *testing.T) {
	w := start(t)
	held, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	port := uint16(held.Addr().(*net.TCPAddr).Port)
	w.Set(web, &service.HealthCheck{Port: port, Addresses: loopback[:1], LocalReady4: 1})
	eventually(t, "the failure", func() bool { return strings.Contains(w.failure(web), "address already in use") })
	if why := w.failure(web); !strings.Contains(why, fmt.Sprintf("health-check port %d can't be served on 127.0.0.1", port)) || !strings.Contains(why, "give the Service another") {
		t.Errorf("it says %q", why)
	}
	held.Close()
	eventually(t, "the port, after it was free", func() bool { return ask(loopback[0], port) == "shop/web 200 1 true" && w.failure(web) == "" })
}

func TestTwoServicesWithOnePortAreTold(t *testing.T) {
	w, port, api := start(t), freePort(t), service.Name{Namespace: "shop", Name: "api"}
	w.Set(web, &service.HealthCheck{Port: port, Addresses: loopback[:1], LocalReady4: 1})
	w.Set(api, &service.HealthCheck{Port: port, Addresses: loopback[:1], LocalReady4: 1})
	eventually(t, "the first by name has it", func() bool {
		return ask(loopback[0], port) == "shop/api 200 1 true" && strings.Contains(w.failure(web), "Service shop/api too")
	})
}

func TestTwoAgentsCanHaveAPortAtAnUpgrade(t *testing.T) {
	old, port := start(t), freePort(t)
	check := &service.HealthCheck{Port: port, Addresses: loopback[:1], LocalReady4: 1}
	old.Set(web, check)
	eventually(t, "the old one's", func() bool { return ask(loopback[0], port) != "" })
	next := start(t)
	next.Set(web, check)
	eventually(t, "the new one's", func() bool { addrs, _ := next.Open(web); return len(addrs) == 1 })
	old.Close()
	for range 20 {
		if got := ask(loopback[0], port); got != "shop/web 200 1 true" {
			t.Fatalf("after the old one has gone: %q", got)
		}
	}
}

func TestIdleConnectionsDoNotKeepLoadBalancersOut(t *testing.T) {
	w, port := start(t), freePort(t)
	w.Set(web, &service.HealthCheck{Port: port, Addresses: loopback[:1], LocalReady4: 1})
	eventually(t, "open", func() bool { return ask(loopback[0], port) != "" })
	for range 2 * maxConnections {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	eventually(t, "an answer again, once those that ask nothing are thrown out", func() bool { return ask(loopback[0], port) == "shop/web 200 1 true" })
}

func TestTheNodesHealthFollowsDataPlaneAndNode(t *testing.T) {
	var healthy, eligible atomic.Bool
	updated := time.Now().Add(-time.Hour).Truncate(time.Second)
	port := freePort(t)
	n := NewNode(NodeConfig{Address: fmt.Sprintf(":%d", port), Healthy: func() (bool, time.Time) { return healthy.Load(), updated }, Eligible: eligible.Load, Logger: quiet})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	get := func(ip netip.Addr, path string) (int, nodeHealth, string) {
		r, err := client.Get("http://" + netip.AddrPortFrom(ip, port).String() + path)
		if err != nil {
			return 0, nodeHealth{}, ""
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		var h nodeHealth
		if err := json.Unmarshal(body, &h); err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		return r.StatusCode, h, string(body)
	}
	eventually(t, "both families", func() bool {
		four, _, _ := get(loopback[0], "/livez")
		six, _, _ := get(loopback[1], "/livez")
		return four != 0 && six != 0
	})
	for _, tt := range []struct{ healthy, eligible, healthz, livez bool }{
		{false, false, false, false}, {true, false, false, true}, {true, true, true, true}, {false, true, false, false},
	} {
		healthy.Store(tt.healthy)
		eligible.Store(tt.eligible)
		want := map[bool]int{true: 200, false: 503}
		code, h, body := get(loopback[0], "/healthz")
		if code != want[tt.healthz] || h.NodeEligible == nil || *h.NodeEligible != tt.eligible || h.Healthy != tt.healthy || h.Status["IPv6"].Healthy != tt.healthy {
			t.Errorf("%+v: /healthz %d %s", tt, code, body)
		}
		if recent := h.LastUpdated.After(updated); recent != tt.healthz {
			t.Errorf("%+v: /healthz says it was last updated %s", tt, h.LastUpdated)
		}
		if code, h, body := get(loopback[1], "/livez"); code != want[tt.livez] || h.NodeEligible != nil {
			t.Errorf("%+v: /livez %d %s", tt, code, body)
		}
	}
}

func TestTheNodesHealthWaitsForAKubeProxyToEnd(t *testing.T) {
	held, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	n := NewNode(NodeConfig{Address: held.Addr().String(), Healthy: func() (bool, time.Time) { return true, time.Time{} }, Eligible: func() bool { return true }, Logger: quiet})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	eventually(t, "that the port is taken", func() bool { _, why := n.Addr(); return strings.Contains(why, "in use") })
	held.Close()
	eventually(t, "the port, once it is free", func() bool { addr, why := n.Addr(); return addr != nil && why == "" })
}

// An agent that was replaced lets go of the ports, and has them again when it is in charge again.
func TestPortsAreLetGoAndTakenBack(t *testing.T) {
	w := start(t)
	port, nodePort := freePort(t), freePort(t)
	w.Set(web, &service.HealthCheck{Port: port, Addresses: loopback, LocalReady4: 1})
	n := NewNode(NodeConfig{Address: fmt.Sprintf("127.0.0.1:%d", nodePort), Healthy: func() (bool, time.Time) { return true, time.Time{} }, Eligible: func() bool { return true }, Logger: quiet})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	serves := func(port uint16) bool {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	for range 3 {
		eventually(t, "both serve", func() bool { return serves(port) && serves(nodePort) })
		w.Close()
		n.Close()
		eventually(t, "nobody listens", func() bool { return !serves(port) && !serves(nodePort) })
		w.Reopen()
		n.Reopen()
		w.Reopen() // twice does no harm
		n.Reopen()
	}
	eventually(t, "both serve again", func() bool { return serves(port) && serves(nodePort) })
}
