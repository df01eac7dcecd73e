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

// Kinds of frontend.
const (
	ClusterIP Kind = iota
	NodePort
	LoadBalancer
	ExternalIP
)

// Frontend is one address, port and protocol that clients use, with the backends that may serve it now.
type Frontend struct {
	Addr     netip.AddrPort
	Protocol Protocol
	Kind     Kind
	PortName string
	// Affinity is how long a client stays with its backend; 0: no affinity.
	Affinity time.Duration
	// Backends that take new connections; empty means refuse.
	Backends []Backend
}

// Backend is one endpoint address.
type Backend struct {
	Addr  netip.AddrPort
	Node  string
	Zone  string
	Local bool
	// Terminating: only used while no ready one exists.
	Terminating bool
	// Pod is namespace/name where known.
	Pod string
}

// Service is everything that one Kubernetes Service means to the data plane on this node.
type Service struct {
	Name      Name
	UID       string
	Frontends []Frontend
	// Excluded says of endpoints that are not used why.
	Excluded []Excluded
	// Problems are parts of the Service that the data plane cannot honour.
	Problems []Problem
}

// Excluded is an endpoint that takes no traffic, and why.
type Excluded struct {
	Addr   netip.AddrPort
	Reason string
}
