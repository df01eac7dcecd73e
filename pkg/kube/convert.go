package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unique"

	"github.com/sockmesh/sockmesh/pkg/service"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Labels that take a Service or slice away from node proxies (KEP 2447 and the headless label of EndpointSlices).
const (
	labelServiceProxyName = "service.kubernetes.io/service-proxy-name"
	labelHeadless         = corev1.IsHeadlessService
)

// The functions below keep what is used of an object. They accept what an API server accepts, fill in its defaults
// (manifests need not), and leave out what they can make no sense of: an API server never stores such a thing, and
// for manifests validate.go has refused it before.

// convertService trims a Service.
func convertService(s *corev1.Service) *service.Object {
	o := &service.Object{
		Name:          service.Name{Namespace: s.Namespace, Name: s.Name},
		UID:           string(s.UID),
		Foreign:       foreign(s.Labels),
		InternalLocal: s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
	}
	switch s.Spec.Type {
	case corev1.ServiceTypeExternalName:
		o.Type = service.TypeExternalName
	case corev1.ServiceTypeNodePort:
		o.Type = service.TypeNodePort
	case corev1.ServiceTypeLoadBalancer:
		o.Type = service.TypeLoadBalancer
	}
	for _, ip := range clusterIPs(s) {
		if ip == corev1.ClusterIPNone {
			o.Headless = true
		} else if addr, err := netip.ParseAddr(ip); err == nil {
			o.ClusterIPs = append(o.ClusterIPs, addr.Unmap())
		}
	}
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		o.Affinity = time.Duration(corev1.DefaultClientIPServiceAffinitySeconds) * time.Second
		if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			o.Affinity = time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
		}
	}
	for i, p := range s.Spec.Ports {
		protocol, known := convertProtocol(p.Protocol)
		if !known {
			o.Problems = append(o.Problems, service.Problem{
				Field:  fmt.Sprintf("spec.ports[%d].protocol", i),
				Detail: fmt.Sprintf("%s is not supported: this port is not served (expected TCP or UDP)", p.Protocol),
			})
			continue
		}
		o.Ports = append(o.Ports, service.Port{Name: intern(p.Name), Protocol: protocol, Port: uint16(p.Port)})
	}
	o.Problems = append(o.Problems, unsupported(s)...)
	return o
}

// unsupported lists what of a Service is not served yet: what comes in from outside the cluster.
func unsupported(s *corev1.Service) []service.Problem {
	var problems []service.Problem
	note := func(field, detail string) {
		problems = append(problems, service.Problem{Field: field, Detail: detail, Minor: true})
	}
	if s.Spec.Type == corev1.ServiceTypeNodePort || s.Spec.Type == corev1.ServiceTypeLoadBalancer {
		if slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool { return p.NodePort != 0 }) {
			note("spec.ports[*].nodePort", "node ports are not served yet")
		}
	}
	if len(s.Status.LoadBalancer.Ingress) > 0 {
		note("status.loadBalancer.ingress", "load-balancer addresses are not served yet")
	}
	if len(s.Spec.ExternalIPs) > 0 {
		note("spec.externalIPs", "external addresses are not served yet")
	}
	return problems
}

// clusterIPs are a Service's addresses; a manifest may give only the older singular field.
func clusterIPs(s *corev1.Service) []string {
	if len(s.Spec.ClusterIPs) == 0 && s.Spec.ClusterIP != "" {
		return []string{s.Spec.ClusterIP}
	}
	return s.Spec.ClusterIPs
}

// convertSlice trims an EndpointSlice; nil: it is none for node proxies (no Service, not IP addresses, another's).
func convertSlice(s *discoveryv1.EndpointSlice) *service.Slice {
	o := &service.Slice{
		Name:    service.Name{Namespace: s.Namespace, Name: s.Name},
		Service: s.Labels[discoveryv1.LabelServiceName],
	}
	if o.Service == "" || foreign(s.Labels) || s.AddressType == discoveryv1.AddressTypeFQDN {
		return nil
	}
	for _, p := range s.Ports {
		if p.Port == nil || *p.Port == 0 {
			continue // No port means "every port", which no Service can refer to.
		}
		name, protocol := "", corev1.ProtocolTCP
		if p.Name != nil {
			name = *p.Name
		}
		if p.Protocol != nil {
			protocol = *p.Protocol
		}
		if number, known := convertProtocol(protocol); known {
			o.Ports = append(o.Ports, service.Port{Name: intern(name), Protocol: number, Port: uint16(*p.Port)})
		}
	}
	o.Endpoints = make([]service.Endpoint, 0, len(s.Endpoints))
	for i := range s.Endpoints {
		if e, ok := convertEndpoint(&s.Endpoints[i]); ok {
			o.Endpoints = append(o.Endpoints, e)
		}
	}
	return o
}

