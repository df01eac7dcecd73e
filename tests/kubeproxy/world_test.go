package kubeproxy

import (
	"fmt"
	"math/rand/v2"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	namespace             = "default"
	thisNode              = "here"
	labelServiceProxyName = "service.kubernetes.io/service-proxy-name"
)

// change is one step of a world: one of the fields, in the form in which a failure is printed. Hold: the next change
// comes before anybody looks.
type change struct {
	Service       *corev1.Service            `json:"service,omitempty"`
	DeleteService string                     `json:"deleteService,omitempty"`
	Slice         *discoveryv1.EndpointSlice `json:"slice,omitempty"`
	DeleteSlice   string                     `json:"deleteSlice,omitempty"`
	Node          *corev1.Node               `json:"node,omitempty"`
	Hold          bool                       `json:"hold,omitempty"`
}

// world makes random changes. Its Services differ in all that the API lets differ; addresses are taken from small sets, so
// that one endpoint is often in several slices, and of several Services none has another's address.
type world struct {
	*rand.Rand
	services map[string]*corev1.Service
	slices   map[string]*discoveryv1.EndpointSlice
}

func newWorld(seed uint64) *world {
	return &world{rand.New(rand.NewPCG(seed, 7)), map[string]*corev1.Service{}, map[string]*discoveryv1.EndpointSlice{}}
}

func (w *world) one(in int) bool { return w.IntN(in) == 0 }

func pick[T any](w *world, list ...T) T { return list[w.IntN(len(list))] }

// some picks up to n values, in random order.
func some[T any](w *world, n int, list ...T) []T {
	w.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list[:w.IntN(min(n, len(list))+1)]
}

const servicesPerWorld = 2

// next makes one change.
func (w *world) next() *change {
	c := &change{Hold: w.one(4)}
	service := w.IntN(servicesPerWorld)
	name := fmt.Sprintf("s%d", service)
	slice := fmt.Sprintf("x%d", w.IntN(4))
	switch p := w.IntN(100); {
	case p < 40:
		c.Service = w.service(service, w.services[name])
		w.services[name] = c.Service
	case p < 45:
		delete(w.services, name)
		c.DeleteService = name
	case p < 90:
		c.Slice = w.slice(slice, w.slices[slice])
		w.slices[slice] = c.Slice
	case p < 95:
		delete(w.slices, slice)
		c.DeleteSlice = slice
	default:
		c.Node = &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: thisNode}}
		if !w.one(4) {
			c.Node.Labels = map[string]string{corev1.LabelTopologyZone: w.zone()}
		}
	}
	return c
}

// service makes a new Service, or changes one aspect of an old one.
func (w *world) service(i int, old *corev1.Service) *corev1.Service {
	aspects := []func(int, *corev1.Service){w.addresses, w.ports, w.policies, w.affinity, w.loadBalancer, w.externalIPs, w.labels}
	if old != nil && !w.one(4) {
		s := old.DeepCopy()
		pick(w, aspects...)(i, s)
		return w.consistent(s)
	}
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("s%d", i)}}
	for _, a := range aspects {
		a(i, s)
	}
	return w.consistent(s)
}

// addresses: type and cluster IPs.
func (w *world) addresses(i int, s *corev1.Service) {
	v4, v6 := fmt.Sprintf("10.96.0.%d", i+1), fmt.Sprintf("fd00::%d", i+1)
	s.Spec.Type = pick(w, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer,
		corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeLoadBalancer)
	four, six := corev1.IPv4Protocol, corev1.IPv6Protocol
	switch w.IntN(12) {
	case 0:
		s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{corev1.ClusterIPNone}, []corev1.IPFamily{four}
		s.Spec.Type = corev1.ServiceTypeClusterIP
	case 1:
		s.Spec.Type = corev1.ServiceTypeExternalName
		if s.Spec.ClusterIPs, s.Spec.IPFamilies = nil, nil; w.one(2) {
			s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{v4}, []corev1.IPFamily{four} // As old API servers left it.
		}
	case 2:
		s.Spec.ClusterIPs, s.Spec.IPFamilies = nil, nil // Not given one yet.
	case 3:
		s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{pick(w, v4, v6)}, nil // From before dual stack.
	case 4:
		s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{v6}, []corev1.IPFamily{six}
	case 5:
		s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{v6, v4}, []corev1.IPFamily{six, four}
	case 6, 7:
		s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{v4, v6}, []corev1.IPFamily{four, six}
	default:
		s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{v4}, []corev1.IPFamily{four}
	}
	s.Spec.ClusterIP = ""
	if len(s.Spec.ClusterIPs) > 0 {
		s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
	}
	if s.Spec.IPFamilies == nil && w.one(2) {
		s.Spec.ClusterIPs = nil
		if s.Spec.ClusterIP != "" {
			s.Spec.ClusterIPs = []string{s.Spec.ClusterIP}
		}
	}
}

