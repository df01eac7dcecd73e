package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/lab"
)

// The rows of Kubernetes' Service semantics that an object's change brings about, through the real API server and the real
// agent, seen on real sockets of both families.

const (
	toExternalName = `{"spec":{"type":"ExternalName","externalName":"example.com","clusterIP":null,"clusterIPs":null,"ipFamilies":null,"ipFamilyPolicy":null,"externalTrafficPolicy":null,"internalTrafficPolicy":null}}`
	toClusterIP    = `{"spec":{"type":"ClusterIP","externalName":null,"ipFamilyPolicy":"RequireDualStack"}}`
	toNodePort     = `{"spec":{"type":"NodePort","externalName":null,"ipFamilyPolicy":"RequireDualStack"}}`
	toHeadless     = `{"spec":{"type":"ClusterIP","externalName":null,"clusterIP":"None","clusterIPs":["None"],"ipFamilyPolicy":"RequireDualStack"}}`
)

func singleStack(s *corev1.Service) { s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack) }

func TestEveryChangeOfTypeReachesSockets(t *testing.T) {
	n := newNode(t, "--nodeport-addresses", "primary,loopback")
	a := n.server("a", 21, 8080)
	s := n.service("web")
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	n.answers("ClusterIP", n.client.Run, vips(s), "a")
	n.answers("ClusterIP, from the host", n.lab.Node.Run, vips(s), "a")

	was := vips(s)
	n.patch("web", toExternalName)
	n.answers("ClusterIP to ExternalName", n.client.Run, was, nowhere)

	s = n.patch("web", toNodePort)
	n.answers("ExternalName to NodePort: the cluster IP", n.client.Run, vips(s), "a")
	n.answers("ExternalName to NodePort: the node port, from a pod", n.client.Run, nodePorts(s), "a")
	n.answers("ExternalName to NodePort: the node port, from the host", n.lab.Node.Run, nodePorts(s), "a")
	n.answers("ExternalName to NodePort: the node port, from outside", n.outside, nodePorts(s), "a")
	loopback := at(loopbacks, s.Spec.Ports[0].NodePort)
	n.answers("the node port on the host's loopback", n.lab.Node.Run, loopback, "a")
	n.answers("the node port on a pod's loopback", n.client.Run, loopback, refused)

	wasNodePorts := nodePorts(s)
	was = vips(s)
	n.patch("web", toExternalName)
	n.answers("NodePort to ExternalName: the cluster IP", n.client.Run, was, nowhere)
	n.answers("NodePort to ExternalName: the node port", n.client.Run, wasNodePorts, refused)
	n.answers("NodePort to ExternalName: the node port, from outside", n.outside, wasNodePorts, refused)
	n.answers("NodePort to ExternalName: loopback", n.lab.Node.Run, loopback, refused)

	s = n.patch("web", toClusterIP)
	n.answers("ExternalName to ClusterIP", n.client.Run, vips(s), "a")
	s = n.patch("web", toNodePort)
	n.answers("ClusterIP to NodePort", n.client.Run, nodePorts(s), "a")
	wasNodePorts = nodePorts(s)
	s = n.patch("web", toClusterIP)
	n.answers("NodePort to ClusterIP", n.client.Run, wasNodePorts, refused)
	n.answers("NodePort to ClusterIP: the cluster IP", n.client.Run, vips(s), "a")

	was = vips(s)
	n.patch("web", toExternalName)
	n.patch("web", toHeadless)
	n.answers("ClusterIP to headless", n.client.Run, was, nowhere)
	n.patch("web", toExternalName)
	s = n.patch("web", toClusterIP)
	n.answers("headless to ClusterIP", n.client.Run, vips(s), "a")

	// Deleted and made again under its name, with the old slices and with other endpoints.
	was = vips(s)
	n.delete("web")
	n.answers("deleted", n.client.Run, was, nowhere)
	n.answers("made again", n.client.Run, vips(n.service("web")), "a")
	n.delete("web")
	b := n.server("b", 22, 8080)
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{b})
	n.answers("made again with another endpoint", n.client.Run, vips(n.service("web")), "b")
}

