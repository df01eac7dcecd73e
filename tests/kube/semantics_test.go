package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/lab"
)

// The rows of Kubernetes' Service semantics that an object's change brings about, through the real API server and the real
// agent, seen on real sockets.

const (
	toExternalName = `{"spec":{"type":"ExternalName","externalName":"example.com","clusterIP":null,"clusterIPs":null,"ipFamilies":null,"ipFamilyPolicy":null,"externalTrafficPolicy":null,"internalTrafficPolicy":null}}`
	toClusterIP    = `{"spec":{"type":"ClusterIP","externalName":null}}`
	toNodePort     = `{"spec":{"type":"NodePort","externalName":null}}`
)

func singleStack(s *corev1.Service) { s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack) }

func TestEveryChangeOfTypeReachesSockets(t *testing.T) {
	n := newNode(t, "--nodeport-addresses", "primary,loopback")
	a := n.server("a", 21, 8080)
	s := n.service("web", singleStack)
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", []*lab.Pod{a})
	vip := address(s.Spec.ClusterIP, 80)
	n.answers("ClusterIP", &n.client.Place, vip, "a")
	n.answers("ClusterIP, from the host", n.lab.Node, vip, "a")

	n.patch("web", toExternalName)
	n.answers("ClusterIP to ExternalName", &n.client.Place, vip, nowhere)

	s = n.patch("web", toNodePort)
	vip = address(s.Spec.ClusterIP, 80)
	node := func(ip string) string { return address(ip, s.Spec.Ports[0].NodePort) }
	n.answers("ExternalName to NodePort: the cluster IP", &n.client.Place, vip, "a")
	n.answers("ExternalName to NodePort: the node port, from a pod", &n.client.Place, node(nodeIP), "a")
	n.answers("ExternalName to NodePort: the node port, from the host", n.lab.Node, node(nodeIP), "a")
	n.answers("the node port on the host's loopback", n.lab.Node, node("127.0.0.1"), "a")
	n.answers("the node port on a pod's loopback", &n.client.Place, node("127.0.0.1"), refused)

	n.patch("web", toExternalName)
	n.answers("NodePort to ExternalName: the cluster IP", &n.client.Place, vip, nowhere)
	n.answers("NodePort to ExternalName: the node port", &n.client.Place, node(nodeIP), refused)
	n.answers("NodePort to ExternalName: loopback", n.lab.Node, node("127.0.0.1"), refused)

	s = n.patch("web", toClusterIP)
	vip = address(s.Spec.ClusterIP, 80)
	n.answers("ExternalName to ClusterIP", &n.client.Place, vip, "a")
	s = n.patch("web", toNodePort)
	n.answers("ClusterIP to NodePort", &n.client.Place, node(nodeIP), "a")
	old := node(nodeIP)
	n.patch("web", toClusterIP)
	n.answers("NodePort to ClusterIP", &n.client.Place, old, refused)
	n.answers("NodePort to ClusterIP: the cluster IP", &n.client.Place, vip, "a")

	n.must(n.admin.CoreV1().Services(n.namespace).Delete(n.ctx, "web", metav1.DeleteOptions{}))
	n.answers("deleted", &n.client.Place, vip, nowhere)
	s = n.service("web", singleStack)
	n.answers("made again", &n.client.Place, address(s.Spec.ClusterIP, 80), "a")
}

func TestLabelsThatTakeAServiceAwayReachSockets(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web", singleStack)
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", []*lab.Pod{a})
	vip := address(s.Spec.ClusterIP, 80)
	n.answers("at first", &n.client.Place, vip, "a")
	for _, label := range []string{"service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"} {
		n.patch("web", `{"metadata":{"labels":{"`+label+`":"x"}}}`)
		n.answers(label+" on", &n.client.Place, vip, nowhere)
		n.patch("web", `{"metadata":{"labels":{"`+label+`":null}}}`)
		n.answers(label+" off", &n.client.Place, vip, "a")
	}
}

