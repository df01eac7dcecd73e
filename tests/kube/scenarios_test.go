package kube

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Upstream's end-to-end scenarios that no other file here has, under their own names.
//
//	should serve a basic endpoint from pods                              TestBasicEndpoints
//	should serve multiport endpoints from pods                           TestMultiportEndpoints
//	should serve endpoints on same port and different protocols          TestSamePortAndDifferentProtocols
//	should be able to up and down services                               TestUpAndDownServices
//	should be rejected when no endpoints exist                           TestRejectedWhenNoEndpointsExist
//	should be rejected for evicted pods (no endpoints exist)             TestConnectionsToEvictedPodsAreRejected
//	should have session affinity (timeout) work; should be able to
//	  switch session affinity, for ClusterIP and NodePort                TestSessionAffinity
//	should fallback to (local) terminating endpoints …                   TestFallbackToTerminatingEndpoints
//	should work after the service has been recreated                     TestEveryChangeOfTypeReachesSockets
//	should work after the service proxy is restarted                     TestServicesWorkAfterTheProxyWasKilled
//	should work after restarting apiserver                               TestServicesWorkWhileTheAPIServerIsAway
//	should preserve UDP traffic when initial unready endpoints get ready TestUDPIsPreservedWhenUnreadyEndpointsGetReady
//	should be able to preserve UDP traffic when server pod cycles        TestUDPIsPreservedWhenServerPodsCycle

func withUDP(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP }

func withNodePort(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort }

// udpServer answers every datagram with the name, on both families, from within a pod.
func (n *realNode) udpServer(p *lab.Pod, name string, port int) {
	n.t.Helper()
	var c net.PacketConn
	n.must(p.Do(func() (err error) {
		c, err = net.ListenPacket("udp", fmt.Sprintf("[::]:%d", port))
		return err
	}))
	n.t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(name+"\n"), from)
		}
	}()
}

func (n *realNode) delete(service string) {
	n.t.Helper()
	n.must(n.admin.CoreV1().Services(n.namespace).Delete(n.ctx, service, metav1.DeleteOptions{}))
}

func TestBasicEndpoints(t *testing.T) {
	n := newNode(t)
	a, b := n.server("a", 21, 8080), n.server("b", 22, 8080)
	web := vips(n.service("web"))
	n.answers("no endpoints", n.client.Run, web, refused)
	for _, step := range []struct {
		pods []*lab.Pod
		want string
	}{{[]*lab.Pod{a}, "a"}, {[]*lab.Pod{a, b}, "a b"}, {[]*lab.Pod{b}, "b"}, {nil, refused}} {
		n.endpoints("web", "web", tcp("", 8080), step.pods)
		n.answers(fmt.Sprint(len(step.pods), " endpoints"), n.client.Run, web, step.want)
		n.answers(fmt.Sprint(len(step.pods), " endpoints, from the host"), n.lab.Node.Run, web, step.want)
	}
}

func TestUpAndDownServices(t *testing.T) {
	n := newNode(t)
	a, b, c := n.server("a", 21, 8080), n.server("b", 22, 8080), n.server("c", 23, 8080)
	up := func(name string, pods ...*lab.Pod) []string {
		s := n.service(name)
		n.endpoints(name, name, tcp("", 8080), pods)
		return vips(s)
	}
	first, second := up("first", a), up("second", b)
	n.answers("the first is up", n.client.Run, first, "a")
	n.answers("the second is up", n.client.Run, second, "b")
	n.delete("first")
	n.answers("the first is down", n.client.Run, first, nowhere)
	n.answers("the second is untouched", n.client.Run, second, "b")
	third := up("third", c)
	n.answers("the third is up", n.client.Run, third, "c")
	n.answers("the second is untouched still", n.client.Run, second, "b")
}

