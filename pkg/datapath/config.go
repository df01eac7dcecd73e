package datapath

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"
)

// OutboundPort is where the proxy listens on the loopback of each enrolled pod.
const OutboundPort uint16 = 15001

// Defaults of NATPorts and NATEstablished.
var DefaultNATPorts = [2]uint16{10000, 29999}

const DefaultNATEstablished = 2 * time.Hour

// Config is what Open, Cleanup and the programs need to know. Zero values mean the defaults named.
type Config struct {
	// CgroupRoot is the cgroup v2 directory below which sockets are ours. Default: FindCgroupRoot.
	CgroupRoot string
	// BPFFS is the directory for pins; default /sys/fs/bpf/sockmesh. A bpffs is mounted at its parent if the
	// directory isn't on one.
	BPFFS string

	// Acceleration switches sockops + sk_msg redirection on where the kernel supports it.
	Acceleration bool
	// Services translates Service addresses at connect.
	Services bool
	// Outside serves clients outside this node at NodePort, load-balancer and external addresses.
	Outside bool
	// NodeNetns is a path to the node's own network namespace, whose devices clients outside come by; default: that of the
	// thread that calls Open.
	NodeNetns string
	// HostNetns is that namespace's cookie: it is the only one in which node ports are served on loopback.
	HostNetns uint64
	// NATPorts are the first and last source port of outside clients' connections on their way to backends; default
	// 10000 to 29999, which is below both node ports and the kernel's own ephemeral ports: a connection of the host
	// itself can't have the same addresses and ports.
	NATPorts [2]uint16
	// Devices are the names, or patterns of them, of the network devices by which clients outside may come; default: all but
	// loopback and those that face pods.
	Devices []string
	// ForceClsact doesn't try tcx links.
	ForceClsact bool
	// NATEstablished is how long a TCP connection of a client outside may be silent before it's forgotten; default 2 h.
	NATEstablished time.Duration
	// OriginalDstSockopt answers getsockopt(SO_ORIGINAL_DST) for a foreign proxy. It taxes every getsockopt of
	// the node, hence off unless asked for.
	OriginalDstSockopt bool
	// ForeignProxy redirects claimed connections to whatever listens on OutboundPort in the caller's network namespace, and
	// lets everybody bind that port, where else only the agent's own listeners count. OriginalDstSockopt implies it.
	// docs/security.md says what it opens.
	ForeignProxy bool
	// AcceleratePods also redirects between two enrolled pods with no proxy between them.
	AcceleratePods bool
	// FailClosed refuses a claimed connection while no listener exists in the caller's netns; otherwise it falls
	// through to the Service or to the address itself.
	FailClosed bool

	// BacklogLimit is how much memory redirected bytes may hold at a receiver that doesn't read, per direction, before
	// the direction goes on by TCP, which stops the sender; default 4 MiB. Towards applications it is 16 times that
	// while TCP uses little of the machine's memory: bpf/skmsg.bpf.c says why.
	BacklogLimit uint32

	// OutboundPort defaults to the constant of that name.
	OutboundPort uint16

	// Sizes of the maps; zero fields take defaults.
	Sizes Sizes

	// Sources that must report Synced before anything is deleted; default all of SourceServices, SourceClaims
	// and SourcePods.
	Sources []string
	// SyncTimeout bounds that wait; default 30 s.
	SyncTimeout time.Duration
	// TCPGrace is how long TCP connections to an endpoint that has left its Service altogether may go on before they are
	// reset; default 2 min, negative: for ever. Those to an endpoint that drains (terminating, or not ready) always go on.
	TCPGrace time.Duration
	// Owners is a directory, the same for all agents that share BPFFS, in which each shows that it lives: owner.go. Optional:
	// else an agent that was replaced stays so, whatever becomes of its successor.
	Owners string
	// OpenNetns gives a descriptor of the network namespace with the cookie, to be closed by the caller: how sockets of
	// pods are reached that have to end. Optional: else they are reached through the processes that have them, which
	// takes CAP_SYS_PTRACE.
	OpenNetns func(cookie uint64) (*os.File, error) `json:"-"`
	// DriftInterval is the time between full comparisons of the maps with what was written; default 30 s.
	DriftInterval time.Duration

	Logger *slog.Logger
}

// Sizes are the maps' capacities in entries; ByMap says what each holds.
type Sizes struct {
	Frontends, Backends, Slots, Outside, Members, Affinity, UDPFlows, Sources, Claims, Pods, Locals, Origins, Pairs, NAT uint32
}

