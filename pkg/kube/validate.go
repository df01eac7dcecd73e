package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// maxAffinitySeconds is the API's limit for sessionAffinityConfig.clientIP.timeoutSeconds.
const maxAffinitySeconds = 86400

// The take functions check a manifest's object as an API server would, as far as it is used here, and convert it. What
// is wrong refuses the object; notes are warnings. Unlike in a cluster nobody fills in cluster IPs.

func takeService(object any) (any, field.ErrorList, []string) {
	s := object.(*corev1.Service)
	wrong := checkMeta(&s.ObjectMeta)
	spec := field.NewPath("spec")
	wrong = append(wrong, checkOneOf(spec.Child("type"), s.Spec.Type, "",
		corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName)...)
	wrong = append(wrong, checkOneOf(spec.Child("sessionAffinity"), s.Spec.SessionAffinity, "", corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP)...)
	if p := s.Spec.InternalTrafficPolicy; p != nil {
		wrong = append(wrong, checkOneOf(spec.Child("internalTrafficPolicy"), *p, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)...)
	}
	if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		if t := *c.ClientIP.TimeoutSeconds; t <= 0 || t > maxAffinitySeconds {
			wrong = append(wrong, field.Invalid(spec.Child("sessionAffinityConfig", "clientIP", "timeoutSeconds"), t,
				fmt.Sprintf("expected 1 to %d", maxAffinitySeconds)))
		}
	}
	if s.Spec.Type != corev1.ServiceTypeExternalName {
		wrong = append(wrong, checkClusterIPs(s, spec)...)
		wrong = append(wrong, checkServicePorts(s, spec.Child("ports"))...)
	}
	wrong = append(wrong, checkOutside(s, spec)...)
	if len(wrong) > 0 {
		return nil, wrong, nil
	}
	fillNamespace(&s.ObjectMeta)
	return ConvertService(s), nil, nil
}

func checkClusterIPs(s *corev1.Service, spec *field.Path) (wrong field.ErrorList) {
	ips := clusterIPs(s)
	if len(ips) == 0 {
		return field.ErrorList{field.Required(spec.Child("clusterIP"), "expected an address, or None: in a folder of manifests nobody assigns one")}
	}
	if len(s.Spec.ClusterIPs) > 0 && s.Spec.ClusterIP != "" && s.Spec.ClusterIP != s.Spec.ClusterIPs[0] {
		wrong = append(wrong, field.Invalid(spec.Child("clusterIP"), s.Spec.ClusterIP, "expected the same as clusterIPs[0]"))
	}
	if len(ips) > 2 {
		wrong = append(wrong, field.TooMany(spec.Child("clusterIPs"), len(ips), 2))
	}
	families := map[bool]bool{}
	for i, ip := range ips {
		path := spec.Child("clusterIPs").Index(i)
		if ip == corev1.ClusterIPNone {
			if len(ips) > 1 {
				wrong = append(wrong, field.Invalid(path, ip, "expected None to stand alone"))
			}
			continue
		}
		addr, bad := checkIP(path, ip)
		wrong = append(wrong, bad...)
		if len(bad) == 0 && families[addr.Is4()] {
			wrong = append(wrong, field.Invalid(path, ip, "expected one address of each family"))
		}
		families[addr.Is4()] = true
	}
	return wrong
}

func checkServicePorts(s *corev1.Service, ports *field.Path) (wrong field.ErrorList) {
	if len(s.Spec.Ports) == 0 && !slices.Contains(clusterIPs(s), corev1.ClusterIPNone) {
		return field.ErrorList{field.Required(ports, "expected at least one port")}
	}
	type number struct {
		port     int32
		protocol corev1.Protocol
	}
	names, numbers := map[string]bool{}, map[number]bool{}
	for i, p := range s.Spec.Ports {
		path := ports.Index(i)
		wrong = append(wrong, checkPort(path.Child("port"), p.Port)...)
		wrong = append(wrong, checkProtocol(path.Child("protocol"), p.Protocol)...)
		if p.Name == "" && len(s.Spec.Ports) > 1 {
			wrong = append(wrong, field.Required(path.Child("name"), "expected a name where there are several ports"))
		}
		if p.Name != "" && names[p.Name] {
			wrong = append(wrong, field.Duplicate(path.Child("name"), p.Name))
		}
		n := number{p.Port, protocolOr(p.Protocol)}
		if numbers[n] {
			wrong = append(wrong, field.Duplicate(path.Child("port"), p.Port))
		}
		names[p.Name], numbers[n] = true, true
	}
	return wrong
}

