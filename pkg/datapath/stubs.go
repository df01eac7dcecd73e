package datapath

import (
	"errors"
	"net/netip"

	"github.com/cilium/ebpf"
)

type objects struct{ maps struct{ Sock *ebpf.Map } }
type rawAddr struct {
	Addr [16]byte
	Port uint16
}
type sockState struct {
	Origin      rawAddr
	Role, State uint8
}

const stateEnrolled = 2

func addrPort(a rawAddr) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), a.Port)
}

// Role is what a socket is in a connection that we touched.
type Role uint8

// Roles of sockets.
const (
	RoleNone            Role = iota
	RoleClient               // an application's socket that was redirected to the proxy
	RoleProxyDownstream      // the proxy's accepted socket
	RoleProxyUpstream        // the proxy's socket towards an endpoint
	RoleServer               // an application's accepted socket behind the proxy
	RoleService              // translated from a Service address to a backend
	RoleOffload              // sent to an endpoint of an offloaded listener
	RolePodClient            // accelerated pod to pod, connecting side
	RolePodServer            // accelerated pod to pod, accepting side
)

// Socket is one socket that the datapath knows.
type Socket struct {
	Cookie      uint64         `json:"cookie"`
	Netns       uint64         `json:"netns"`
	Role        string         `json:"role"`
	Local       netip.AddrPort `json:"local"`
	Remote      netip.AddrPort `json:"remote"`
	Origin      netip.AddrPort `json:"origin"`
	Redirected  bool           `json:"redirected"` // what it sends goes socket to socket
	State       string         `json:"state"`      // enrolled, plain
	Reason      string         `json:"reason,omitempty"`
	Peer        uint64         `json:"peer,omitempty"` // cookie of the other end, where enrolled
	RedirBytes  uint64         `json:"redirected_bytes"`
	PassedBytes uint64         `json:"passed_bytes"`
}

// Counters are the totals since the maps were made.
type Counters struct {
	Proxied, Offloaded, Service, Passed, Refused, FailOpen, FailClosed uint64
}

// Entry is one decoded map entry, for `sockmesh maps`.
type Entry struct {
	Key   map[string]any `json:"key"`
	Value map[string]any `json:"value"`
}

var errTODO = errors.New("not built yet")

// Open loads or adopts the programs and maps, and attaches them.
func Open(cfg Config) (*Datapath, error) { return nil, errTODO }

// Cleanup detaches and removes everything that agents with this CgroupRoot and BPFFS left in the kernel.
func Cleanup(cfg Config) error { return errTODO }

// FindCgroupRoot returns where cgroup v2 is mounted.
func FindCgroupRoot() (string, error) { return "", errTODO }

// Close releases descriptors; programs and maps stay pinned and keep working.
func (d *Datapath) Close() error { return nil }

// Sockets lists the sockets that the datapath touched.
func (d *Datapath) Sockets() ([]Socket, error) { return nil, errTODO }

// Counters sums the per-CPU counters.
func (d *Datapath) Counters() (Counters, error) { return Counters{}, errTODO }

// Maps lists the maps and how full they are.
func (d *Datapath) Maps() []MapStatus { return nil }

// Dump decodes all entries of one map.
func (d *Datapath) Dump(name string) ([]Entry, error) { return nil, errTODO }

// SetAcceleration switches redirection of new connections on or off at run time, with the reason for status.
func (d *Datapath) SetAcceleration(on bool, reason string) error { return errTODO }
