package node

import (
	"fmt"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// The main job, on clusters whose namespaces and addresses the product has never heard of: a claimed Service goes by
// the routes, the server sees the client pod, and bytes go from socket to socket.
func TestMainJob(t *testing.T) {
	places := map[string]place{
		"v4":        {"default", []string{"192.168.44.0/24"}, []string{"172.30.7.7"}},
		"v6":        {"team-a", []string{"2001:db8:a:b::/64"}, []string{"2001:db8:ffff::7"}},
		"dualstack": anywhere,
	}
	for name, p := range places {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, p)
			w.weights(90, 10)
			for i := range w.shop.ClusterIPs {
				vip, client := w.shop.VIP(i), w.client.Addrs[0]
				v1, v2 := fmt.Sprintf("v1/proxied %s", client), fmt.Sprintf("v2/proxied %s", client)
				w.eventually("the weights 90/10", func() error {
					if c := w.curl(w.client, vip, 1000); c[v1]+c[v2] != 1000 {
						t.Fatalf("answers from elsewhere, or seen from elsewhere: %v", c)
					} else if c[v2] < 60 || c[v2] > 150 {
						return fmt.Errorf("v2 answered %d of 1000", c[v2])
					}
					return nil
				})
				if c := w.curl(w.client, vip, 100, "-H", "x-canary: always"); c[v2] != 100 {
					t.Errorf("x-canary: always was answered by %v; want v2 100", c)
				}
			}
			if s := w.status(); !s.Acceleration.Active || s.Acceleration.RedirectedBytes == 0 {
				t.Errorf("nothing went socket to socket: %+v", s.Acceleration)
			}
			if rules, err := w.ForeignRules(w.ctx); err != nil || len(rules) > 0 {
				t.Errorf("packet filter rules: %q, %v", rules, err)
			}
		})
	}
}

// With acceleration off everything works the same, and no byte is redirected.
func TestMainJobWithoutAcceleration(t *testing.T) {
	w := newWorld(t, anywhere, "--acceleration", "off")
	for i := range w.shop.ClusterIPs {
		c := w.curl(w.client, w.shop.VIP(i), 200)
		if n := c["v1/proxied "+w.client.Addrs[0].String()] + c["v2/proxied "+w.client.Addrs[0].String()]; n != 200 {
			t.Errorf("answers: %v", c)
		}
	}
	if s := w.status(); s.Acceleration.Active || s.Acceleration.RedirectedBytes != 0 {
		t.Errorf("acceleration is off, and yet: %+v", s.Acceleration)
	}
}

// A pod without the label is none of the proxy's business: the kernel balances its Service, and getpeername shows the
// Service's address.
func TestPodThatIsNotEnrolledUsesThePlainService(t *testing.T) {
	w := newWorld(t, anywhere)
	other := w.pod(anywhere, "other", 30, nil)
	before := w.status().Connections
	for i, addr := range other.Addrs {
		vip := w.shop.VIP(i)
		c := w.curl(other, vip, 200, "-H", "Connection: close", "-w", "%{remote_ip}\n")
		one, two := c["v1/direct "+addr.String()], c["v2/direct "+addr.String()]
		if one+two != 200 || one < 50 || two < 50 {
			t.Errorf("answers: %v", c)
		}
		if c[vip.Addr().String()] != 200 {
			t.Errorf("getpeername should show %s 200 times: %v", vip.Addr(), c)
		}
	}
	after := w.status().Connections
	if after.Proxied != before.Proxied || after.Service-before.Service < 400 {
		t.Errorf("counters before %+v, after %+v", before, after)
	}
}

// A plain TCP listener is chosen by weight at connect(), with no proxy on the way; one that must be logged is proxied.
func TestTCPListenersAreOffloadedWhereTheKernelCanDoThem(t *testing.T) {
	w := newBareWorld(t, anywhere)
	tcp := lab.ServiceSpec{Namespace: "shop", Name: "tcp", ClusterIPs: w.shop.ClusterIPs, Port: 81, TargetPort: 8080}
	logged := lab.ServiceSpec{Namespace: "shop", Name: "logged", ClusterIPs: w.shop.ClusterIPs, Port: 82, TargetPort: 8080}
	weights := []lab.Weight{{Cluster: "v1", Weight: 1}, {Cluster: "v2", Weight: 3}}
	w.must(w.WriteXDS("tcp",
		lab.TCPListener("tcp", weights, "", tcp.VIP(0), tcp.VIP(1)),
		lab.TCPListener("logged", weights, w.LogDir()+"/access.log", logged.VIP(0), logged.VIP(1))))
	var err error
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
	w.startAgent()
	w.must(w.WaitStatus(w.ctx, "three listeners", func(s lab.Status) bool { return s.XDS.Resources["listener"] == 3 }))

	check := func(s lab.ServiceSpec, family int, moved func(before, after lab.Status) bool) {
		t.Helper()
		before := w.status()
		c := w.curl(w.client, s.VIP(family), 400, "-H", "Connection: close")
		after := w.status()
		v1, v2 := c["v1/direct "+w.client.Addr4().String()], c["v2/direct "+w.client.Addr4().String()]
		if v1+v2 != 400 || v2 < 240 || v2 > 350 {
			t.Errorf("%s: v2 should have about 300 of 400: %v", s.VIP(family), c)
		}
		if !moved(before, after) {
			t.Errorf("%s: counters before %+v, after %+v", s.VIP(family), before.Connections, after.Connections)
		}
	}
	for family := range w.shop.ClusterIPs {
		check(tcp, family, func(b, a lab.Status) bool {
			return a.Connections.Offloaded-b.Connections.Offloaded >= 400 && a.Connections.Proxied == b.Connections.Proxied
		})
		check(logged, family, func(b, a lab.Status) bool {
			return a.Connections.Proxied-b.Connections.Proxied >= 400 && a.Connections.Offloaded == b.Connections.Offloaded
		})
	}
}
