// Package kube turns Kubernetes objects into what this node's data plane needs: Services with their backends,
// this node's pods, and this Node.
//
// There are two sources with the same semantics and the same tables: an API server, and a folder of manifests.
// Both feed one table (table.go), which joins objects, works out what changed, and tells a Handler. Only what the
// data plane uses is kept of an object (convert.go), because a node holds every Service of the cluster.
//
// A source that is gone (API server down, file broken) changes nothing: the last state stays until better is known.
package kube

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// A Handler is told what changed. All calls of one source come from one goroutine, one after another; a slow handler
// delays and thereby coalesces what follows, it never loses the last state.
//
// Before Synced the calls describe only what exists; nothing is said to be gone before the source has listed
// everything once. A Service is not announced before Services and EndpointSlices have both been listed, because a
// Service without its endpoints would refuse connections.
type Handler interface {
	// ServiceChanged gives a Service's new meaning; nil: it is none of ours any more (deleted, made headless, …).
	ServiceChanged(name service.Name, svc *service.Service)
	// PodChanged describes a pod of this node that is new or has changed. The value is the handler's to keep.
	PodChanged(p *Pod)
	// PodDeleted is called once for a pod that was announced and is gone; p is its last description.
	PodDeleted(p *Pod)
	// NodeChanged describes this node.
	NodeChanged(n *Node)
	// Synced is called once, when every kind has been listed in full and announced.
	Synced()
}

// A Source watches Kubernetes objects.
type Source interface {
	// Run watches until ctx ends. An error means that the source cannot work at all (a folder that doesn't exist);
	// whatever may pass (an unreachable API server, a broken file) is logged, shown by Status, and retried.
	Run(ctx context.Context) error
	// SetAddresses says which addresses the node's devices have, now and whenever that changes. They are needed for node
	// ports on other addresses than the Node object's and for external IPs that the node must own.
	SetAddresses(devices []netip.Addr)
	// Status says what the source sees now.
	Status() Status
	// Recorder publishes Events on objects where this source can, and logs them in any case.
	Recorder() EventRecorder
}

// Config is what every source needs.
type Config struct {
	// NodeName is the Node object that this is; only its pods are watched.
	NodeName string
	// Enroll says which pods' connections the proxy may take.
	Enroll EnrollPolicy
	// NodePorts says on which of the node's addresses node ports are served; the zero value: on those of the Node object.
	NodePorts service.NodePortAddresses
	// ExternalIPs says which of Services' externalIPs are honoured.
	ExternalIPs service.ExternalIPPolicy
	// Outside: clients outside the cluster are served too. Without it, Services that are meant for them carry a note.
	Outside bool
	// Handler is told what changes.
	Handler Handler
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

func (c *Config) check() error {
	if c.NodeName == "" {
		return fmt.Errorf("the node's name is not known: give --node-name (or NODE_NAME)")
	}
	if c.Handler == nil {
		return fmt.Errorf("kube: Config.Handler is required")
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return nil
}

// Status is a source's state, for `sockmesh status`.
type Status struct {
	// Source is the API server's address or the folder.
	Source string `json:"source"`
	// Synced: every kind has been listed in full once.
	Synced bool `json:"synced"`
	// Services that this node serves, Endpoints in all slices, Pods of this node.
	Services  int `json:"services"`
	Endpoints int `json:"endpoints"`
	Pods      int `json:"pods"`
	// Waiting lists the kinds that have not been listed yet.
	Waiting []string `json:"waiting,omitempty"`
	// Errors are what is wrong now: the connection to the API server by kind, or bad manifests by file and document.
	Errors []string `json:"errors,omitempty"`
}