// checkOutside checks what is for clients outside the cluster.
func checkOutside(s *corev1.Service, spec *field.Path) (wrong field.ErrorList) {
	typed := s.Spec.Type == corev1.ServiceTypeNodePort || s.Spec.Type == corev1.ServiceTypeLoadBalancer
	type number struct {
		port     int32
		protocol corev1.Protocol
	}
	taken := map[number]bool{}
	for i, p := range s.Spec.Ports {
		path := spec.Child("ports").Index(i).Child("nodePort")
		if p.NodePort == 0 {
			continue
		}
		if !typed {
			wrong = append(wrong, field.Forbidden(path, "expected type NodePort or LoadBalancer"))
		}
		wrong = append(wrong, checkPort(path, p.NodePort)...)
		n := number{p.NodePort, protocolOr(p.Protocol)}
		if taken[n] {
			wrong = append(wrong, field.Duplicate(path, p.NodePort))
		}
		taken[n] = true
	}
	for i, ip := range s.Spec.ExternalIPs {
		_, bad := checkIP(spec.Child("externalIPs").Index(i), ip)
		wrong = append(wrong, bad...)
	}
	for i, ingress := range s.Status.LoadBalancer.Ingress {
		path := field.NewPath("status", "loadBalancer", "ingress").Index(i)
		if ingress.IP != "" {
			_, bad := checkIP(path.Child("ip"), ingress.IP)
			wrong = append(wrong, bad...)
		}
		if ingress.IPMode != nil {
			wrong = append(wrong, checkOneOf(path.Child("ipMode"), *ingress.IPMode, corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy)...)
		}
	}
	for i, r := range s.Spec.LoadBalancerSourceRanges {
		if _, ok := parseCIDR(r); !ok {
			wrong = append(wrong, field.Invalid(spec.Child("loadBalancerSourceRanges").Index(i), r, "expected a range, such as 10.9.8.0/24 or 2001:db8::/64"))
		}
	}
	wrong = append(wrong, checkOneOf(spec.Child("externalTrafficPolicy"), s.Spec.ExternalTrafficPolicy, "",
		corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)...)
	if p := s.Spec.HealthCheckNodePort; p != 0 {
		wrong = append(wrong, checkPort(spec.Child("healthCheckNodePort"), p)...)
	}
	return wrong
}

func takeSlice(object any) (any, field.ErrorList, []string) {
	s := object.(*discoveryv1.EndpointSlice)
	wrong := checkMeta(&s.ObjectMeta)
	wrong = append(wrong, checkOneOf(field.NewPath("addressType"), s.AddressType,
		discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN)...)
	for i, e := range s.Endpoints {
		path := field.NewPath("endpoints").Index(i).Child("addresses")
		if len(e.Addresses) == 0 {
			wrong = append(wrong, field.Required(path, "expected at least one address"))
		}
		for j, ip := range e.Addresses {
			if s.AddressType == discoveryv1.AddressTypeFQDN {
				continue
			}
			addr, bad := checkIP(path.Index(j), ip)
			wrong = append(wrong, bad...)
			if len(bad) == 0 && addr.Is4() != (s.AddressType == discoveryv1.AddressTypeIPv4) {
				wrong = append(wrong, field.Invalid(path.Index(j), ip, fmt.Sprintf("expected an address of addressType %s", s.AddressType)))
			}
		}
	}
	for i, p := range s.Ports {
		path := field.NewPath("ports").Index(i)
		if p.Port != nil {
			wrong = append(wrong, checkPort(path.Child("port"), *p.Port)...)
		}
		if p.Protocol != nil {
			wrong = append(wrong, checkProtocol(path.Child("protocol"), *p.Protocol)...)
		}
	}
	if len(wrong) > 0 {
		return nil, wrong, nil
	}
	var notes []string
	if s.Labels[discoveryv1.LabelServiceName] == "" {
		notes = append(notes, fmt.Sprintf("metadata.labels: without %s it belongs to no Service and is ignored", discoveryv1.LabelServiceName))
	}
	fillNamespace(&s.ObjectMeta)
	if slice := ConvertSlice(s); slice != nil {
		return slice, nil, notes
	}
	return nil, nil, notes
}

