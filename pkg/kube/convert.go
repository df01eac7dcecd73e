package kube

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
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

// ConvertService trims a Service.
func ConvertService(s *corev1.Service) *service.Object {
	o := &service.Object{
		Name:          service.Name{Namespace: s.Namespace, Name: s.Name},
		UID:           string(s.UID),
		Created:       s.CreationTimestamp.Time,
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
		} else if addr, ok := parseIP(ip); ok {
			o.ClusterIPs = append(o.ClusterIPs, addr)
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
		o.Ports = append(o.Ports, service.Port{Name: intern(p.Name), Protocol: protocol, Port: uint16(p.Port), NodePort: uint16(p.NodePort)})
	}
	convertOutside(s, o)
	return o
}

// convertOutside adds what is for clients outside the cluster. The type of the Service is not asked where the fields
// speak for themselves, as kube-proxy does it: an API server clears them when the type changes.
func convertOutside(s *corev1.Service, o *service.Object) {
	for _, ip := range s.Spec.ExternalIPs {
		if addr, ok := parseIP(ip); ok && !slices.Contains(o.ExternalIPs, addr) {
			o.ExternalIPs = append(o.ExternalIPs, addr)
		}
	}
	for _, ingress := range s.Status.LoadBalancer.Ingress {
		if ingress.IPMode != nil && *ingress.IPMode != corev1.LoadBalancerIPModeVIP {
			continue
		}
		if addr, ok := parseIP(ingress.IP); ok && !slices.Contains(o.LoadBalancerIPs, addr) {
			o.LoadBalancerIPs = append(o.LoadBalancerIPs, addr)
		}
	}
	for _, r := range s.Spec.LoadBalancerSourceRanges {
		if prefix, ok := parseCIDR(r); ok && !slices.Contains(o.SourceRanges, prefix) {
			o.SourceRanges = append(o.SourceRanges, prefix)
		}
	}
	reachable := o.Type == service.TypeNodePort || o.Type == service.TypeLoadBalancer ||
		o.Type == service.TypeClusterIP && len(s.Spec.ExternalIPs) > 0
	o.ExternalLocal = reachable && s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	if o.ExternalLocal && o.Type == service.TypeLoadBalancer {
		o.HealthCheckNodePort = uint16(s.Spec.HealthCheckNodePort)
	}
}

// clusterIPs are a Service's addresses; a manifest may give only the older singular field.
func clusterIPs(s *corev1.Service) []string {
	if len(s.Spec.ClusterIPs) == 0 && s.Spec.ClusterIP != "" {
		return []string{s.Spec.ClusterIP}
	}
	return s.Spec.ClusterIPs
}

// parseIP reads an address. An octet may have leading zeros: API servers took them for long, and still store them.
func parseIP(s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		if addr, err = netip.ParseAddr(leadingZeros.ReplaceAllString(s, "$1")); err != nil {
			return netip.Addr{}, false
		}
	}
	return addr.Unmap(), addr.Zone() == ""
}

var leadingZeros = regexp.MustCompile(`\b0+(\d)`)

// parseCIDR reads a range, which API servers take with blanks around it and with bits set beyond its length.
func parseCIDR(s string) (netip.Prefix, bool) {
	ip, bits, _ := strings.Cut(strings.TrimSpace(s), "/")
	addr, ok := parseIP(ip)
	n, err := strconv.Atoi(bits)
	if !ok || err != nil || strings.HasPrefix(bits, "+") {
		return netip.Prefix{}, false
	}
	prefix, err := addr.Prefix(n)
	return prefix, err == nil
}

// ConvertSlice trims an EndpointSlice; nil: it is none for node proxies (no Service, not IP addresses, another's).
func ConvertSlice(s *discoveryv1.EndpointSlice) *service.Slice {
	o := &service.Slice{
		Name:    service.Name{Namespace: s.Namespace, Name: s.Name},
		Service: s.Labels[discoveryv1.LabelServiceName],
	}
	if o.Service == "" || headless(s.Labels) || s.AddressType == discoveryv1.AddressTypeFQDN {
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
	addr, ok := parseIP(e.Addresses[0]) // The API says: consumers use the first only.
	if !ok {
		return service.Endpoint{}, false
	}
	o := service.Endpoint{
		Addr:        addr,
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
	if e.Hints != nil {
		o.Hints = convertHints(e.Hints)
	}
	if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
		o.Pod = e.TargetRef.Name
	}
	return o, true
}

func convertHints(h *discoveryv1.EndpointHints) service.Hints {
	var zones, nodes []string
	for _, z := range h.ForZones {
		zones = append(zones, z.Name)
	}
	for _, n := range h.ForNodes {
		nodes = append(nodes, n.Name)
	}
	return service.MakeHints(zones, nodes)
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
		if addr, ok := parseIP(ip); ok {
			o.IPs = append(o.IPs, addr)
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

// ConvertNode trims a Node. Of its addresses the internal ones come first, so that the first of a family is the one
// that the cluster knows the node by.
func ConvertNode(n *corev1.Node) *Node {
	o := &Node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone], Leaving: n.DeletionTimestamp != nil}
	for _, t := range n.Spec.Taints {
		o.Leaving = o.Leaving || t.Key == taintToBeDeleted
	}
	for _, t := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range n.Status.Addresses {
			if addr, ok := parseIP(a.Address); ok && a.Type == t {
				o.Addresses = append(o.Addresses, addr)
			}
		}
	}
	return o
}

// taintToBeDeleted is the cluster autoscaler's.
const taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// foreign tells whether labels take a Service away from this proxy. The labels' presence counts, not their value.
func foreign(labels map[string]string) bool {
	_, other := labels[labelServiceProxyName]
	return other || headless(labels)
}

// headless tells whether a label says that no proxy serves an object. Of slices only this label counts: the other one
// is its Service's to say, and a controller copies it to slices late.
func headless(labels map[string]string) bool {
	_, headless := labels[labelHeadless]
	return headless
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
