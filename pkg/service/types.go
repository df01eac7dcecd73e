// Package service holds Kubernetes Service semantics as pure functions: objects in, frontends and backends out.
//
// Data flows from pkg/kube (Service, EndpointSlice, Node objects) through this package to pkg/datapath, which
// writes the BPF maps. It must never do I/O and never depend on the order in which objects arrive.
package service

import (
	"net/netip"
	"time"
)

// Protocol is the transport of a Service port.
type Protocol uint8

// Transports, as IANA numbers.
const (
	TCP Protocol = 6
	UDP Protocol = 17
)

// String is the Kubernetes spelling.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	}
	return "?"
}

// Name identifies a Service.
type Name struct{ Namespace, Name string }

// String is namespace/name.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Kind is what sort of address a frontend is.
type Kind uint8

// Kinds of frontend. Where one Service has an address and port twice, or two Services want the same, the lower kind has
// it: what a tenant may write into externalIPs never takes what the cluster gave out.
const (
	ClusterIP Kind = iota
	NodePort
	LoadBalancer
	ExternalIP
)

// Frontend is one address, port and protocol that clients use, with the backends that may serve it now.
//
// Clients are of two sorts. Those inside connect from this node: its pods, its host-network pods and processes. For
// them an address of kind NodePort, LoadBalancer or ExternalIP is a short cut that goes by no policy and no source range,
// as if they had gone out to the load balancer and come in again. Those outside send packets that arrive at this node.
//
// A pod may be its own backend (hairpin): at connect time that is a connection to itself like any other, so nothing
// is said of it here.
type Frontend struct {
	Addr     netip.AddrPort
	Protocol Protocol
	Kind     Kind
	PortName string
	// Affinity is how long a client stays with its backend; 0: no affinity.
	Affinity time.Duration
	// Backends that take new connections from inside; empty means refuse at once.
	Backends []Backend
	// External is how connections from outside are served; nil for kind ClusterIP, which has no outside.
	External *External
}

// External is how a frontend serves clients outside. Frontends of one Service may share one.
type External struct {
	// Backends that take new connections. The slice may be the frontend's own.
	Backends []Backend
	// Local is externalTrafficPolicy Local: the backends are on this node, and see the client's own address. Without it
	// backends are anywhere, so answers have to come back through this node (SNAT).
	Local bool
	// Silent says what a client gets where Backends is empty: no answer, because other nodes have backends and a load
	// balancer is to try them; else a refusal.
	Silent bool
	// Sources may connect, others get no answer; empty: all may. Only kind LoadBalancer has them.
	Sources []netip.Prefix
}

// Backend is one endpoint address.
type Backend struct {
	Addr netip.AddrPort
	Node string
	Zone string
	// Local: on this node.
	Local bool
	// Terminating: only used while no ready one exists.
	Terminating bool
	// Pod is namespace/name where known.
	Pod string
}

// Service is everything that one Kubernetes Service means to the data plane on this node.
type Service struct {
	Name Name
	UID  string
	// Frontends of all kinds that sockets of this node may connect to, whichever network namespace they are in; no two
	// have the same address and protocol.
	Frontends []Frontend
	// Loopback are the node ports on the host's loopback addresses. They stand apart because they are for sockets in the
	// host's network namespace only: a pod's loopback is its own.
	Loopback []Frontend
	// InternalLocal and ExternalLocal are the traffic policies.
	InternalLocal, ExternalLocal bool
	// HealthCheck is what load balancers ask of this node; nil: nothing.
	HealthCheck *HealthCheck
	// Excluded says of endpoints that are not used why.
	Excluded []Excluded
	// Problems are parts of the Service that the data plane cannot honour.
	Problems []Problem
}

// HealthCheck is a port where load balancers ask over HTTP whether to send this node the Service's connections: yes
// (200) while it has a local ready endpoint, no (503) else. Terminating endpoints still serve but don't count: the load
// balancer is to look elsewhere.
type HealthCheck struct {
	Port uint16
	// Addresses that it is asked on: those where node ports are served. Services share the slice.
	Addresses []netip.Addr
	// LocalReady4 and LocalReady6 count the addresses of ready endpoints on this node, by family.
	LocalReady4, LocalReady6 int
}

// Excluded is an endpoint that takes no traffic, and why.
type Excluded struct {
	Addr   netip.AddrPort
	Reason string
	// Endpoint is what its slice says of it.
	Endpoint *Endpoint
}