// DefaultSizes are what zero fields stand for.
func DefaultSizes() Sizes {
	return Sizes{
		Frontends: 65536, Backends: 262144, Slots: 524288, Outside: 16384, Members: 262144, Affinity: 65536, UDPFlows: 16384, Sources: 16384,
		Claims: 16384, Pods: 4096, Locals: 8192, Origins: 65536, Pairs: 131072, NAT: 262144,
	}
}

// MapSize is one of Sizes with the map that it is the size of.
type MapSize struct {
	Map     string
	Entries *uint32
	Holds   string
}

// Flag is the map's part in the name of the flag that sets its size.
func (m MapSize) Flag() string { return strings.ReplaceAll(strings.TrimPrefix(m.Map, "sm_"), "_", "-") }

// ByMap lists the sizes, for flags and for making the maps. Each is named after its map, so that whoever reads that a map
// is full knows the setting.
func (s *Sizes) ByMap() []MapSize {
	return []MapSize{
		{sockmeshMapSmFrontends, &s.Frontends, "Service addresses"},
		{sockmeshMapSmBackends, &s.Backends, "distinct endpoint addresses"},
		{sockmeshMapSmSlots, &s.Slots, "the sum of all addresses' endpoints"},
		{sockmeshMapSmOutside, &s.Outside, "addresses that clients outside may use"},
		{sockmeshMapSmMembers, &s.Members, "the sum of the endpoints of UDP ports and of Services with session affinity"},
		{sockmeshMapSmAffinity, &s.Affinity, "clients that stay with an endpoint; the oldest are forgotten"},
		{sockmeshMapSmUdpMore, &s.UDPFlows, "Service addresses beyond the fourth of a UDP socket, and its earlier endpoints; the oldest are forgotten"},
		{sockmeshMapSmSources, &s.Sources, "the sum of load balancers' source ranges"},
		{sockmeshMapSmClaims, &s.Claims, "addresses that listeners claim"},
		{sockmeshMapSmNetns, &s.Pods, "enrolled pods of this node"},
		{sockmeshMapSmLocal, &s.Locals, "addresses of this node's pods"},
		{sockmeshMapSmOrigin, &s.Origins, "connections to the proxy that are being set up at one time"},
		{sockmeshMapSmPairs, &s.Pairs, "redirected sockets"},
		{sockmeshMapSmNat, &s.NAT, "connections of clients outside"},
	}
}

func (s Sizes) withDefaults() Sizes {
	defaults := DefaultSizes()
	for i, d := range defaults.ByMap() {
		if v := s.ByMap()[i].Entries; *v == 0 {
			*v = *d.Entries
		}
	}
	return s
}

func (c Config) withDefaults() (Config, error) {
	if c.CgroupRoot == "" {
		root, err := FindCgroupRoot()
		if err != nil {
			return c, err
		}
		c.CgroupRoot = root
	}
	if c.BPFFS == "" {
		c.BPFFS = "/sys/fs/bpf/sockmesh"
	}
	if c.BacklogLimit == 0 {
		c.BacklogLimit = 4 << 20
	}
	if c.OutboundPort == 0 {
		c.OutboundPort = OutboundPort
	}
	if c.HostNetns == 0 {
		cookie, err := netnsCookie(c.NodeNetns)
		if err != nil {
			return c, err
		}
		c.HostNetns = cookie
	}
	if c.NATPorts == [2]uint16{} {
		c.NATPorts = DefaultNATPorts
	}
	if c.NATPorts[0] == 0 || c.NATPorts[0] > c.NATPorts[1] {
		return c, fmt.Errorf("ports %d to %d for outside clients' connections: expected a range from 1 to 65535", c.NATPorts[0], c.NATPorts[1])
	}
	if err := CheckDevices(c.Devices); err != nil {
		return c, err
	}
	if c.NATEstablished == 0 {
		c.NATEstablished = DefaultNATEstablished
	}
	if len(c.Sources) == 0 {
		c.Sources = []string{SourceServices, SourceClaims, SourcePods}
	}
	if c.SyncTimeout == 0 {
		c.SyncTimeout = 30 * time.Second
	}
	if c.TCPGrace == 0 {
		c.TCPGrace = 2 * time.Minute
	}
	if c.DriftInterval == 0 {
		c.DriftInterval = 30 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	c.ForeignProxy = c.ForeignProxy || c.OriginalDstSockopt
	c.Sizes = c.Sizes.withDefaults()
	return c, nil
}