// ports: names, numbers and protocols, the same number with several protocols among them.
func (w *world) ports(i int, s *corev1.Service) {
	all := []corev1.ServicePort{
		{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "admin", Protocol: corev1.ProtocolTCP, Port: 81},
		{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53}, {Name: "dns-tcp", Protocol: corev1.ProtocolTCP, Port: 53},
		{Name: "sctp", Protocol: corev1.ProtocolSCTP, Port: 80},
	}
	if w.one(8) {
		all = []corev1.ServicePort{{Protocol: pick(w, corev1.ProtocolTCP, corev1.ProtocolUDP), Port: 80}}
	}
	for s.Spec.Ports = nil; len(s.Spec.Ports) == 0; {
		s.Spec.Ports = some(w, 3, all...)
	}
	for p := range s.Spec.Ports {
		if !w.one(3) {
			s.Spec.Ports[p].NodePort = int32(30000 + 10*i + p)
		}
	}
}

func (w *world) policies(_ int, s *corev1.Service) {
	s.Spec.InternalTrafficPolicy = pick(w, nil, new(corev1.ServiceInternalTrafficPolicyCluster), new(corev1.ServiceInternalTrafficPolicyLocal))
	s.Spec.ExternalTrafficPolicy = pick(w, "", corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal, corev1.ServiceExternalTrafficPolicyLocal)
	s.Spec.HealthCheckNodePort = pick(w, 0, 31000, 31001, int32(31002))
	s.Spec.PublishNotReadyAddresses = w.one(5)
	s.Spec.TrafficDistribution = pick(w, nil, new(corev1.ServiceTrafficDistributionPreferSameZone), new(corev1.ServiceTrafficDistributionPreferSameNode))
}

func (w *world) affinity(_ int, s *corev1.Service) {
	s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = corev1.ServiceAffinityNone, nil
	if w.one(3) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: pick(w, new(int32(10800)), new(int32(1)), new(int32(86400)))}}
	}
}

func (w *world) loadBalancer(i int, s *corev1.Service) {
	vip, proxied := new(corev1.LoadBalancerIPModeVIP), new(corev1.LoadBalancerIPModeProxy)
	s.Status.LoadBalancer.Ingress = nil
	for _, ip := range some(w, 3, fmt.Sprintf("203.0.113.%d", 10*i+1), fmt.Sprintf("203.0.113.%d", 10*i+2), fmt.Sprintf("203.0.113.0%d", 10*i+2),
		fmt.Sprintf("2001:db8:1::%d", i), "") {
		ingress := corev1.LoadBalancerIngress{IP: ip, IPMode: pick(w, nil, vip, vip, proxied)}
		if ip == "" {
			ingress = corev1.LoadBalancerIngress{Hostname: "lb.example.com"}
		}
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, ingress)
	}
	s.Spec.LoadBalancerSourceRanges = nil
	if w.one(2) {
		s.Spec.LoadBalancerSourceRanges = some(w, 3, "198.18.0.0/15", " 10.0.0.0/8 ", "192.168.1.77/24", "192.168.1.0/24", "2001:db8::/32", "fd00::1/64",
			pick(w, "0.0.0.0/0", "::/0", "172.16.0.0/12"))
	}
}

func (w *world) externalIPs(i int, s *corev1.Service) {
	s.Spec.ExternalIPs = nil
	if w.one(3) {
		s.Spec.ExternalIPs = some(w, 3, fmt.Sprintf("198.51.100.%d", i+1), fmt.Sprintf("198.51.100.00%d", i+1), fmt.Sprintf("2001:db8:2::%d", i),
			fmt.Sprintf("203.0.113.%d", 10*i+1), fmt.Sprintf("10.96.0.%d", i+1))
	}
}

func (w *world) labels(_ int, s *corev1.Service) {
	s.Labels = nil
	if w.one(15) {
		s.Labels = map[string]string{labelServiceProxyName: pick(w, "", "other")}
	}
}

// consistent clears what an API server would not store together.
func (w *world) consistent(s *corev1.Service) *corev1.Service {
	typed := s.Spec.Type == corev1.ServiceTypeNodePort || s.Spec.Type == corev1.ServiceTypeLoadBalancer
	if !typed {
		for i := range s.Spec.Ports {
			s.Spec.Ports[i].NodePort = 0
		}
	}
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		s.Status.LoadBalancer.Ingress, s.Spec.LoadBalancerSourceRanges = nil, nil
	}
	return s
}

func (w *world) zone() string { return pick(w, "a", "b", "c") }

// slice makes a new EndpointSlice, or changes one aspect of an old one.
func (w *world) slice(name string, old *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	if old != nil && !w.one(4) {
		s := old.DeepCopy()
		switch {
		case len(s.Endpoints) > 0 && !w.one(3):
			w.mutate(s.AddressType, &s.Endpoints[w.IntN(len(s.Endpoints))])
		case w.one(3):
			w.slicePorts(s)
		case w.one(8):
			w.sliceLabels(s)
		default:
			w.endpoints(s)
		}
		return s
	}
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name},
		AddressType: pick(w, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6),
	}
	if old != nil {
		s.AddressType = old.AddressType // Nobody can change it.
	} else if w.one(30) {
		s.AddressType = discoveryv1.AddressTypeFQDN
	}
	w.sliceLabels(s)
	w.slicePorts(s)
	w.endpoints(s)
	return s
}