func TestLabelsThatTakeAServiceAwayReachSockets(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web")
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	n.answers("at first", n.client.Run, vips(s), "a")
	for _, label := range []string{"service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"} {
		n.patch("web", `{"metadata":{"labels":{"`+label+`":"x"}}}`)
		n.answers(label+" on", n.client.Run, vips(s), nowhere)
		n.patch("web", `{"metadata":{"labels":{"`+label+`":null}}}`)
		n.answers(label+" off", n.client.Run, vips(s), "a")
	}
}

func TestSeveralSlicesWithPortsOfTheirOwnReachSockets(t *testing.T) {
	n := newNode(t)
	a, b := n.server("a", 21, 8080), n.server("b", 22, 9090)
	s := n.service("web", func(s *corev1.Service) { s.Spec.Ports[0].Name = "http" })
	n.answers("without endpoints", n.client.Run, vips(s), refused)
	n.endpoints("web", "web-1", tcp("http", 8080), []*lab.Pod{a})
	n.answers("one slice", n.client.Run, vips(s), "a")
	n.endpoints("web", "web-2", tcp("http", 9090), []*lab.Pod{b})
	n.answers("two slices, each with its own number for the named port", n.client.Run, vips(s), "a b")
	n.endpoints("web", "web-3", tcp("http", 8080), []*lab.Pod{a})
	n.endpoints("web", "web-4", tcp("other", 8080), []*lab.Pod{b})
	n.says("an endpoint in two slices counts once, one without the port not at all", "web", func(s api.Service) bool {
		return len(s.Frontends) == 2 && len(s.Frontends[0].Backends) == 2 && len(s.Frontends[1].Backends) == 2 && len(s.Excluded) == 2
	})
	n.noEndpoints("web-1")
	n.answers("one of the two slices with it gone", n.client.Run, vips(s), "a b")
	n.noEndpoints("web-3")
	n.answers("the other gone too", n.client.Run, vips(s), "b")
}

func TestFamiliesThatComeAndGoReachSockets(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	for i, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		name := []string{"four", "six"}[i]
		s := n.service(name, singleStack, func(s *corev1.Service) { s.Spec.IPFamilies = []corev1.IPFamily{family} })
		n.endpoints(name, name, tcp("", 8080), []*lab.Pod{a})
		n.answers("single-stack", n.client.Run, vips(s), "a")
		s = n.patch(name, `{"spec":{"ipFamilyPolicy":"RequireDualStack"}}`)
		if len(s.Spec.ClusterIPs) != 2 {
			t.Fatalf("the API server gave %v", s.Spec.ClusterIPs)
		}
		n.answers("upgraded", n.client.Run, vips(s), "a")
		second := vips(s)[1:]
		s = n.patch(name, `{"spec":{"ipFamilyPolicy":"SingleStack","ipFamilies":["`+string(family)+`"],"clusterIPs":["`+s.Spec.ClusterIP+`"]}}`)
		n.answers("downgraded: the family that went", n.client.Run, second, nowhere)
		n.answers("downgraded: the one that stays", n.client.Run, vips(s), "a")
	}
}

