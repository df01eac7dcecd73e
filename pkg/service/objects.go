package service

import (
	"net/netip"
	"slices"
	"time"
)

// The objects below are what this package needs of the Kubernetes objects of the same name. pkg/kube makes them from
// API objects; they are never changed once handed over, so that sources and Store can share them. A cluster may have
// 250,000 endpoints, so an Endpoint is small and its strings are shared.

// Object is a Service.
type Object struct {
	Name Name
	UID  string
	// Created orders Services that want one address.
	Created time.Time
	// Type is spec.type.
	Type Type
	// Headless: clusterIP None.
	Headless bool
	// Foreign: another proxy's, by label (service-proxy-name), or not for proxies at all (headless).
	Foreign bool
	// ClusterIPs of either family, at most one of each.
	ClusterIPs []netip.Addr
	Ports      []Port
	// LoadBalancerIPs are those ingress addresses of the status that this node short-cuts: ipMode VIP. What has ipMode
	// Proxy is not kept, because the load balancer itself must see it.
	LoadBalancerIPs []netip.Addr
	ExternalIPs     []netip.Addr
	// SourceRanges is loadBalancerSourceRanges.
	SourceRanges []netip.Prefix
	// Affinity is sessionAffinity ClientIP's time-out; 0: no affinity.
	Affinity time.Duration
	// InternalLocal is internalTrafficPolicy Local.
	InternalLocal bool
	// ExternalLocal is externalTrafficPolicy Local.
	ExternalLocal bool
	// HealthCheckNodePort is 0 unless the Service is a load balancer's with externalTrafficPolicy Local.
	HealthCheckNodePort uint16
	// Problems found in the object, passed on to Service.
	Problems []Problem
}

// Type is a Service's spec.type.
type Type uint8

// Service types.
const (
	TypeClusterIP Type = iota
	TypeNodePort
	TypeLoadBalancer
	TypeExternalName
)

// Port is a port of a Service or slice. A Service's targetPort is not kept: slices carry resolved numbers.
type Port struct {
	Name     string
	Protocol Protocol
	Port     uint16
	// NodePort of a Service's port; 0: none.
	NodePort uint16
}

// Problem is something in an object that the data plane cannot honour.
type Problem struct {
	// Field is the path within the object, Detail what is wrong and what was expected.
	Field  string
	Detail string
	// Minor: worth listing, not worth telling the object's owner.
	Minor bool
	// Reason is the Event's, one CamelCase word; "": Unsupported. Cure says what would help, where it isn't plain.
	Reason, Cure string
}

// Equal tells whether two versions of a Service mean the same.
func (o *Object) Equal(b *Object) bool {
	return o.Name == b.Name && o.UID == b.UID && o.Created.Equal(b.Created) && o.Type == b.Type && o.Headless == b.Headless && o.Foreign == b.Foreign &&
		o.Affinity == b.Affinity && o.InternalLocal == b.InternalLocal && o.ExternalLocal == b.ExternalLocal &&
		o.HealthCheckNodePort == b.HealthCheckNodePort && slices.Equal(o.ClusterIPs, b.ClusterIPs) &&
		slices.Equal(o.Ports, b.Ports) && slices.Equal(o.LoadBalancerIPs, b.LoadBalancerIPs) &&
		slices.Equal(o.ExternalIPs, b.ExternalIPs) && slices.Equal(o.SourceRanges, b.SourceRanges) &&
		slices.Equal(o.Problems, b.Problems)
}

// ours tells whether this Service has addresses that a node proxy serves.
func (o *Object) ours() bool {
	return !o.Foreign && !o.Headless && o.Type != TypeExternalName && len(o.ClusterIPs) > 0
}

// hasNodePort tells whether any port has a node port.
func (o *Object) hasNodePort() bool {
	return slices.ContainsFunc(o.Ports, func(p Port) bool { return p.NodePort != 0 })
}

// Slice is an EndpointSlice.
type Slice struct {
	// Name of the slice, not of its Service.
	Name Name
	// Service is the name in its service-name label.
	Service string
	// Ports that every endpoint of the slice has. Two slices of a Service may give one port name different numbers:
	// that is how a named targetPort differs between pods.
	Ports     []Port
	Endpoints []Endpoint
}

// Equal tells whether two versions of a slice mean the same.
func (s *Slice) Equal(b *Slice) bool {
	return s.Name == b.Name && s.Service == b.Service && slices.Equal(s.Ports, b.Ports) && slices.Equal(s.Endpoints, b.Endpoints)
}

// Endpoint is an endpoint of a slice. The conditions are resolved: absent ready and serving are true.
type Endpoint struct {
	Addr        netip.Addr
	Node        string
	Zone        string
	Pod         string // name of the pod, which is in the slice's namespace
	Ready       bool
	Serving     bool
	Terminating bool
	Hints       Hints
}

// rank orders observations of one address: an address may stand in two slices while it moves between them, or belong
// to a terminating pod and to the one that took over its address. The living one counts.
func (e *Endpoint) rank() int {
	rank := 0
	if !e.Terminating {
		rank += 4
	}
	if e.Ready {
		rank += 2
	}
	if e.Serving {
		rank++
	}
	return rank
}
