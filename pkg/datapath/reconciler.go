package datapath

import (
	"context"
	"net/netip"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// Sources of wanted state, as passed to Synced.
const (
	SourceServices = "services"
	SourceClaims   = "claims"
	SourcePods     = "pods"
)

// Pod is one pod of this node.
type Pod struct {
	Namespace, Name string
	// Cookie of its network namespace; 0 while unknown.
	Cookie uint64
	IPs    []netip.Addr
	// Enrolled: listeners may claim its connections.
	Enrolled bool
	// AccelerateBlocking opts its blocking sockets in to redirection.
	AccelerateBlocking bool
}

// Reconciler keeps the maps equal to the wanted state that its Set methods describe.
type Reconciler struct{}

// SetService adds or replaces a Service.
func (r *Reconciler) SetService(s *service.Service) {}

// DeleteService removes a Service.
func (r *Reconciler) DeleteService(name service.Name) {}

// SetClaims replaces all claims.
func (r *Reconciler) SetClaims(claims []mesh.Claim) {}

// SetPods replaces the list of this node's pods.
func (r *Reconciler) SetPods(pods []Pod) {}

// Synced says that the source has delivered its first full list.
func (r *Reconciler) Synced(source string) {}

// Run applies changes until ctx ends.
func (r *Reconciler) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// Flush waits until everything set before the call is in the maps, and returns what could not be written.
func (r *Reconciler) Flush(ctx context.Context) error { return nil }

// Status of the reconciliation.
func (r *Reconciler) Status() ReconcilerStatus { return ReconcilerStatus{} }
