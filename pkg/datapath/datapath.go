// Package datapath owns everything of sockmesh that lives in the kernel: it loads the programs of bpf/, attaches
// them to the cgroup root, keeps the maps equal to what the rest of the agent wants, and reads them back for
// people.
//
// Reading order: config.go (what can be set), datapath.go (Open, Close), pin.go and attach.go (what survives a
// restart, and how it is taken over), reconciler.go (wanted state against actual maps), status.go and sockets.go
// (what can be seen).
//
// Programs and maps are pinned, so traffic keeps flowing while no agent runs. The package knows nothing of HTTP,
// of Kubernetes objects or of xDS: it gets service.Service values, mesh.Claim values and pods.
package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// ErrNoOrigin is returned by OriginalDst for a connection that no hook of ours redirected: somebody dialled the
// proxy's port directly.
var ErrNoOrigin = errors.New("connection has no original destination: it was not redirected by sockmesh")

// Datapath is the loaded and attached data plane of one agent. Its methods may be called from any goroutine.
type Datapath struct {
	cfg    Config
	log    *slog.Logger
	objs   *objects
	probes []Probe

	mu          sync.Mutex
	links       map[string]link.Link // guarded by mu
	accelReason string               // guarded by mu; why acceleration is not active, "" if it is
	rec         *Reconciler
}

// Reconciler is the only writer of the maps that hold configuration.
func (d *Datapath) Reconciler() *Reconciler { return d.rec }

// OriginalDst tells where the client behind an accepted connection wanted to go, and whether the bytes between the
// two are redirected past TCP. It is one map look-up in the accepted socket's storage. Returns ErrNoOrigin for
// a connection that came by itself.
func (d *Datapath) OriginalDst(fd int) (netip.AddrPort, bool, error) {
	var s sockState
	if err := d.objs.maps.Sock.Lookup(int32(fd), &s); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return netip.AddrPort{}, false, ErrNoOrigin
		}
		return netip.AddrPort{}, false, fmt.Errorf("read the original destination of fd %d from sm_sock: %w", fd, err)
	}
	if Role(s.Role) != RoleProxyDownstream {
		return netip.AddrPort{}, false, ErrNoOrigin
	}
	return addrPort(s.Origin), s.State == stateEnrolled, nil
}
