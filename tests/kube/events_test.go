package kube

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/lab"
)

// told waits until the API server has an Event on a Service with a reason and some words; it gives how often it came.
func (n *realNode) told(service, reason string, words ...string) int32 {
	n.t.Helper()
	var count int32
	err := lab.Wait(n.ctx, func() error {
		events, err := n.admin.CoreV1().Events(n.namespace).List(n.ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + service})
		if err != nil {
			return err
		}
		var seen []string
		for _, e := range events.Items {
			seen = append(seen, e.Reason+": "+e.Message)
			fits := e.Reason == reason && e.Type == corev1.EventTypeWarning && e.InvolvedObject.Kind == "Service" && e.Source.Host == nodeName
			if fits && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(e.Message, w) }) {
				count = e.Count
				return nil
			}
		}
		return fmt.Errorf("events are %q", seen)
	})
	if err != nil {
		n.t.Fatalf("no Event %s with %q on Service %s: %v; %s", reason, words, service, err, n.describe())
	}
	return count
}

// listenOnNode holds a port of the node until the test's end.
func (n *realNode) listenOnNode(network string, port int32) {
	n.t.Helper()
	n.must(n.lab.Node.Do(func() error {
		if network == "udp" {
			c, err := net.ListenPacket(network, fmt.Sprintf(":%d", port))
			if err == nil {
				n.t.Cleanup(func() { c.Close() })
			}
			return err
		}
		l, err := net.Listen(network, fmt.Sprintf(":%d", port))
		if err == nil {
			n.t.Cleanup(func() { l.Close() })
		}
		return err
	}))
}

func (n *realNode) problem(service, words string) {
	n.t.Helper()
	n.says("a problem with the words "+words, service, func(s api.Service) bool {
		return slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, words) })
	})
}

func TestWhatANodeCannotServeIsToldOnTheService(t *testing.T) {
	n := newNode(t, "--drift-interval", "1s")
	n.service("sctp", singleStack, func(s *corev1.Service) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "signal", Port: 81, Protocol: corev1.ProtocolSCTP})
		s.Spec.Ports[0].Name = "web"
	})
	n.told("sctp", "Unsupported", "spec.ports[1].protocol", "SCTP is not supported")

	first := n.service("first")
	for i, ip := range first.Spec.ClusterIPs {
		thief := fmt.Sprint("thief", i)
		n.service(thief, func(s *corev1.Service) { s.Spec.ExternalIPs = []string{ip} })
		n.told(thief, "AddressConflict", ip, "is an address of Service "+n.namespace+"/first", "another address")
	}

	n.service("family", singleStack)
	x := n.slice("family", "family-6", discoveryv1.AddressTypeIPv6, "fd77::21")
	n.told("family", "EndpointFamily", "all endpoints are IPv6", "spec.ipFamilies")
	n.must(n.admin.DiscoveryV1().EndpointSlices(n.namespace).Delete(n.ctx, x.Name, metav1.DeleteOptions{}))
	n.says("the problem gone", "family", func(s api.Service) bool { return s.Name == "family" && len(s.Problems) == 0 })

	for network, protocol := range map[string]corev1.Protocol{"tcp": corev1.ProtocolTCP, "udp": corev1.ProtocolUDP} {
		name := "held-" + network
		s := n.service(name, func(s *corev1.Service) { s.Spec.Type, s.Spec.Ports[0].Protocol = corev1.ServiceTypeNodePort, protocol })
		n.listenOnNode(network, s.Spec.Ports[0].NodePort)
		// A socket that comes after the Service is found when Services' ports change, or after a while.
		n.service("stir-"+network, withNodePort)
		n.told(name, "NodePortInUse", fmt.Sprintf("%s port %d (NodePort) is held by a socket", protocol, s.Spec.Ports[0].NodePort), "another nodePort")
		n.problem(name, "is held by a socket")
	}
	// Once per problem, not per look.
	if count := n.told("held-tcp", "NodePortInUse"); count != 1 {
		t.Errorf("one collision was told %d times", count)
	}
}