// Twelve ports: there is no number from which on ports would be left out.
func TestMultiportEndpoints(t *testing.T) {
	n := newNode(t)
	a, b := n.addPod("a", 21), n.addPod("b", 22)
	const ports = 12
	number := func(i int) int32 { return int32(8080 + i) }
	name := func(i int) string { return fmt.Sprint("p", i) }
	for pod, p := range map[string]*lab.Pod{"a": a, "b": b} {
		for i := range ports {
			_, err := p.StartNginx(n.ctx, uint16(number(i)), fmt.Sprintf("location / { return 200 %q; }", fmt.Sprint(pod, i)))
			n.must(err)
		}
	}
	s := n.service("multi", func(s *corev1.Service) {
		s.Spec.Ports = nil
		for i := range ports {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: name(i), Port: int32(80 + i)})
		}
	})
	port := func(i int) []string { return at(s.Spec.ClusterIPs, int32(80+i)) }
	n.endpoints("multi", "multi-0", tcp(name(0), number(0)), []*lab.Pod{a})
	n.answers("one port", n.client.Run, port(0), "a0")
	n.answers("another has no endpoints yet", n.client.Run, port(1), refused)
	for i := 1; i < ports; i++ {
		n.endpoints("multi", fmt.Sprint("multi-", i), tcp(name(i), number(i)), []*lab.Pod{a, b})
	}
	for i := 1; i < ports; i++ {
		n.answers(name(i), n.client.Run, port(i), fmt.Sprintf("a%d b%d", i, i))
	}
	n.answers("the first port is untouched", n.client.Run, port(0), "a0")
}

func TestSamePortAndDifferentProtocols(t *testing.T) {
	n := newNode(t)
	a, b := n.server("web", 21, 8080), n.addPod("dns", 22)
	n.udpServer(b, "dns", 8080)
	s := n.service("both", func(s *corev1.Service) {
		s.Spec.Ports = []corev1.ServicePort{{Name: "t", Port: 80}, {Name: "u", Port: 80, Protocol: corev1.ProtocolUDP}}
	})
	n.endpoints("both", "t", tcp("t", 8080), []*lab.Pod{a})
	n.answers("TCP alone has endpoints", n.client.Run, vips(s), "web")
	n.answersUDP("UDP has none", n.client.Run, vips(s), refused)
	n.endpoints("both", "u", udp("u", 8080), []*lab.Pod{b})
	n.answers("TCP", n.client.Run, vips(s), "web")
	n.answersUDP("UDP", n.client.Run, vips(s), "dns")
	n.patch("both", `{"spec":{"ports":[{"name":"u","port":80,"protocol":"UDP"}]}}`)
	n.answers("TCP was taken away", n.client.Run, vips(s), nowhere)
	n.answersUDP("UDP stays", n.client.Run, vips(s), "dns")
	n.patch("both", `{"spec":{"ports":[{"name":"t","port":80,"protocol":"TCP"}]}}`)
	n.answers("TCP came back", n.client.Run, vips(s), "web")
	n.answersUDP("UDP was taken away", n.client.Run, vips(s), silence) // an ICMP error of the network is none to a UDP socket
}

func TestRejectedWhenNoEndpointsExist(t *testing.T) {
	n := newNode(t)
	balancers, externals := []string{"203.0.113.70", "2001:db8::70"}, []string{"198.51.100.70", "2001:db8:1::70"}
	for _, udp := range []bool{false, true} {
		name, try := "web", n.answers
		kind := []func(*corev1.Service){func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalIPs = corev1.ServiceTypeLoadBalancer, externals
		}}
		if udp {
			name, try, kind = "dns", n.answersUDP, append(kind, withUDP)
		}
		s := n.service(name, kind...)
		n.setIngress(name, corev1.LoadBalancerIPModeVIP, balancers...)
		for what, addrs := range map[string][]string{
			"cluster IP": vips(s), "node port": nodePorts(s), "load balancer": at(balancers, 80), "external IP": at(externals, 80),
		} {
			try(name+": "+what+", from a pod", n.client.Run, addrs, refused)
			try(name+": "+what+", from the host", n.lab.Node.Run, addrs, refused)
			if what != "cluster IP" {
				try(name+": "+what+", from outside", n.outside, addrs, refused)
			}
		}
		n.delete(name)
	}
}

func TestConnectionsToEvictedPodsAreRejected(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web", withNodePort)
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	n.answers("it runs", n.client.Run, vips(s), "a")
	// The controller takes an evicted pod out of the slice, which stays.
	n.endpoints("web", "web", tcp("", 8080), nil)
	n.answers("it is evicted", n.client.Run, vips(s), refused)
	n.answers("it is evicted: node port", n.outside, nodePorts(s), refused)
}

// spread counts who answers one client in many connections, one after the other.
func (n *realNode) spread(who from, addr string) map[string]int {
	all := map[string]int{}
	for range 24 { // without affinity one of two endpoints is missed by chance once in 2^23
		all[get(n.ctx, who, addr)]++
	}
	return all
}

