package kube

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/service"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// That conversion keeps what kube-proxy would read is proven in tests/kubeproxy. Here are the cases by name.

func balancerService() *corev1.Service {
	proxy := corev1.LoadBalancerIPModeProxy
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, ClusterIPs: []string{"10.96.0.1"}, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal,
			HealthCheckNodePort: 31000, ExternalIPs: []string{"198.51.100.1", "198.51.100.001"},
			LoadBalancerSourceRanges: []string{" 10.1.2.3/8 ", "2001:db8::1/32", "nonsense"},
			Ports:                    []corev1.ServicePort{{Name: "http", Port: 80, NodePort: 30080}},
		},
		Status: corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{
			{IP: "203.0.113.1"}, {IP: "203.0.113.2", IPMode: &proxy}, {Hostname: "lb.example.com"},
		}}},
	}
}

func TestAServicesOutsideIsKept(t *testing.T) {
	o := ConvertService(balancerService())
	if got := fmt.Sprint(o.LoadBalancerIPs, o.ExternalIPs, o.SourceRanges, o.ExternalLocal, o.HealthCheckNodePort, o.Ports); got !=
		"[203.0.113.1] [198.51.100.1] [10.0.0.0/8 2001:db8::/32] true 31000 [{http TCP 80 30080}]" {
		t.Error(got)
	}
}

func TestAHealthCheckIsALocalLoadBalancersOnly(t *testing.T) {
	for name, change := range map[string]func(*corev1.Service){
		"policy Cluster": func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster },
		"type NodePort":  func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort },
	} {
		s := balancerService()
		change(s)
		if o := ConvertService(s); o.HealthCheckNodePort != 0 {
			t.Errorf("%s: %d", name, o.HealthCheckNodePort)
		}
	}
	s := balancerService()
	s.Spec.Type, s.Spec.ExternalIPs = corev1.ServiceTypeClusterIP, nil
	if o := ConvertService(s); o.ExternalLocal {
		t.Error("a Service that nobody outside reaches has no external policy")
	}
}

func TestHintsAreKeptAndShared(t *testing.T) {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "x", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for i := range 2 {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{fmt.Sprintf("10.0.0.0%d", i)},
			Hints:     &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "a"}, {Name: "b"}}, ForNodes: []discoveryv1.ForNode{{Name: "here"}}},
		})
	}
	e := ConvertSlice(s).Endpoints
	if zones, nodes := slices.Collect(e[0].Hints.Zones()), slices.Collect(e[0].Hints.Nodes()); fmt.Sprint(zones, nodes) != "[a b] [here]" {
		t.Error(zones, nodes)
	}
	if e[0].Hints != e[1].Hints || e[0].Addr != netip.MustParseAddr("10.0.0.0") {
		t.Errorf("%+v", e)
	}
}

func TestOnlyTheHeadlessLabelSkipsASlice(t *testing.T) {
	for label, kept := range map[string]bool{labelHeadless: false, labelServiceProxyName: true} {
		s := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "x", Labels: map[string]string{discoveryv1.LabelServiceName: "web", label: ""}},
			AddressType: discoveryv1.AddressTypeIPv4,
		}
		if got := ConvertSlice(s) != nil; got != kept {
			t.Errorf("%s: kept %v", label, got)
		}
	}
}

func TestANodesInternalAddressesComeFirst(t *testing.T) {
	n := ConvertNode(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "here", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeExternalIP, Address: "203.0.113.9"}, {Type: corev1.NodeHostName, Address: "here"}, {Type: corev1.NodeInternalIP, Address: "192.0.2.1"},
		}},
	})
	if got := fmt.Sprint(n.Name, n.Zone, n.Addresses); got != "herez1[192.0.2.1 203.0.113.9]" {
		t.Error(got)
	}
}

