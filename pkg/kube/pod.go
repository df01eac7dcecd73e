package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Names of the labels and annotations that users put on pods and namespaces.
const (
	// EnrollLabel with "true" on a pod or its namespace lets the proxy take the pod's connections. A pod's own label
	// wins over its namespace's.
	EnrollLabel = "sockmesh.io/enroll"
	// AccelerateBlockingAnnotation with "true" on a pod accelerates its blocking sockets too (kernel.md, trap 22).
	AccelerateBlockingAnnotation = "sockmesh.io/accelerate-blocking"
)

// EnrollPolicy says which pods' connections the proxy may take.
type EnrollPolicy uint8

// Policies of --enroll.
const (
	// EnrollLabelled takes pods that carry EnrollLabel or whose namespace does.
	EnrollLabelled EnrollPolicy = iota
	// EnrollAll takes all but those that say false.
	EnrollAll
)

// ParseEnrollPolicy reads the value of --enroll.
func ParseEnrollPolicy(s string) (EnrollPolicy, error) {
	switch s {
	case "labelled":
		return EnrollLabelled, nil
	case "all":
		return EnrollAll, nil
	}
	return 0, fmt.Errorf("--enroll: %q is neither all nor labelled", s)
}

// String is the flag's spelling.
func (p EnrollPolicy) String() string {
	if p == EnrollAll {
		return "all"
	}
	return "labelled"
}

// Choice is a yes, a no, or nothing said.
type Choice uint8

// Choices.
const (
	Unset Choice = iota
	Yes
	No
)

// Pod is a pod of this node, or, from manifests, one without a node: whether it is here is then told by whether a
// network namespace owns its address.
type Pod struct {
	UID            string
	Namespace      string
	Name           string
	ServiceAccount string
	NodeName       string
	// IPs as in status.podIPs; empty until the pod has its network.
	IPs         []netip.Addr
	HostNetwork bool
	// Terminal: Succeeded or Failed, its address may be another pod's already.
	Terminal bool
	// Deleting: it has a deletion time and is shutting down.
	Deleting bool
	// Created orders pods that claim the same address.
	Created time.Time
	// Label is the pod's own EnrollLabel, NamespaceLabel its namespace's.
	Label          Choice
	NamespaceLabel Choice
	// Enrolled is the verdict: Config.Enroll, the labels and HostNetwork taken together.
	Enrolled bool
	// AccelerateBlocking is the pod's AccelerateBlockingAnnotation.
	AccelerateBlocking bool
}

// String is namespace/name.
func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// equal tells whether two descriptions say the same.
func (p *Pod) equal(b *Pod) bool {
	return slices.Equal(p.IPs, b.IPs) && p.Created.Equal(b.Created) &&
		p.UID == b.UID && p.Namespace == b.Namespace && p.Name == b.Name && p.ServiceAccount == b.ServiceAccount &&
		p.NodeName == b.NodeName && p.HostNetwork == b.HostNetwork && p.Terminal == b.Terminal && p.Deleting == b.Deleting &&
		p.Label == b.Label && p.NamespaceLabel == b.NamespaceLabel && p.Enrolled == b.Enrolled &&
		p.AccelerateBlocking == b.AccelerateBlocking
}

// enrolled is the verdict on a pod: its own label, else its namespace's, else the policy; host-network pods never.
func enrolled(policy EnrollPolicy, p *Pod) bool {
	if p.HostNetwork {
		return false
	}
	for _, said := range []Choice{p.Label, p.NamespaceLabel} {
		if said != Unset {
			return said == Yes
		}
	}
	return policy == EnrollAll
}

// Node is this node.
type Node struct {
	Name string
	// Zone is topology.kubernetes.io/zone.
	Zone string
	// Addresses are the node's own (InternalIP and ExternalIP).
	Addresses []netip.Addr
	// Leaving: it is being deleted, or the cluster autoscaler has said that it will be. Load balancers are to send it nothing
	// new (KEP-3836).
	Leaving bool
}

func (n *Node) equal(b *Node) bool {
	return n.Name == b.Name && n.Zone == b.Zone && n.Leaving == b.Leaving && slices.Equal(n.Addresses, b.Addresses)
}