func TestAFullMapRefusesTheNewServiceAndSaysSo(t *testing.T) {
	n := newBareNode(t)
	a := n.server("a", 21, 8080)
	old := n.service("old")
	n.endpoints("old", "old", tcp("", 8080), []*lab.Pod{a})
	all, err := n.admin.CoreV1().Services("").List(n.ctx, metav1.ListOptions{})
	n.must(err)
	room := 0
	for _, s := range all.Items { // what else there is, such as the API server's own
		if s.Spec.ClusterIP != corev1.ClusterIPNone {
			room += len(s.Spec.ClusterIPs) * len(s.Spec.Ports)
		}
	}
	n.start("--map-frontends", fmt.Sprint(room), "--drift-interval", "1s")
	n.answers("a Service that fits", n.client.Run, vips(old), "a")
	n.service("late")
	n.told("late", "MapFull", "sm_frontends is full", "raise --map-frontends")
	n.problem("late", "raise --map-frontends")
	n.answers("what is there keeps working", n.client.Run, vips(old), "a")
	status, err := n.lab.CLI(n.ctx, "status")
	n.must(err)
	if !strings.Contains(status, "sm_frontends is 100% full") {
		t.Errorf("status does not warn of the map:\n%s", status)
	}
	metrics, err := n.lab.Metrics(n.ctx, "/metrics")
	n.must(err)
	if !strings.Contains(metrics, `sockmesh_datapath_entries_refused{map="sm_frontends"} 2`) {
		t.Errorf("the metrics do not count the entries that were refused, one of each family")
	}
	n.delete("old")
	n.says("room was made", "late", func(s api.Service) bool { return s.Name == "late" && len(s.Problems) == 0 })
	late, err := n.admin.CoreV1().Services(n.namespace).Get(n.ctx, "late", metav1.GetOptions{})
	n.must(err)
	n.answers("the Service that was refused", n.client.Run, vips(late), refused)
}

func TestHealthChecksFollowLocalEndpointsAndTheNode(t *testing.T) {
	n := newNode(t, "--kube-proxy-healthz", ":10256")
	a := n.server("a", 21, 8080)
	s := n.service("web", func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalTrafficPolicy = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal
	})
	port := s.Spec.HealthCheckNodePort
	// check gives the answer's code and body, as a load balancer on the node's network gets it.
	check := func(addr, path string) string {
		out, err := n.client.Run(n.ctx, "curl", "-s", "--noproxy", "*", "--max-time", "10", "-w", " %{http_code} %header{x-load-balancing-endpoint-weight}", "http://"+addr+path)
		if err != nil {
			return err.Error()
		}
		return strings.Join(strings.Fields(out), " ")
	}
	becomes := func(what string, port int32, path string, words ...string) {
		t.Helper()
		for _, addr := range at(nodeIPs, port) {
			err := lab.Wait(n.ctx, func() error {
				got := check(addr, path)
				if slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(got, w) }) {
					return fmt.Errorf("it answers %q", got)
				}
				return nil
			})
			if err != nil {
				t.Fatalf("%s: %s: want %q: %v", what, addr, words, err)
			}
		}
	}
	health := port
	becomes("no endpoint", health, "/", " 503 0", `"localEndpoints": 0`, `"serviceProxyHealthy": true`, `"namespace": "`+n.namespace+`"`)
	condition := func(ready, terminating bool, node string) {
		n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a}, func(_ int, e *discoveryv1.Endpoint) {
			e.NodeName = &node
			e.Conditions = discoveryv1.EndpointConditions{Ready: &ready, Serving: new(true), Terminating: &terminating}
		})
	}
	condition(true, false, nodeName)
	becomes("a local ready endpoint", health, "/", " 200 1", `"localEndpoints": 1`)
	condition(false, true, nodeName)
	becomes("only a terminating one", health, "/", " 503 0")
	condition(true, false, "node-2")
	becomes("one on another node", health, "/", " 503 0")

	becomes("the node", 10256, "/healthz", " 200", `"nodeEligible":true`)
	taint := func(taints string) {
		t.Helper()
		_, err := n.admin.CoreV1().Nodes().Patch(n.ctx, nodeName, "application/merge-patch+json", []byte(`{"spec":{"taints":`+taints+`}}`), metav1.PatchOptions{})
		n.must(err)
	}
	taint(`[{"key":"ToBeDeletedByClusterAutoscaler","value":"1","effect":"NoSchedule"}]`)
	becomes("the node is to go", 10256, "/healthz", " 503", `"nodeEligible":false`)
	becomes("and yet it lives", 10256, "/livez", " 200")
	taint(`null`)
	becomes("it stays after all", 10256, "/healthz", " 200")

	// A port that somebody else holds is told, and taken over when it is free.
	var held net.Listener
	n.must(n.lab.Node.Do(func() (err error) {
		held, err = net.Listen("tcp", at(nodeIPs, port+1)[0])
		return err
	}))
	defer held.Close()
	n.service("taken", singleStack, func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal, port+1
	})
	n.told("taken", "FailedToStartServiceHealthcheck", fmt.Sprintf("health-check port %d can't be served on %s", port+1, nodeIPs[0]), "address already in use", "another healthCheckNodePort")
	held.Close()
	becomes("the port, once it is free", port+1, "/", " 503 0")
	n.says("no problem any more", "taken", func(s api.Service) bool {
		return s.HealthCheck != nil && len(s.Problems) == 0 && len(s.HealthCheck.Addresses) > 0
	})
}