func TestANodeThatIsToGoIsLeaving(t *testing.T) {
	for what, n := range map[string]*corev1.Node{
		"deleted": {ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: new(metav1.Now())}},
		"tainted": {Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule}}}},
	} {
		if !ConvertNode(n).Leaving {
			t.Errorf("%s, and it stays", what)
		}
	}
	if ConvertNode(&corev1.Node{Spec: corev1.NodeSpec{Unschedulable: true, Taints: []corev1.Taint{{Key: "node.kubernetes.io/unschedulable"}}}}).Leaving {
		t.Error("a cordoned node leaves")
	}
}

func TestNodePortsFollowTheNodeAndItsDevices(t *testing.T) {
	ports, err := service.ParseNodePortAddresses("192.168.0.0/16,loopback")
	if err != nil {
		t.Fatal(err)
	}
	l := newLedger(t)
	tb := newTable(Config{NodeName: "here", Handler: l, NodePorts: ports, Outside: true, Logger: slog.New(slog.DiscardHandler)}, &remarks{})
	tb.listed(kindService)
	tb.listed(kindEndpointSlice)
	o := webObject()
	o.Ports[0].NodePort = 30080
	tb.set(o)
	steps(tb)
	if got := l.view(); got != "10.96.0.1:80 ->" {
		t.Errorf("before the node is known: %s", got)
	}
	tb.set(&Node{Name: "here", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
	tb.SetAddresses([]netip.Addr{netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("10.0.0.1")})
	steps(tb)
	if got := l.view(); got != "10.96.0.1:80 ->\n192.168.1.1:30080 ->" {
		t.Error(got)
	}
	if loop := l.services[o.Name].Loopback; len(loop) != 1 || loop[0].Addr.String() != "127.0.0.1:30080" {
		t.Errorf("%v", loop)
	}
	calls := len(l.calls)
	tb.SetAddresses([]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("10.0.0.2")})
	steps(tb)
	if len(l.calls) != calls {
		t.Errorf("told though nothing changed for it: %v", l.calls[calls:])
	}
	tb.SetAddresses(nil)
	steps(tb)
	if got := l.view(); got != "10.96.0.1:80 ->" {
		t.Error(got)
	}
}

func TestWhatIsWrongForTheOutsideIsRefused(t *testing.T) {
	for want, change := range map[string]func(*corev1.Service){
		"spec.ports[0].nodePort: Forbidden: expected type NodePort or LoadBalancer": func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP },
		"spec.ports[0].nodePort: Invalid value: 70000":                              func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 70000 },
		"spec.ports[1].nodePort: Duplicate value: 30080": func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "admin", Port: 81, NodePort: 30080})
		},
		`spec.externalIPs[1]: Invalid value: "x"`:                     func(s *corev1.Service) { s.Spec.ExternalIPs[1] = "x" },
		`spec.loadBalancerSourceRanges[2]: Invalid value: "nonsense"`: func(*corev1.Service) {},
		`status.loadBalancer.ingress[0].ip: Invalid value: "1.2.3"`:   func(s *corev1.Service) { s.Status.LoadBalancer.Ingress[0].IP = "1.2.3" },
		`status.loadBalancer.ingress[0].ipMode: Invalid value: "vip"`: func(s *corev1.Service) {
			s.Status.LoadBalancer.Ingress[0].IPMode = new(corev1.LoadBalancerIPMode("vip"))
		},
		`spec.externalTrafficPolicy: Invalid value: "Here": expected Cluste`: func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "Here" },
		"spec.healthCheckNodePort: Invalid value: -1":                        func(s *corev1.Service) { s.Spec.HealthCheckNodePort = -1 },
	} {
		s := balancerService()
		s.Spec.ExternalIPs[1] = "198.51.100.2"
		change(s)
		_, wrong, _ := takeService(s)
		if !strings.Contains(wrong.ToAggregate().Error(), want) {
			t.Errorf("want %s, got %v", want, wrong)
		}
	}
	s := balancerService()
	s.Spec.ExternalIPs, s.Spec.LoadBalancerSourceRanges = s.Spec.ExternalIPs[:1], s.Spec.LoadBalancerSourceRanges[:2]
	if _, wrong, _ := takeService(s); len(wrong) > 0 {
		t.Error(wrong)
	}
}