func convertEndpoint(e *discoveryv1.Endpoint) (service.Endpoint, bool) {
	if len(e.Addresses) == 0 {
		return service.Endpoint{}, false
	}
	addr, err := netip.ParseAddr(e.Addresses[0]) // The API says: consumers use the first only.
	if err != nil {
		return service.Endpoint{}, false
	}
	o := service.Endpoint{
		Addr:        addr.Unmap(),
		Ready:       e.Conditions.Ready == nil || *e.Conditions.Ready,
		Serving:     e.Conditions.Serving == nil || *e.Conditions.Serving,
		Terminating: e.Conditions.Terminating != nil && *e.Conditions.Terminating,
	}
	if e.NodeName != nil {
		o.Node = intern(*e.NodeName)
	}
	if e.Zone != nil {
		o.Zone = intern(*e.Zone)
	}
	if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
		o.Pod = e.TargetRef.Name
	}
	return o, true
}

// convertPod trims a Pod. What its namespace says is added by the table.
func convertPod(p *corev1.Pod) *Pod {
	o := &Pod{
		UID:                string(p.UID),
		Namespace:          p.Namespace,
		Name:               p.Name,
		ServiceAccount:     p.Spec.ServiceAccountName,
		NodeName:           p.Spec.NodeName,
		HostNetwork:        p.Spec.HostNetwork,
		Terminal:           p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Deleting:           p.DeletionTimestamp != nil,
		Created:            p.CreationTimestamp.Time,
		Label:              choice(p.Labels),
		AccelerateBlocking: p.Annotations[AccelerateBlockingAnnotation] == "true",
	}
	if o.ServiceAccount == "" {
		o.ServiceAccount = "default"
	}
	for _, ip := range podIPs(p) {
		if addr, err := netip.ParseAddr(ip); err == nil {
			o.IPs = append(o.IPs, addr.Unmap())
		}
	}
	return o
}

func podIPs(p *corev1.Pod) []string {
	if len(p.Status.PodIPs) == 0 && p.Status.PodIP != "" {
		return []string{p.Status.PodIP}
	}
	ips := make([]string, len(p.Status.PodIPs))
	for i, ip := range p.Status.PodIPs {
		ips[i] = ip.IP
	}
	return ips
}

// convertNamespace trims a Namespace, of which only metadata is needed.
func convertNamespace(m *metav1.ObjectMeta) *namespace {
	return &namespace{name: m.Name, label: choice(m.Labels)}
}

// convertNode trims a Node.
func convertNode(n *corev1.Node) *Node {
	o := &Node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone]}
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
			continue
		}
		if addr, err := netip.ParseAddr(a.Address); err == nil {
			o.Addresses = append(o.Addresses, addr.Unmap())
		}
	}
	return o
}

// foreign tells whether labels take an object away from node proxies. The labels' presence counts, not their value.
func foreign(labels map[string]string) bool {
	_, other := labels[labelServiceProxyName]
	_, headless := labels[labelHeadless]
	return other || headless
}

// choice reads EnrollLabel; what is neither true nor false says nothing (and is warned of in manifests).
func choice(labels map[string]string) Choice {
	switch labels[EnrollLabel] {
	case "true":
		return Yes
	case "false":
		return No
	}
	return Unset
}

func convertProtocol(p corev1.Protocol) (service.Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return service.TCP, true
	case corev1.ProtocolUDP:
		return service.UDP, true
	}
	return 0, false
}

// intern shares one copy of strings that stand in thousands of objects (names of nodes, zones and ports).
func intern(s string) string { return unique.Make(s).Value() }