func TestPoliciesAndConditionsReachSockets(t *testing.T) {
	n := newNode(t)
	a, b := n.server("a", 21, 8080), n.server("b", 22, 8080)
	both := []*lab.Pod{a, b}
	s := n.service("web")
	endpoints := func(change func(int, *discoveryv1.Endpoint)) { n.endpoints("web", "web", tcp("", 8080), both, change) }
	answers := func(what, want string) {
		t.Helper()
		n.answers(what, n.client.Run, vips(s), want)
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
	answers("internalTrafficPolicy Cluster", "a b")
	n.patch("web", `{"spec":{"internalTrafficPolicy":"Local"}}`)
	answers("internalTrafficPolicy Local", "a")
	endpoints(elsewhere(-1))
	answers("internalTrafficPolicy Local without local endpoints", refused)
	n.patch("web", `{"spec":{"internalTrafficPolicy":"Cluster"}}`)
	answers("internalTrafficPolicy Cluster again", "a b")

	endpoints(func(i int, e *discoveryv1.Endpoint) { e.Conditions = state(i == 1, i == 1, false) })
	answers("one is not ready", "b")
	endpoints(func(i int, e *discoveryv1.Endpoint) { e.Conditions = state(i == 1, true, i == 0) })
	answers("one is draining", "b")
	n.says("draining endpoints", "web", func(s api.Service) bool {
		draining, used := 0, 0
		for _, e := range s.Endpoints {
			if e.State == "draining" && !e.Used {
				draining++
			}
			if e.Used {
				used++
			}
		}
		return draining == 2 && used == 2 // in each family
	})
	endpoints(func(i int, e *discoveryv1.Endpoint) { e.Conditions = state(false, true, i == 0) })
	answers("fallback: only terminating ones serve", "a")
	endpoints(func(_ int, e *discoveryv1.Endpoint) { e.Conditions = state(false, false, false) })
	answers("none is ready", refused)
	// publishNotReadyAddresses: the controller writes ready though the pod is not; it counts as it is written.
	n.patch("web", `{"spec":{"publishNotReadyAddresses":true}}`)
	endpoints(func(_ int, e *discoveryv1.Endpoint) { e.Conditions = state(true, false, false) })
	answers("publishNotReadyAddresses", "a b")

	n.patch("web", `{"spec":{"publishNotReadyAddresses":false,"trafficDistribution":"PreferSameZone"}}`)
	zones := []string{"z1", "z2"}
	endpoints(func(i int, e *discoveryv1.Endpoint) {
		e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zones[i]}}}
	})
	answers("trafficDistribution: this node's zone", "a")
	n.thisNode("z2", nodeIPs...)
	answers("the node's zone has changed", "b")
	endpoints(func(i int, e *discoveryv1.Endpoint) {
		e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zones[i]}}, ForNodes: []discoveryv1.ForNode{{Name: []string{nodeName, "node-2"}[i]}}}
	})
	answers("hints for nodes go before those for zones", "a")
}

func TestLoadBalancersAndExternalIPsReachSockets(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	balancers, externals := []string{"203.0.113.77", "2001:db8::77"}, []string{"198.51.100.77", "2001:db8:1::77"}
	n.service("web", func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalIPs = corev1.ServiceTypeLoadBalancer, externals
		s.Spec.LoadBalancerSourceRanges = []string{"198.18.0.0/15", "2001:db8:2::/48"} // for clients outside only
	})
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	n.setIngress("web", corev1.LoadBalancerIPModeVIP, balancers...)
	n.answers("ipMode VIP: short cut", n.client.Run, at(balancers, 80), "a")
	n.answers("externalIPs", n.client.Run, at(externals, 80), "a")
	n.answers("externalIPs, from outside", n.outside, at(externals, 80), "a")
	n.setIngress("web", corev1.LoadBalancerIPModeProxy, balancers...)
	n.answers("ipMode Proxy: left to the load balancer", n.client.Run, at(balancers, 80), nowhere)
	n.setIngress("web", corev1.LoadBalancerIPModeVIP, balancers...)
	n.answers("ipMode VIP again", n.client.Run, at(balancers, 80), "a")
	n.says("source ranges", "web", func(s api.Service) bool {
		found := 0
		for _, f := range s.Frontends {
			if f.Kind == "LoadBalancer" && f.External != nil && len(f.External.Sources) > 0 {
				found++
			}
		}
		return found == 2
	})
	n.answers("a client outside that is in no source range", n.outside, at(balancers, 80), silence)
	n.patch("web", `{"spec":{"loadBalancerSourceRanges":["10.77.0.0/24","fd77::/64"]}}`)
	n.answers("one that is in a range", n.outside, at(balancers, 80), "a")
}

func TestAPodReachesItselfThroughItsService(t *testing.T) {
	n := newNode(t)
	a := n.server("a", 21, 8080)
	n.udpServer(a, "u", 5353)
	s := n.service("web", withNodePort)
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	dns := n.service("dns", withUDP, withNodePort)
	n.endpoints("dns", "dns", udp("", 5353), []*lab.Pod{a})
	n.answers("hairpin", a.Run, vips(s), "a")
	n.answers("hairpin by the node port", a.Run, nodePorts(s), "a")
	n.answersUDP("hairpin by UDP", a.Run, vips(dns), "u")
	n.answersUDP("hairpin by UDP and the node port", a.Run, nodePorts(dns), "u")
}