func TestSeveralSlicesWithPortsOfTheirOwnReachSockets(t *testing.T) {
	n := newNode(t)
	a, b := n.server("a", 21, 8080), n.server("b", 22, 9090)
	s := n.service("web", singleStack, func(s *corev1.Service) { s.Spec.Ports[0].Name = "http" })
	vip := address(s.Spec.ClusterIP, 80)
	n.answers("without endpoints", &n.client.Place, vip, refused)
	n.endpoints("web", "web-1", discoveryv1.AddressTypeIPv4, 8080, "http", []*lab.Pod{a})
	n.answers("one slice", &n.client.Place, vip, "a")
	n.endpoints("web", "web-2", discoveryv1.AddressTypeIPv4, 9090, "http", []*lab.Pod{b})
	n.answers("two slices, each with its own number for the named port", &n.client.Place, vip, "a b")
	n.endpoints("web", "web-3", discoveryv1.AddressTypeIPv4, 8080, "http", []*lab.Pod{a})
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "other", []*lab.Pod{b})
	n.says("an endpoint in two slices counts once, one without the port not at all", "web", func(s api.Service) bool {
		return len(s.Frontends) == 1 && len(s.Frontends[0].Backends) == 2 && len(s.Excluded) == 1
	})
	n.must(n.admin.DiscoveryV1().EndpointSlices(n.namespace).Delete(n.ctx, "web-1", metav1.DeleteOptions{}))
	n.answers("one of the two slices with it gone", &n.client.Place, vip, "a b")
	n.must(n.admin.DiscoveryV1().EndpointSlices(n.namespace).Delete(n.ctx, "web-3", metav1.DeleteOptions{}))
	n.answers("the other gone too", &n.client.Place, vip, "b")
}

func TestFamiliesThatComeAndGoReachSockets(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web", singleStack)
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", []*lab.Pod{a})
	n.endpoints("web", "web-6", discoveryv1.AddressTypeIPv6, 8080, "", []*lab.Pod{a})
	vip := address(s.Spec.ClusterIP, 80)
	n.answers("single-stack", &n.client.Place, vip, "a")
	s = n.patch("web", `{"spec":{"ipFamilyPolicy":"RequireDualStack"}}`)
	if len(s.Spec.ClusterIPs) != 2 {
		t.Fatalf("the API server gave %v", s.Spec.ClusterIPs)
	}
	vip6 := address(s.Spec.ClusterIPs[1], 80)
	n.answers("upgraded: the new family", &n.client.Place, vip6, "a")
	n.answers("upgraded: the old one", &n.client.Place, vip, "a")
	n.patch("web", `{"spec":{"ipFamilyPolicy":"SingleStack","ipFamilies":["IPv4"],"clusterIPs":["`+s.Spec.ClusterIP+`"]}}`)
	n.answers("downgraded: the family that went", &n.client.Place, vip6, nowhere)
	n.answers("downgraded: the one that stays", &n.client.Place, vip, "a")
}

