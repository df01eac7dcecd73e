package upstream

import (
	"net/netip"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Host is one endpoint of a cluster as one loop knows it. Its users keep the counters: whoever sends it a
// request or opens a connection adds one, and takes it away at the end.
type Host struct {
	Addr     netip.AddrPort
	Hostname string
	Health   mesh.Health

	// ActiveRequests is what least request goes by; a TCP connection is one request.
	ActiveRequests, ActiveConns int
	// Totals since the host is known.
	Requests, Conns, ConnectFailures, Errors uint64

	cluster *Cluster
	gone    bool
	used    bool // since the last sweep
}

// Cluster is the host's cluster.
func (h *Host) Cluster() *Cluster { return h.cluster }

// Gone says that the host has left its cluster: no new work for it.
func (h *Host) Gone() bool { return h.gone }

// Unused is true for a host that nothing is using.
func (h *Host) Unused() bool { return h.ActiveConns == 0 && h.ActiveRequests == 0 }
