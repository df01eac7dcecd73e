package kubeproxy

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/proxy"
)

// oracle is kube-proxy up to the point where it writes rules: its trackers for both families, as its proxiers use them.
type oracle struct {
	families map[corev1.IPFamily]*oracleFamily
	zone     map[string]string // topology labels
	// selected is what kube-proxy's informers let through.
	services map[string]*corev1.Service
	slices   map[string]*discoveryv1.EndpointSlice
}

type oracleFamily struct {
	services  *proxy.ServiceChangeTracker
	endpoints *proxy.EndpointsChangeTracker
	ports     proxy.ServicePortMap
	eps       proxy.EndpointsMap
}

func newOracle() *oracle {
	o := &oracle{families: map[corev1.IPFamily]*oracleFamily{}, services: map[string]*corev1.Service{}, slices: map[string]*discoveryv1.EndpointSlice{}}
	for _, f := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		o.families[f] = &oracleFamily{
			services:  proxy.NewServiceChangeTracker(f, nil, nil),
			endpoints: proxy.NewEndpointsChangeTracker(f, thisNode, nil, nil),
			ports:     proxy.ServicePortMap{},
			eps:       proxy.EndpointsMap{},
		}
	}
	return o
}

// apply takes a change as kube-proxy's informers would tell it, selectors included (cmd/kube-proxy/app/server.go).
func (o *oracle) apply(c *change) {
	switch {
	case c.Service != nil:
		now := c.Service
		if _, other := now.Labels[labelServiceProxyName]; other || now.Spec.ClusterIP == corev1.ClusterIPNone {
			now = nil
		}
		o.setService(c.Service.Name, now)
	case c.DeleteService != "":
		o.setService(c.DeleteService, nil)
	case c.Slice != nil:
		now := c.Slice
		if _, headless := now.Labels[corev1.IsHeadlessService]; headless {
			now = nil
		}
		o.setSlice(c.Slice.Name, now)
	case c.DeleteSlice != "":
		o.setSlice(c.DeleteSlice, nil)
	case c.Node != nil:
		o.zone = map[string]string{}
		if zone, ok := c.Node.Labels[corev1.LabelTopologyZone]; ok {
			o.zone[corev1.LabelTopologyZone] = zone
		}
	}
}

func (o *oracle) setService(name string, now *corev1.Service) {
	was := o.services[name]
	for _, f := range o.families {
		f.services.Update(was, now)
	}
	delete(o.services, name)
	if now != nil {
		o.services[name] = now
	}
}

func (o *oracle) setSlice(name string, now *discoveryv1.EndpointSlice) {
	was := o.slices[name]
	if was != nil && (now == nil || relabelled(was, now)) {
		for _, f := range o.families {
			f.endpoints.EndpointSliceUpdate(was, true)
		}
	}
	delete(o.slices, name)
	if now != nil {
		o.slices[name] = now
		for _, f := range o.families {
			f.endpoints.EndpointSliceUpdate(now, false)
		}
	}
}

// meaning is what kube-proxy's proxiers do with their maps (iptables, nftables and ipvs alike), written down instead of
// turned into rules.
func (o *oracle) meaning() meaning {
	m := meaning{}
	for family, f := range o.families {
		f.ports.Update(f.services)
		f.eps.Update(f.endpoints)
		for name, port := range f.ports {
			if port.Protocol() == corev1.ProtocolSCTP {
				noted(differenceSCTP)
				continue
			}
			o.port(m, family, name, port, f.eps[name])
		}
		ready := withoutSCTP(f.eps).LocalReadyEndpoints()
		for name, port := range f.ports.HealthCheckNodePorts() {
			m[fmt.Sprintf("%s health check %s", name, family)] = fmt.Sprintf("port=%d ready=%d", port, ready[name])
		}
	}
	return m
}

func (o *oracle) port(m meaning, family corev1.IPFamily, name proxy.ServicePortName, port proxy.ServicePort, all []proxy.Endpoint) {
	cluster, local, _, any := proxy.CategorizeEndpoints(all, port, thisNode, o.zone)
	inside, outside := cluster, cluster
	if port.InternalPolicyLocal() {
		inside = local
	}
	if port.ExternalPolicyLocal() {
		outside = local
	}
	s := served{port: name.Port, affinity: time.Duration(port.StickyMaxAgeSeconds()) * time.Second, inside: addresses(inside)}
	add := func(kind string, ip net.IP, number int, sources []string) {
		key := meaningKey(name.NamespacedName, net.JoinHostPort(ip.String(), strconv.Itoa(number)), string(port.Protocol()))
		if _, taken := m[key]; taken {
			return // By a kind of frontend that comes before; it leads to the same endpoints.
		}
		s.kind, s.sources = kind, sources
		m[key] = s.String()
	}
	add("ClusterIP", port.ClusterIP(), port.Port(), nil)
	// "Locally originated" traffic to all other addresses goes to the endpoints of policy Cluster.
	s.inside, s.outside, s.local = addresses(cluster), addresses(outside), port.ExternalPolicyLocal()
	s.silent = any && len(outside) == 0
	if port.NodePort() != 0 {
		for _, ip := range nodePortIPs(family) {
			add("NodePort", ip, port.NodePort(), nil)
		}
	}
	var sources []string
	for _, r := range port.LoadBalancerSourceRanges() {
		sources = append(sources, r.String())
	}
	for _, ip := range port.LoadBalancerVIPs() {
		add("LoadBalancer", ip, port.Port(), unique(sources))
	}
	for _, ip := range port.ExternalIPs() {
		add("ExternalIP", ip, port.Port(), nil)
	}
}

// addresses of endpoints, with what sockmesh says of them beside.
func addresses(eps []proxy.Endpoint) []string {
	out := make([]string, 0, len(eps))
	for _, e := range eps {
		out = append(out, address(e.String(), e.IsLocal(), !e.IsReady()))
	}
	return out
}

func address(addr string, local, terminating bool) string {
	if local {
		addr += "(local)"
	}
	if terminating {
		addr += "(terminating)"
	}
	return addr
}

func meaningKey(name types.NamespacedName, addr, protocol string) string {
	var b strings.Builder
	b.WriteString(name.Namespace)
	b.WriteByte('/')
	b.WriteString(name.Name)
	b.WriteByte(' ')
	b.WriteString(addr)
	b.WriteByte('/')
	b.WriteString(protocol)
	return b.String()
}

func unique(list []string) []string {
	var out []string
	seen := map[string]bool{}
	for _, s := range list {
		if !seen[s] {
			out = append(out, s)
		}
		seen[s] = true
	}
	return out
}