func takePod(object any) (any, field.ErrorList, []string) {
	p := object.(*corev1.Pod)
	wrong := checkMeta(&p.ObjectMeta)
	status := field.NewPath("status")
	wrong = append(wrong, checkOneOf(status.Child("phase"), p.Status.Phase, "",
		corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed, corev1.PodUnknown)...)
	for i, ip := range podIPs(p) {
		_, bad := checkIP(status.Child("podIPs").Index(i).Child("ip"), ip)
		wrong = append(wrong, bad...)
	}
	if len(wrong) > 0 {
		return nil, wrong, nil
	}
	notes := checkChoice(p.Labels)
	if len(podIPs(p)) == 0 && !p.Spec.HostNetwork {
		notes = append(notes, "status.podIPs: without an address its network namespace cannot be found")
	}
	fillNamespace(&p.ObjectMeta)
	o := convertPod(p)
	if o.UID == "" {
		o.UID = o.Namespace + "/" + o.Name
	}
	return o, nil, notes
}

func takeNamespace(object any) (any, field.ErrorList, []string) {
	n := object.(*corev1.Namespace)
	if wrong := checkMeta(&n.ObjectMeta); len(wrong) > 0 {
		return nil, wrong, nil
	}
	return convertNamespace(&n.ObjectMeta), nil, checkChoice(n.Labels)
}

func takeNode(object any) (any, field.ErrorList, []string) {
	n := object.(*corev1.Node)
	wrong := checkMeta(&n.ObjectMeta)
	for i, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
			_, bad := checkIP(field.NewPath("status", "addresses").Index(i).Child("address"), a.Address)
			wrong = append(wrong, bad...)
		}
	}
	if len(wrong) > 0 {
		return nil, wrong, nil
	}
	return ConvertNode(n), nil, nil
}

func checkMeta(m *metav1.ObjectMeta) (wrong field.ErrorList) {
	path := field.NewPath("metadata")
	for _, problem := range validation.IsDNS1123Subdomain(m.Name) {
		wrong = append(wrong, field.Invalid(path.Child("name"), m.Name, problem))
	}
	if m.Namespace != "" {
		for _, problem := range validation.IsDNS1123Label(m.Namespace) {
			wrong = append(wrong, field.Invalid(path.Child("namespace"), m.Namespace, problem))
		}
	}
	return wrong
}

// checkChoice warns of an enrolment label that says neither.
func checkChoice(labels map[string]string) []string {
	if value, said := labels[EnrollLabel]; said && choice(labels) == Unset {
		return []string{fmt.Sprintf("metadata.labels[%s]: %q says nothing: expected true or false", EnrollLabel, value)}
	}
	return nil
}

func checkIP(path *field.Path, ip string) (netip.Addr, field.ErrorList) {
	addr, err := netip.ParseAddr(ip)
	if err != nil || addr.Zone() != "" {
		return netip.Addr{}, field.ErrorList{field.Invalid(path, ip, "expected an IP address, such as 10.9.8.7 or 2001:db8::ffff")}
	}
	return addr.Unmap(), nil
}

func checkPort(path *field.Path, port int32) field.ErrorList {
	if port < 1 || port > 65535 {
		return field.ErrorList{field.Invalid(path, port, "expected 1 to 65535")}
	}
	return nil
}

func checkProtocol(path *field.Path, p corev1.Protocol) field.ErrorList {
	return checkOneOf(path, p, "", corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
}

func checkOneOf[T ~string](path *field.Path, value T, allowed ...T) field.ErrorList {
	if slices.Contains(allowed, value) {
		return nil
	}
	names := make([]string, 0, len(allowed))
	for _, a := range allowed {
		if a != "" {
			names = append(names, string(a))
		}
	}
	return field.ErrorList{field.Invalid(path, string(value), "expected "+strings.Join(names, ", "))}
}

func protocolOr(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}

func fillNamespace(m *metav1.ObjectMeta) {
	if m.Namespace == "" {
		m.Namespace = metav1.NamespaceDefault
	}
}