func TestSessionAffinity(t *testing.T) {
	n := newNode(t)
	both := []*lab.Pod{n.server("a", 21, 8080), n.server("b", 22, 8080)}
	s := n.service("web", withNodePort)
	n.endpoints("web", "web", tcp("", 8080), both)
	n.answers("no affinity", n.client.Run, vips(s), "a b")
	affinity := func(seconds int64) {
		t.Helper()
		patch := `{"spec":{"sessionAffinity":"None"}}`
		if seconds > 0 {
			patch = fmt.Sprintf(`{"spec":{"sessionAffinity":"ClientIP","sessionAffinityConfig":{"clientIP":{"timeoutSeconds":%d}}}}`, seconds)
		}
		n.patch("web", patch)
		n.says("the affinity", "web", func(s api.Service) bool {
			return len(s.Frontends) > 0 && !slices.ContainsFunc(s.Frontends, func(f api.Frontend) bool { return f.AffinitySeconds != seconds })
		})
	}
	ways := map[string]struct {
		who   from
		addrs []string
	}{
		"cluster IP": {n.client.Run, vips(s)}, "node port": {n.client.Run, nodePorts(s)}, "node port, from outside": {n.outside, nodePorts(s)},
	}
	affinity(10800)
	for what, w := range ways {
		for _, addr := range w.addrs {
			if got := n.spread(w.who, addr); len(got) != 1 || got[refused]+got[silence] > 0 {
				t.Errorf("affinity on, %s %s: one client is answered by %v", what, addr, got)
			}
		}
	}
	affinity(0)
	for what, w := range ways {
		for _, addr := range w.addrs {
			if got := n.spread(w.who, addr); got["a"] == 0 || got["b"] == 0 {
				t.Errorf("affinity switched off, %s %s: one client is answered by %v", what, addr, got)
			}
		}
	}
	// After each pause that is longer than the time-out the client is drawn anew; within it, it stays.
	affinity(1)
	for what, w := range ways {
		n.eventually(what+": another endpoint after the time-out", func() bool {
			seen := map[string]bool{}
			for range 6 { // by chance the same each time: once in 2^5, and then again
				seen[get(n.ctx, w.who, w.addrs[0])] = true
				if len(seen) > 1 {
					return true
				}
				time.Sleep(2500 * time.Millisecond)
			}
			return false
		})
	}
}

// What happens to the four kinds of clients when endpoints terminate: the policy, internal or external, decides for which
// endpoints it is asked whether any is ready.
func TestFallbackToTerminatingEndpoints(t *testing.T) {
	n := newNode(t)
	here, there := n.server("here", 21, 8080), n.server("there", 22, 8080)
	s := n.service("web", withNodePort)
	// state of an endpoint: + ready, - terminating and serving.
	endpoints := func(states string) {
		t.Helper()
		n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{here, there}, func(i int, e *discoveryv1.Endpoint) {
			ready := states[i] == '+'
			e.NodeName = new([]string{nodeName, "node-2"}[i])
			e.Conditions = discoveryv1.EndpointConditions{Ready: &ready, Serving: new(true), Terminating: new(!ready)}
		})
	}
	for _, step := range []struct{ internal, external, states, inside, outside string }{
		{"Cluster", "Cluster", "++", "here there", "here there"},
		{"Cluster", "Cluster", "-+", "there", "there"},
		{"Cluster", "Cluster", "--", "here there", "here there"},
		{"Local", "Local", "++", "here", "here"},
		{"Local", "Local", "-+", "here", "here"}, // no local one is ready
		{"Local", "Local", "--", "here", "here"},
		{"Local", "Cluster", "-+", "here", "there"},
		{"Cluster", "Local", "-+", "there", "here"},
	} {
		n.patch("web", fmt.Sprintf(`{"spec":{"internalTrafficPolicy":%q,"externalTrafficPolicy":%q}}`, step.internal, step.external))
		endpoints(step.states)
		what := fmt.Sprintf("internal %s, external %s, endpoints %s", step.internal, step.external, step.states)
		n.answers(what+": cluster IP", n.client.Run, vips(s), step.inside)
		n.answers(what+": node port from outside", n.outside, nodePorts(s), step.outside)
		// A client inside uses all endpoints at a node port, whatever the external policy says.
		all := map[byte]string{'+': "here there", '-': "there"}[step.states[0]]
		if step.states == "--" {
			all = "here there"
		}
		n.answers(what+": node port from a pod", n.client.Run, nodePorts(s), all)
	}
}

