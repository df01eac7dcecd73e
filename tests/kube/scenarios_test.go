package kube

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Upstream's end-to-end scenarios that no other file here has, under their own names.
//
//	should be able to up and down services                              TestUpAndDownServices
//	should serve multiport endpoints from pods                          TestMultiportEndpoints
//	should be rejected for evicted pods (no endpoints exist)            TestConnectionsToEvictedPodsAreRejected
//	should work after the service proxy is restarted                    TestServicesWorkAfterTheProxyWasKilled
//	should preserve UDP traffic when initial unready endpoints get ready TestUDPIsPreservedWhenUnreadyEndpointsGetReady

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

// ask sends one datagram on a connected socket, as a process of the place, and says who answered.
func ask(ctx context.Context, p *lab.Place, ip string, port int32) string {
	out, err := p.Run(ctx, "bash", "-c", fmt.Sprintf("exec 3<>/dev/udp/%s/%d && echo who >&3 && timeout 3 head -n1 <&3", ip, port))
	if err != nil {
		return refused
	}
	for len(out) > 0 && out[len(out)-1] == '\n' {
		out = out[:len(out)-1]
	}
	return out
}

func (n *realNode) asksUDP(what, ip string, port int32, want string) {
	n.t.Helper()
	last := ""
	if err := lab.Wait(n.ctx, func() error {
		if last = ask(n.ctx, &n.client.Place, ip, port); last != want {
			return fmt.Errorf("%q answers", last)
		}
		return nil
	}); err != nil {
		n.t.Fatalf("%s: %q answers, want %q; %s", what, last, want, n.describe())
	}
}

func TestUpAndDownServices(t *testing.T) {
	n := newNode(t)
	a, b, c := n.server("a", 21, 8080), n.server("b", 22, 8080), n.server("c", 23, 8080)
	up := func(name string, pods ...*lab.Pod) string {
		s := n.service(name, singleStack)
		n.endpoints(name, name+"-4", discoveryv1.AddressTypeIPv4, 8080, "", pods)
		return address(s.Spec.ClusterIP, 80)
	}
	first, second := up("first", a), up("second", b)
	n.answers("the first is up", &n.client.Place, first, "a")
	n.answers("the second is up", &n.client.Place, second, "b")
	n.must(n.admin.CoreV1().Services(n.namespace).Delete(n.ctx, "first", metav1.DeleteOptions{}))
	n.answers("the first is down", &n.client.Place, first, nowhere)
	n.answers("the second is untouched", &n.client.Place, second, "b")
	third := up("third", c)
	n.answers("the third is up", &n.client.Place, third, "c")
	n.answers("the second is untouched still", &n.client.Place, second, "b")
}

func TestMultiportEndpoints(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	_, err := a.StartNginx(n.ctx, 8081, `location / { return 200 "a-admin"; }`)
	n.must(err)
	s := n.service("multi", singleStack, func(s *corev1.Service) {
		s.Spec.Ports = []corev1.ServicePort{{Name: "web", Port: 80}, {Name: "admin", Port: 81}}
	})
	n.endpoints("multi", "multi-web", discoveryv1.AddressTypeIPv4, 8080, "web", []*lab.Pod{a})
	n.answers("one port", &n.client.Place, address(s.Spec.ClusterIP, 80), "a")
	n.answers("the other has no endpoints yet", &n.client.Place, address(s.Spec.ClusterIP, 81), refused)
	n.endpoints("multi", "multi-admin", discoveryv1.AddressTypeIPv4, 8081, "admin", []*lab.Pod{a})
	n.answers("the other", &n.client.Place, address(s.Spec.ClusterIP, 81), "a-admin")
}

func TestConnectionsToEvictedPodsAreRejected(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web", singleStack)
	vip := address(s.Spec.ClusterIP, 80)
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", []*lab.Pod{a})
	n.answers("it runs", &n.client.Place, vip, "a")
	// The controller takes an evicted pod out of the slice, which stays.
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", nil)
	n.answers("it is evicted", &n.client.Place, vip, refused)
}

func TestServicesWorkAfterTheProxyWasKilled(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	n.udpServer(a, "u", 5353)
	udp := func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP }
	web, dns := n.service("web", singleStack), n.service("dns", singleStack, udp)
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", []*lab.Pod{a})
	n.udpEndpoints("dns", []*lab.Pod{a}, true)
	look := func(when string) {
		t.Helper()
		n.answers(when, &n.client.Place, address(web.Spec.ClusterIP, 80), "a")
		n.asksUDP(when, dns.Spec.ClusterIP, 80, "u")
	}
	look("before")
	n.proc.Kill()
	<-n.proc.Done()
	look("while there is no agent")
	n.start()
	look("with the next agent")
	n.must(n.admin.CoreV1().Services(n.namespace).Delete(n.ctx, "web", metav1.DeleteOptions{}))
	n.answers("the next agent follows changes", &n.client.Place, address(web.Spec.ClusterIP, 80), nowhere)
	n.asksUDP("and keeps what did not change", dns.Spec.ClusterIP, 80, "u")
}

func TestUDPIsPreservedWhenUnreadyEndpointsGetReady(t *testing.T) {
	n := newNode(t)
	a := n.addPod("a", 21)
	n.udpServer(a, "u", 5353)
	dns := n.service("dns", singleStack, func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP })
	n.udpEndpoints("dns", []*lab.Pod{a}, false)
	n.asksUDP("unready", dns.Spec.ClusterIP, 80, refused)
	n.udpEndpoints("dns", []*lab.Pod{a}, true)
	n.asksUDP("ready", dns.Spec.ClusterIP, 80, "u")
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		if got := ask(n.ctx, &n.client.Place, dns.Spec.ClusterIP, 80); got != "u" {
			t.Fatalf("a datagram was lost after the endpoint got ready: %q", got)
		}
	}
}

// udpEndpoints makes the slice of a UDP Service.
func (n *realNode) udpEndpoints(service string, pods []*lab.Pod, ready bool) {
	n.t.Helper()
	udp := corev1.ProtocolUDP
	name, port := "", int32(5353)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service + "-udp", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &udp}},
	}
	for _, p := range pods {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{p.Addr4().String()}, NodeName: new(string(nodeName)), Conditions: discoveryv1.EndpointConditions{Ready: &ready},
		})
	}
	slices := n.admin.DiscoveryV1().EndpointSlices(n.namespace)
	if old, err := slices.Get(n.ctx, s.Name, metav1.GetOptions{}); err == nil {
		s.ResourceVersion = old.ResourceVersion
		_, err = slices.Update(n.ctx, s, metav1.UpdateOptions{})
		n.must(err)
		return
	}
	_, err := slices.Create(n.ctx, s, metav1.CreateOptions{})
	n.must(err)
}