func TestPoliciesAndConditionsReachSockets(t *testing.T) {
	n := newNode(t)
	a, b := n.server("a", 21, 8080), n.server("b", 22, 8080)
	both := []*lab.Pod{a, b}
	s := n.service("web", singleStack)
	vip := address(s.Spec.ClusterIP, 80)
	endpoints := func(change func(int, *discoveryv1.Endpoint)) {
		n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", both, change)
	}
	elsewhere := func(which int) func(int, *discoveryv1.Endpoint) {
		return func(i int, e *discoveryv1.Endpoint) {
			if i == which || which < 0 {
				e.NodeName = new("node-2")
			}
		}
	}
	state := func(ready, serving, terminating bool) discoveryv1.EndpointConditions {
		return discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}
	}
	endpoints(elsewhere(1))
	n.answers("internalTrafficPolicy Cluster", &n.client.Place, vip, "a b")
	n.patch("web", `{"spec":{"internalTrafficPolicy":"Local"}}`)
	n.answers("internalTrafficPolicy Local", &n.client.Place, vip, "a")
	endpoints(elsewhere(-1))
	n.answers("internalTrafficPolicy Local without local endpoints", &n.client.Place, vip, refused)
	n.patch("web", `{"spec":{"internalTrafficPolicy":"Cluster"}}`)
	n.answers("internalTrafficPolicy Cluster again", &n.client.Place, vip, "a b")

	endpoints(func(i int, e *discoveryv1.Endpoint) { e.Conditions = state(i == 1, i == 1, false) })
	n.answers("one is not ready", &n.client.Place, vip, "b")
	endpoints(func(i int, e *discoveryv1.Endpoint) { e.Conditions = state(i == 1, true, i == 0) })
	n.answers("one is draining", &n.client.Place, vip, "b")
	n.says("a draining endpoint", "web", func(s api.Service) bool {
		return len(s.Endpoints) == 2 && s.Endpoints[0].State == "draining" && !s.Endpoints[0].Used && s.Endpoints[1].Used
	})
	endpoints(func(i int, e *discoveryv1.Endpoint) { e.Conditions = state(false, true, i == 0) })
	n.answers("fallback: only terminating ones serve", &n.client.Place, vip, "a")
	endpoints(func(_ int, e *discoveryv1.Endpoint) { e.Conditions = state(false, false, false) })
	n.answers("none is ready", &n.client.Place, vip, refused)
	// publishNotReadyAddresses: the controller writes ready though the pod is not; it counts as it is written.
	n.patch("web", `{"spec":{"publishNotReadyAddresses":true}}`)
	endpoints(func(_ int, e *discoveryv1.Endpoint) { e.Conditions = state(true, false, false) })
	n.answers("publishNotReadyAddresses", &n.client.Place, vip, "a b")

	n.patch("web", `{"spec":{"publishNotReadyAddresses":false,"trafficDistribution":"PreferSameZone"}}`)
	zones := []string{"z1", "z2"}
	endpoints(func(i int, e *discoveryv1.Endpoint) {
		e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zones[i]}}}
	})
	n.answers("trafficDistribution: this node's zone", &n.client.Place, vip, "a")
	n.thisNode(nodeIP, "z2")
	n.answers("the node's zone has changed", &n.client.Place, vip, "b")
	endpoints(func(i int, e *discoveryv1.Endpoint) {
		e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zones[i]}}, ForNodes: []discoveryv1.ForNode{{Name: []string{nodeName, "node-2"}[i]}}}
	})
	n.answers("hints for nodes go before those for zones", &n.client.Place, vip, "a")

	n.patch("web", `{"spec":{"sessionAffinity":"ClientIP","sessionAffinityConfig":{"clientIP":{"timeoutSeconds":90}}}}`)
	affinity := func(seconds int64) func(api.Service) bool {
		return func(s api.Service) bool { return len(s.Frontends) == 1 && s.Frontends[0].AffinitySeconds == seconds }
	}
	n.says("session affinity on", "web", affinity(90))
	n.patch("web", `{"spec":{"sessionAffinity":"None"}}`)
	n.says("session affinity off", "web", affinity(0))
}

func TestLoadBalancersAndExternalIPsReachSockets(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web", singleStack, func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalIPs = corev1.ServiceTypeLoadBalancer, []string{"198.51.100.77"}
		s.Spec.LoadBalancerSourceRanges = []string{"198.18.0.0/15"} // for clients outside only
	})
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", []*lab.Pod{a})
	const balancer = "203.0.113.77"
	ingress := func(mode corev1.LoadBalancerIPMode) {
		t.Helper()
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: balancer, IPMode: &mode}}
		var err error
		s, err = n.admin.CoreV1().Services(n.namespace).UpdateStatus(n.ctx, s, metav1.UpdateOptions{})
		n.must(err)
	}
	ingress(corev1.LoadBalancerIPModeVIP)
	n.answers("ipMode VIP: short cut", &n.client.Place, address(balancer, 80), "a")
	n.answers("externalIPs", &n.client.Place, "198.51.100.77:80", "a")
	ingress(corev1.LoadBalancerIPModeProxy)
	n.answers("ipMode Proxy: left to the load balancer", &n.client.Place, address(balancer, 80), nowhere)
	ingress(corev1.LoadBalancerIPModeVIP)
	n.answers("ipMode VIP again", &n.client.Place, address(balancer, 80), "a")
	n.says("source ranges", "web", func(s api.Service) bool {
		for _, f := range s.Frontends {
			if f.Kind == "LoadBalancer" {
				return f.External != nil && len(f.External.Sources) == 1 && f.External.Sources[0] == "198.18.0.0/15"
			}
		}
		return false
	})
}

func TestAPodReachesItselfThroughItsService(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort })
	n.endpoints("web", "web-4", discoveryv1.AddressTypeIPv4, 8080, "", []*lab.Pod{a})
	n.endpoints("web", "web-6", discoveryv1.AddressTypeIPv6, 8080, "", []*lab.Pod{a})
	for _, ip := range s.Spec.ClusterIPs {
		n.answers("hairpin", &a.Place, address(ip, 80), "a")
	}
	n.answers("hairpin by the node port", &a.Place, address(nodeIP, s.Spec.Ports[0].NodePort), "a")
}