func TestServicesWorkAfterTheProxyWasKilled(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	n.udpServer(a, "u", 5353)
	web, dns := n.service("web"), n.service("dns", withUDP)
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	n.endpoints("dns", "dns", udp("", 5353), []*lab.Pod{a})
	look := func(when string) {
		t.Helper()
		n.answers(when, n.client.Run, vips(web), "a")
		n.answersUDP(when, n.client.Run, vips(dns), "u")
	}
	look("before")
	n.proc.Kill()
	<-n.proc.Done()
	look("while there is no agent")
	n.start()
	look("with the next agent")
	n.delete("web")
	n.answers("the next agent follows changes", n.client.Run, vips(web), nowhere)
	n.answersUDP("and keeps what did not change", n.client.Run, vips(dns), "u")
}

func TestServicesWorkWhileTheAPIServerIsAway(t *testing.T) {
	n := newNode(t)
	a, b := n.server("a", 21, 8080), n.server("b", 22, 8080)
	web := n.service("web")
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	n.answers("before", n.client.Run, vips(web), "a")
	cluster.main.Kill()
	n.answers("away", n.client.Run, vips(web), "a")
	n.proc.Kill()
	<-n.proc.Done()
	n.answers("and the agent away, too", n.client.Run, vips(web), "a")
	n.must(n.startUnready())
	n.answers("an agent that can't reach it", n.client.Run, vips(web), "a")
	n.must(cluster.main.Start())
	n.answers("it is back", n.client.Run, vips(web), "a")
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{b})
	n.answers("and is followed again", n.client.Run, vips(web), "b")
}

func TestUDPIsPreservedWhenUnreadyEndpointsGetReady(t *testing.T) {
	n := newNode(t)
	a := n.addPod("a", 21)
	n.udpServer(a, "u", 5353)
	dns := n.service("dns", withUDP)
	n.endpoints("dns", "dns", udp("", 5353), []*lab.Pod{a}, func(_ int, e *discoveryv1.Endpoint) { e.Conditions.Ready = new(false) })
	n.answersUDP("unready", n.client.Run, vips(dns), refused)
	n.endpoints("dns", "dns", udp("", 5353), []*lab.Pod{a})
	n.answersUDP("ready", n.client.Run, vips(dns), "u")
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		for _, addr := range vips(dns) {
			if got := ask(n.ctx, n.client.Run, addr); got != "u" {
				t.Fatalf("a datagram was lost after the endpoint got ready: %q", got)
			}
		}
	}
}

// A client outside that sends from one port all its life, as upstream's does, finds the pod that takes the place of another.
// Inside, tests/node does the same with DNS.
func TestUDPIsPreservedWhenServerPodsCycle(t *testing.T) {
	n := newNode(t)
	a, b := n.addPod("a", 21), n.addPod("b", 22)
	n.udpServer(a, "a", 5353)
	n.udpServer(b, "b", 5353)
	dns := n.service("dns", withUDP, withNodePort)
	n.endpoints("dns", "dns", udp("", 5353), []*lab.Pod{a})
	n.answersUDP("the first pod", n.client.Run, slices.Concat(vips(dns), nodePorts(dns)), "a")
	var sockets []net.Conn
	for _, addr := range nodePorts(dns) {
		n.must(n.client.Do(func() error {
			c, err := net.Dial("udp", addr)
			sockets = append(sockets, c)
			return err
		}))
	}
	answered := func(want string) {
		t.Helper()
		for _, c := range sockets {
			n.eventually(want+" answers at "+c.RemoteAddr().String(), func() bool {
				_ = c.SetDeadline(time.Now().Add(time.Second))
				if _, err := c.Write([]byte("who\n")); err != nil {
					return false
				}
				got := make([]byte, 100)
				k, err := c.Read(got)
				return err == nil && strings.TrimSpace(string(got[:k])) == want
			})
		}
	}
	answered("a")
	n.endpoints("dns", "dns", udp("", 5353), nil)
	n.answersUDP("no pod", n.client.Run, slices.Concat(vips(dns), nodePorts(dns)), refused)
	n.endpoints("dns", "dns", udp("", 5353), []*lab.Pod{b})
	n.answersUDP("the second pod", n.client.Run, slices.Concat(vips(dns), nodePorts(dns)), "b")
	answered("b")
	for _, c := range sockets {
		c.Close()
	}
}
