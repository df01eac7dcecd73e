package mesh

import (
	"net/netip"
	"time"
)

// LBPolicy is how an endpoint of a cluster is chosen.
type LBPolicy uint8

// Load-balancing policies.
const (
	RoundRobin LBPolicy = iota
	LeastRequest
	Random
	RingHash
	Maglev
	// ClusterProvided: ORIGINAL_DST.
	ClusterProvided
)

// Discovery is where a cluster's endpoints come from.
type Discovery uint8

// Discovery types.
const (
	Static Discovery = iota
	EDS
	StrictDNS
	LogicalDNS
	OriginalDst
)

// Cluster is a compiled envoy.config.cluster.v3.Cluster joined with its endpoints.
type Cluster struct {
	Name        string
	StatName    string // alt_stat_name, else Name
	Version     string
	EDSVersion  string
	Discovery   Discovery
	ServiceName string // EDS resource name
	Policy      LBPolicy
	// ChoiceCount is least request's (default 2).
	ChoiceCount uint32
	// LocalityWeighted: localities are drawn by their weight; otherwise endpoints of a priority are one set.
	LocalityWeighted bool
	// Overprovisioning in percent (default 140) and PanicThreshold in percent (default 50).
	Overprovisioning uint32
	PanicThreshold   float64

	ConnectTimeout time.Duration // default 5 s
	// BufferLimit is per_connection_buffer_limit_bytes (default 1 MiB).
	BufferLimit uint32
	// Limits are circuit_breakers of default and high priority.
	Limits [2]Limits
	// MaxRequestsPerConn: 0 unlimited. IdleTimeout of pooled connections: default 1 h, 0 disables.
	MaxRequestsPerConn uint32
	IdleTimeout        time.Duration
	MaxConnDuration    time.Duration
	// Keepalive of upstream sockets; nil: kernel default off.
	Keepalive *Keepalive

	// Localities in configuration order.
	Localities []Locality
	// Endpoints of all localities, in configuration order; Locality.First/N index into it.
	Endpoints []Endpoint

	// DropPPM is ClusterLoadAssignment.policy.drop_overloads as parts per million.
	DropPPM uint32

	// DNS is set for STRICT_DNS and LOGICAL_DNS. Endpoints then have names until a resolver has answered.
	DNS *DNS

	// OffloadReason is what in the cluster needs the proxy, naming the field; empty if nothing does.
	OffloadReason string
}

// Limits is one envoy.config.cluster.v3.CircuitBreakers.Thresholds.
type Limits struct {
	MaxConnections, MaxPendingRequests, MaxRequests, MaxRetries uint32 // 1024, 1024, 1024, 3
}

// Keepalive is TCP keepalive of upstream connections.
type Keepalive struct {
	Probes         int
	Time, Interval time.Duration
}

// Locality groups endpoints of one region/zone/sub_zone and priority.
type Locality struct {
	Region, Zone, SubZone string
	Priority              uint32
	Weight                uint32 // 0: not set
	First, N              int    // Endpoints[First : First+N]
}

// Health of an endpoint as the control plane says it.
type Health uint8

// Health states. Unknown and Healthy take traffic; Degraded only when healthy ones do not suffice; the others only in panic.
const (
	HealthUnknown Health = iota
	HealthHealthy
	HealthUnhealthy
	HealthDraining
	HealthTimeout
	HealthDegraded
)

// DNS says how the names of a cluster's endpoints are resolved.
type DNS struct {
	Family DNSFamily
	// Refresh is the time between two look-ups, FailureRefresh after one that failed.
	Refresh, FailureRefresh time.Duration
	// Names are the endpoints to resolve, in configuration order. Those of a compiled cluster that have an
	// address already are in it too, so that an answer can put all endpoints together.
	Names []DNSName
}

// DNSFamily is dns_lookup_family.
type DNSFamily uint8

// DNS look-up families, in Envoy's order. Auto: IPv6 addresses, IPv4 ones if there are none.
const (
	DNSAuto DNSFamily = iota
	DNSV4Only
	DNSV6Only
	DNSV4Preferred
	DNSAll
)

// DNSName is one endpoint of a DNS cluster.
type DNSName struct {
	Host     string // a name, or an IP address in text
	Port     uint16
	Locality int // index into Cluster.Localities
	Endpoint Endpoint
}

// Endpoint is one address to connect to.
type Endpoint struct {
	Addr     netip.AddrPort
	Hostname string
	Weight   uint32 // at least 1
	Health   Health
}

// Usable says whether the endpoint takes ordinary traffic.
func (h Health) Usable() bool { return h == HealthUnknown || h == HealthHealthy || h == HealthDegraded }
