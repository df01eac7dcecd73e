package kubeproxy

import (
	"fmt"
	"net"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// nodeIPs are the addresses on which the node serves node ports.
var nodeIPs = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::1")}

func nodePortIPs(family corev1.IPFamily) []net.IP {
	var out []net.IP
	for _, ip := range nodeIPs {
		if ip.Is4() == (family == corev1.IPv4Protocol) {
			out = append(out, ip.AsSlice())
		}
	}
	return out
}

// subject is sockmesh: conversion and store, and all that the store has said so far. fault, if there is one, spoils
// objects on their way, to see whether the test notices.
type subject struct {
	store *service.Store
	known map[service.Name]*service.Service
	// families that Services have, of which a health check says nothing.
	families map[service.Name]map[bool]bool
	fault    *fault
}

func newSubject(f *fault) *subject {
	return &subject{
		store: service.NewStore(service.Node{Name: thisNode, NodePorts: nodeIPs, Outside: true}),
		known: map[service.Name]*service.Service{}, families: map[service.Name]map[bool]bool{}, fault: f,
	}
}

func (s *subject) apply(c *change) {
	switch {
	case c.Service != nil:
		o := kube.ConvertService(c.Service)
		if s.fault != nil && s.fault.object != nil {
			s.fault.object(o)
		}
		s.families[o.Name] = map[bool]bool{}
		for _, ip := range o.ClusterIPs {
			s.families[o.Name][ip.Is4()] = true
		}
		s.store.SetService(o)
	case c.DeleteService != "":
		s.store.DeleteService(service.Name{Namespace: namespace, Name: c.DeleteService})
	case c.Slice != nil:
		slice := kube.ConvertSlice(c.Slice)
		if slice == nil {
			s.store.DeleteSlice(service.Name{Namespace: namespace, Name: c.Slice.Name})
			return
		}
		if s.fault != nil && s.fault.slice != nil {
			s.fault.slice(slice)
		}
		s.store.SetSlice(slice)
	case c.DeleteSlice != "":
		s.store.DeleteSlice(service.Name{Namespace: namespace, Name: c.DeleteSlice})
	case c.Node != nil:
		n := kube.ConvertNode(c.Node)
		node := service.Node{Name: n.Name, Zone: n.Zone, NodePorts: nodeIPs, Outside: true}
		if s.fault != nil && s.fault.node != nil {
			s.fault.node(&node)
		}
		s.store.SetNode(node)
	}
}

// meaning takes in what changed and writes down what is known.
func (s *subject) meaning() meaning {
	for name, svc, ok := s.store.Next(); ok; name, svc, ok = s.store.Next() {
		if svc == nil {
			delete(s.known, name)
		} else {
			s.known[name] = svc
		}
	}
	m := meaning{}
	for _, svc := range s.known {
		name := types.NamespacedName{Namespace: svc.Name.Namespace, Name: svc.Name.Name}
		for i := range svc.Frontends {
			f := &svc.Frontends[i]
			out := served{kind: kinds[f.Kind], port: f.PortName, affinity: f.Affinity, inside: backends(f.Backends)}
			if x := f.External; x != nil {
				out.outside, out.local, out.silent = backends(x.Backends), x.Local, x.Silent
				for _, r := range x.Sources {
					out.sources = append(out.sources, r.String())
				}
			}
			key := meaningKey(name, f.Addr.String(), f.Protocol.String())
			if _, twice := m[key]; twice {
				m[key+" again"] = "a frontend twice"
			}
			m[key] = out.String()
		}
		if h := svc.HealthCheck; h != nil {
			for v4, ready := range map[bool]int{true: h.LocalReady4, false: h.LocalReady6} {
				if !s.families[svc.Name][v4] {
					continue
				}
				m[fmt.Sprintf("%s health check %s", name, familyOf(v4))] = fmt.Sprintf("port=%d ready=%d", h.Port, ready)
			}
		}
	}
	return m
}

func familyOf(v4 bool) corev1.IPFamily {
	if v4 {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

var kinds = map[service.Kind]string{service.ClusterIP: "ClusterIP", service.NodePort: "NodePort", service.LoadBalancer: "LoadBalancer", service.ExternalIP: "ExternalIP"}

func backends(list []service.Backend) []string {
	out := make([]string, 0, len(list))
	for _, b := range list {
		out = append(out, address(b.Addr.String(), b.Local, b.Terminating))
	}
	return out
}
