package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// outside renders a Service's addresses beside the cluster IPs: "LoadBalancer 203.0.113.1:80 in 10.1.0.1 10.1.0.2 out
// 10.1.0.1". Node ports, which the API server chooses, are written "node".
func (a *agent) outside(name string) string {
	svc := a.services[name]
	if svc == nil {
		return "none"
	}
	var lines []string
	for _, f := range svc.Frontends {
		if f.Kind == service.ClusterIP {
			continue
		}
		kind, port := map[service.Kind]string{service.NodePort: "NodePort", service.LoadBalancer: "LoadBalancer", service.ExternalIP: "ExternalIP"}[f.Kind], fmt.Sprint(f.Addr.Port())
		if f.Kind == service.NodePort && f.Addr.Port() >= 30000 {
			port = "node"
		}
		line := fmt.Sprintf("%s %s:%s in", kind, f.Addr.Addr(), port)
		for _, b := range f.Backends {
			line += " " + b.Addr.Addr().String()
		}
		line += " out"
		for _, b := range f.External.Backends {
			line += " " + b.Addr.Addr().String()
		}
		for _, p := range f.External.Sources {
			line += " from " + p.String()
		}
		lines = append(lines, line)
	}
	if h := svc.HealthCheck; h != nil && h.Port >= 30000 {
		lines = append(lines, fmt.Sprintf("health %d %d", h.LocalReady4, h.LocalReady6))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func (a *agent) seesOutside(what, name string, lines ...string) {
	a.t.Helper()
	slices.Sort(lines)
	want, got := strings.Join(lines, "\n"), ""
	if !a.wait(func() bool { got = a.outside(name); return got == want }) {
		a.t.Fatalf("%s: got\n%s\nwant\n%s", what, got, want)
	}
}

// thisNode makes sure that the Node exists, in a zone and with addresses.
func (a *agent) thisNode(zone string, addresses ...string) {
	a.t.Helper()
	ctx, nodes := context.Background(), a.admin.CoreV1().Nodes()
	n, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		n, err = nodes.Get(ctx, nodeName, metav1.GetOptions{})
	} else {
		a.t.Cleanup(func() { _ = nodes.Delete(ctx, nodeName, metav1.DeleteOptions{}) })
	}
	a.must(err)
	n.Labels = map[string]string{corev1.LabelTopologyZone: zone}
	n, err = nodes.Update(ctx, n, metav1.UpdateOptions{})
	a.must(err)
	n.Status.Addresses = nil
	for _, address := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: address})
	}
	_, err = nodes.UpdateStatus(ctx, n, metav1.UpdateOptions{})
	a.must(err)
}

func TestALoadBalancerAndItsChangesOfType(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	a.thisNode("z1", "192.168.0.1")
	s := a.service("web", func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		s.Spec.LoadBalancerSourceRanges = []string{"198.18.0.0/15"}
		s.Spec.ExternalIPs = []string{"198.51.100.1"}
	})
	if s.Spec.HealthCheckNodePort == 0 || s.Spec.Ports[0].NodePort == 0 {
		t.Fatalf("the API server gave no ports: %+v", s.Spec)
	}
	x := a.slice("web", "web-4", discoveryv1.AddressTypeIPv4, "10.1.0.1", "10.1.0.2")
	x.Endpoints[0].NodeName = new(string(nodeName))
	_, err := a.admin.DiscoveryV1().EndpointSlices(a.namespace).Update(ctx, x, metav1.UpdateOptions{})
	a.must(err)
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{
		{IP: "203.0.113.1"}, {IP: "203.0.113.2", IPMode: new(corev1.LoadBalancerIPModeProxy)}, {IP: "2001:db8::1", IPMode: new(corev1.LoadBalancerIPModeVIP)},
	}
	_, err = a.admin.CoreV1().Services(a.namespace).UpdateStatus(ctx, s, metav1.UpdateOptions{})
	a.must(err)
	a.seesOutside("a load balancer of policy Local", "web",
		"NodePort 192.168.0.1:node in 10.1.0.1 10.1.0.2 out 10.1.0.1",
		"LoadBalancer 203.0.113.1:80 in 10.1.0.1 10.1.0.2 out 10.1.0.1 from 198.18.0.0/15",
		"LoadBalancer 2001:db8::1:80 in out",
		"ExternalIP 198.51.100.1:80 in 10.1.0.1 10.1.0.2 out 10.1.0.1",
		"health 1 0")

	patch := func(p string) {
		t.Helper()
		_, err := a.admin.CoreV1().Services(a.namespace).Patch(ctx, s.Name, types.MergePatchType, []byte(p), metav1.PatchOptions{})
		a.must(err)
	}
	patch(`{"spec":{"externalTrafficPolicy":"Cluster","loadBalancerSourceRanges":null}}`)
	a.seesOutside("policy Cluster", "web",
		"NodePort 192.168.0.1:node in 10.1.0.1 10.1.0.2 out 10.1.0.1 10.1.0.2",
		"LoadBalancer 203.0.113.1:80 in 10.1.0.1 10.1.0.2 out 10.1.0.1 10.1.0.2",
		"LoadBalancer 2001:db8::1:80 in out",
		"ExternalIP 198.51.100.1:80 in 10.1.0.1 10.1.0.2 out 10.1.0.1 10.1.0.2")
	patch(`{"spec":{"type":"NodePort"}}`)
	a.seesOutside("type NodePort", "web",
		"NodePort 192.168.0.1:node in 10.1.0.1 10.1.0.2 out 10.1.0.1 10.1.0.2",
		"ExternalIP 198.51.100.1:80 in 10.1.0.1 10.1.0.2 out 10.1.0.1 10.1.0.2")
	patch(`{"spec":{"type":"ClusterIP","externalIPs":null}}`)
	a.seesOutside("type ClusterIP", "web")
}

func TestHintsFollowTheNodesZone(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	a.thisNode("z1", "192.168.0.1")
	a.service("web", func(s *corev1.Service) {
		s.Spec.TrafficDistribution = new(string(corev1.ServiceTrafficDistributionPreferSameZone))
		s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
	})
	x := a.slice("web", "web-4", discoveryv1.AddressTypeIPv4, "10.1.0.1", "10.1.0.2")
	for i, zone := range []string{"z1", "z2"} {
		x.Endpoints[i].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zone}}}
	}
	x, err := a.admin.DiscoveryV1().EndpointSlices(a.namespace).Update(ctx, x, metav1.UpdateOptions{})
	a.must(err)
	a.sees("web:80 -> 10.1.0.1:8080")
	a.thisNode("z2", "192.168.0.1")
	a.sees("web:80 -> 10.1.0.2:8080")
	a.thisNode("z3", "192.168.0.1")
	a.sees("web:80 -> 10.1.0.1:8080 10.1.0.2:8080")
	x.Endpoints[0].Hints.ForNodes = []discoveryv1.ForNode{{Name: nodeName}}
	x.Endpoints[1].Hints.ForNodes = []discoveryv1.ForNode{{Name: "node-2"}}
	_, err = a.admin.DiscoveryV1().EndpointSlices(a.namespace).Update(ctx, x, metav1.UpdateOptions{})
	a.must(err)
	a.sees("web:80 -> 10.1.0.1:8080")
}