func (w *world) sliceLabels(s *discoveryv1.EndpointSlice) {
	s.Labels = map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("s%d", w.IntN(servicesPerWorld))}
	switch w.IntN(30) {
	case 0:
		delete(s.Labels, discoveryv1.LabelServiceName)
	case 1:
		s.Labels[corev1.IsHeadlessService] = ""
	case 2:
		s.Labels[labelServiceProxyName] = "other"
	}
}

// slicePorts: names as Services have them, with numbers that differ from slice to slice; missing and odd ones too.
func (w *world) slicePorts(s *discoveryv1.EndpointSlice) {
	port := func(name string, protocol corev1.Protocol, numbers ...int32) discoveryv1.EndpointPort {
		return discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: new(pick(w, numbers...))}
	}
	s.Ports = some(w, 6, port("http", corev1.ProtocolTCP, 8080, 9090), port("http", corev1.ProtocolTCP, 8080), port("admin", corev1.ProtocolTCP, 8081), port("dns", corev1.ProtocolUDP, 5353),
		port("dns-tcp", corev1.ProtocolTCP, 5353), port("sctp", corev1.ProtocolSCTP, 8080), port("", corev1.ProtocolTCP, 8080), port("", corev1.ProtocolUDP, 8080),
		port("http", corev1.ProtocolUDP, 8080), port("other", corev1.ProtocolTCP, 7070))
	if len(s.Ports) > 0 && w.one(15) {
		s.Ports[0].Port = pick(w, nil, new(int32(0)))
	}
}

func (w *world) endpoints(s *discoveryv1.EndpointSlice) {
	s.Endpoints = make([]discoveryv1.Endpoint, w.IntN(4))
	for i := range s.Endpoints {
		w.endpointAddress(s.AddressType, &s.Endpoints[i])
		w.conditions(s.AddressType, &s.Endpoints[i])
		w.place(s.AddressType, &s.Endpoints[i])
		w.hints(s.AddressType, &s.Endpoints[i])
	}
	// As a controller gives them: all or none.
	switch w.IntN(4) {
	case 0:
		for i := range s.Endpoints {
			s.Endpoints[i].Hints = nil
		}
	case 1:
		for i := range s.Endpoints {
			s.Endpoints[i].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: w.zone()}}}
			if w.one(2) {
				s.Endpoints[i].Hints.ForNodes = []discoveryv1.ForNode{{Name: pick(w, thisNode, "there")}}
			}
		}
	}
}

func (w *world) mutate(t discoveryv1.AddressType, e *discoveryv1.Endpoint) {
	pick(w, w.endpointAddress, w.conditions, w.conditions, w.place, w.hints)(t, e)
}

func (w *world) endpointAddress(t discoveryv1.AddressType, e *discoveryv1.Endpoint) {
	n := w.IntN(40)
	if w.one(8) {
		n = 50 + w.IntN(2)
	}
	switch t {
	case discoveryv1.AddressTypeIPv4:
		e.Addresses = []string{fmt.Sprintf(pick(w, "10.0.0.%d", "10.0.0.%d", "10.0.0.%d", "10.0.00.0%d"), n), "10.0.0.99"}[:1+w.IntN(2)]
	case discoveryv1.AddressTypeIPv6:
		e.Addresses = []string{fmt.Sprintf(pick(w, "fd01::%d", "fd01::%d", "fd01:0::0%d"), n)}
	default:
		e.Addresses = []string{"www.example.com"}
	}
}

func (w *world) conditions(_ discoveryv1.AddressType, e *discoveryv1.Endpoint) {
	condition := func(often *bool) *bool { return pick(w, often, often, often, nil, new(true), new(false)) }
	switch w.IntN(3) {
	case 0: // ready
		e.Conditions = discoveryv1.EndpointConditions{Ready: condition(new(true)), Serving: condition(new(true)), Terminating: condition(new(false))}
	case 1: // draining
		e.Conditions = discoveryv1.EndpointConditions{Ready: condition(new(false)), Serving: condition(new(true)), Terminating: condition(new(true))}
	case 2:
		e.Conditions = discoveryv1.EndpointConditions{Ready: condition(new(false)), Serving: condition(new(false)), Terminating: condition(nil)}
	}
}

func (w *world) place(_ discoveryv1.AddressType, e *discoveryv1.Endpoint) {
	e.NodeName = pick(w, new(thisNode), new(thisNode), new("there"), nil)
	e.Zone = pick(w, nil, new(w.zone()))
	e.TargetRef = nil
	if w.one(2) {
		e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: "p" + strings.Repeat("x", w.IntN(3))}
	}
}

func (w *world) hints(_ discoveryv1.AddressType, e *discoveryv1.Endpoint) {
	e.Hints = nil
	if w.one(3) {
		return
	}
	e.Hints = &discoveryv1.EndpointHints{}
	for _, z := range some(w, 2, "a", "b", "c") {
		e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: z})
	}
	for _, n := range some(w, 2, thisNode, "there", "elsewhere") {
		e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: n})
	}
}
