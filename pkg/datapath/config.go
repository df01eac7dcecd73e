package datapath

import (
	"log/slog"
	"time"
)

// ProxyMark is the SO_MARK of the proxy's own upstream sockets: connect exempts them from listener claims, never
// from Service translation. "SM" in the upper half keeps it apart from the marks of other node software.
const ProxyMark uint32 = 0x534d0001

// OutboundPort is where the proxy listens on the loopback of each enrolled pod.
const OutboundPort uint16 = 15001

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
	// OriginalDstSockopt answers getsockopt(SO_ORIGINAL_DST) for a foreign proxy. It taxes every getsockopt of
	// the node, hence off unless asked for.
	OriginalDstSockopt bool
	// AcceleratePods also redirects between two enrolled pods with no proxy between them.
	AcceleratePods bool
	// FailClosed refuses a claimed connection while no listener exists in the caller's netns; otherwise it falls
	// through to the Service or to the address itself.
	FailClosed bool

	// BacklogLimit is how much memory redirected bytes may hold at a receiver that doesn't read, per direction, before
	// the direction goes on by TCP, which stops the sender; default 4 MiB. Towards applications it is 16 times that
	// while TCP uses little of the machine's memory: bpf/skmsg.bpf.c says why.
	BacklogLimit uint32

	// ProxyMark defaults to the constant of that name, OutboundPort likewise.
	ProxyMark    uint32
	OutboundPort uint16

	// Sizes of the maps; zero fields take defaults.
	Sizes Sizes

	// Sources that must report Synced before anything is deleted; default all of SourceServices, SourceClaims
	// and SourcePods.
	Sources []string
	// SyncTimeout bounds that wait; default 30 s.
	SyncTimeout time.Duration
	// DriftInterval is the time between full comparisons of the maps with what was written; default 30 s.
	DriftInterval time.Duration

	Logger *slog.Logger
}

// Sizes are the maps' capacities in entries.
type Sizes struct {
	Frontends uint32 // Service addresses; default 65536
	Backends  uint32 // distinct endpoint addresses; default 262144
	Slots     uint32 // sum of all frontends' backends; default 524288
	Claims    uint32 // addresses claimed by listeners; default 16384
	Pods      uint32 // enrolled pods of this node; default 4096
	Locals    uint32 // addresses of this node's pods; default 8192
	Origins   uint32 // connections being set up at one time; default 65536
	Pairs     uint32 // redirected sockets; default 131072
}

func (s Sizes) withDefaults() Sizes {
	def := func(v *uint32, d uint32) {
		if *v == 0 {
			*v = d
		}
	}
	def(&s.Frontends, 65536)
	def(&s.Backends, 262144)
	def(&s.Slots, 524288)
	def(&s.Claims, 16384)
	def(&s.Pods, 4096)
	def(&s.Locals, 8192)
	def(&s.Origins, 65536)
	def(&s.Pairs, 131072)
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
	if c.ProxyMark == 0 {
		c.ProxyMark = ProxyMark
	}
	if c.BacklogLimit == 0 {
		c.BacklogLimit = 4 << 20
	}
	if c.OutboundPort == 0 {
		c.OutboundPort = OutboundPort
	}
	if len(c.Sources) == 0 {
		c.Sources = []string{SourceServices, SourceClaims, SourcePods}
	}
	if c.SyncTimeout == 0 {
		c.SyncTimeout = 30 * time.Second
	}
	if c.DriftInterval == 0 {
		c.DriftInterval = 30 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	c.Sizes = c.Sizes.withDefaults()
	return c, nil
}
