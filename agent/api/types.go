// Package api is what the agent's admin API says, and a client for it: the JSON of /status, /pods and the others
// as Go types. The agent fills them, the sockmesh command prints them, tests and other tools read them; so keys
// are added, not renamed.
//
// It must never depend on the agent's own packages: a tool that reads status needs none of the data plane.
package api

import "encoding/json"

// Status is GET /status.
type Status struct {
	Node    string `json:"node"`
	Version string `json:"version"`
	// Ready: everything below has synced and a canary connection went through the real hooks.
	Ready           bool     `json:"ready"`
	NotReadyReasons []string `json:"not_ready_reasons"`
	UptimeSeconds   int64    `json:"uptime_seconds"`
	Draining        bool     `json:"draining,omitempty"`

	Acceleration Acceleration `json:"acceleration"`
	Datapath     Datapath     `json:"datapath"`
	Outside      Outside      `json:"outside"`
	Kubernetes   Kubernetes   `json:"kubernetes"`
	XDS          XDS          `json:"xds"`
	Pods         PodCounts    `json:"pods"`
	Connections  Connections  `json:"connections"`
	Proxy        Proxy        `json:"proxy"`
	Canary       Canary       `json:"canary"`
}

// Acceleration is the state of socket-to-socket redirection.
type Acceleration struct {
	Mode   string `json:"mode"` // auto or off, as configured
	Active bool   `json:"active"`
	// Reason says why it is not active, or only in part.
	Reason          string `json:"reason"`
	Pairs           uint64 `json:"pairs"`
	RedirectedBytes uint64 `json:"redirected_bytes"`
	PassedBytes     uint64 `json:"passed_bytes"`
	// StepAside: connections whose bytes skip the proxy.
	StepAside StepAside `json:"step_aside"`
	Probes    []Probe   `json:"probes"`
}

// StepAside is about connections through the proxy whose bytes go from application to application without it.
type StepAside struct {
	Active   bool   `json:"active"`
	Reason   string `json:"reason,omitempty"` // why not
	Open     int    `json:"open"`             // connections that may skip the proxy now
	Bytes    uint64 `json:"bytes"`            // that have; they are among the redirected ones
	Returned uint64 `json:"returned"`         // directions that came back because their receiver was slow
	// Bodies: HTTP messages whose body has skipped the proxy for a part; BodyBytes of Bytes are theirs.
	Bodies    uint64 `json:"bodies"`
	BodyBytes uint64 `json:"body_bytes"`
}

// Probe is one kernel feature that was looked for.
type Probe struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// Datapath is what is loaded in the kernel.
type Datapath struct {
	Programs []Program `json:"programs"`
	Maps     []Map     `json:"maps"`
	// Waiting names the sources whose first full list has not come: nothing that they may still want is deleted before.
	// TimedOut: --sync-timeout is over, so the sources that have come may delete.
	Waiting  []string `json:"waiting,omitempty"`
	TimedOut bool     `json:"timed_out,omitempty"`
	// DriftRepaired counts entries that somebody else had changed and that were put right.
	DriftRepaired uint64 `json:"drift_repaired"`
	// EndedTCP and EndedUDP count sockets that were ended because their backend was gone.
	EndedTCP uint64 `json:"ended_tcp"`
	EndedUDP uint64 `json:"ended_udp"`
	// Repairs counts, by kind (pin, link, verdict), what somebody had removed from the kernel and the agent has put
	// back; LastRepair says what and when, RepairProblem what could not be.
	Repairs       map[string]uint64 `json:"repairs"`
	LastRepair    string            `json:"last_repair,omitempty"`
	RepairProblem string            `json:"repair_problem,omitempty"`
	// Warnings are maps that are almost full, and sizes that could not be put in force.
	Warnings []string `json:"warnings,omitempty"`
	// Errors are what the reconciler could not write, with the reason.
	Errors []string `json:"errors,omitempty"`
}

// Program is one loaded and attached BPF program.
type Program struct {
	Name   string `json:"name"`
	Attach string `json:"attach"`
	ID     uint32 `json:"id"`
	Pinned string `json:"pinned"`
}

// Outside is how clients outside this node are served.
type Outside struct {
	Active bool `json:"active"`
	// Reason says why not, or not everywhere.
	Reason  string   `json:"reason,omitempty"`
	Devices []Device `json:"devices"`
	// Connections that exist, and those whose handshake isn't over.
	Connections int `json:"connections"`
	Unanswered  int `json:"unanswered"`
	// Counters since the maps were made.
	Accepted uint64 `json:"accepted"`
	Refused  uint64 `json:"refused"` // no backend: answered at once
	Silent   uint64 `json:"silent"`  // backends are on other nodes: no answer
	Denied   uint64 `json:"denied"`  // not in the source ranges: no answer
	Stray    uint64 `json:"stray"`   // packets of connections that are not known
	Full     uint64 `json:"full"`    // packets that found no room for their connection
	NoPort   uint64 `json:"no_port"` // connections for which no source port was free
}

// Device is a network device of the node. Clients may come by it, or it only leads to backends.
type Device struct {
	Name    string `json:"name"`
	Mode    string `json:"mode,omitempty"` // tcx or clsact; empty: nothing is attached, for the Reason
	Clients bool   `json:"clients"`
	Reason  string `json:"reason,omitempty"`
}

// Map is one BPF map and its fill.
type Map struct {
	Name       string `json:"name"`
	ID         uint32 `json:"id"`
	Type       string `json:"type,omitempty"`
	Entries    uint64 `json:"entries"`
	MaxEntries uint32 `json:"max_entries"`
}

// Kubernetes is where objects come from and how many there are.
type Kubernetes struct {
	Source    string   `json:"source"`
	Synced    bool     `json:"synced"`
	Services  int      `json:"services"`
	Endpoints int      `json:"endpoints"`
	Pods      int      `json:"pods"`
	Waiting   []string `json:"waiting,omitempty"`
	Errors    []string `json:"errors,omitempty"`
}

// XDS is the state of the control plane connections.
type XDS struct {
	Servers   []XDSServer    `json:"servers"`
	Resources XDSResources   `json:"resources"`
	Rejected  []RejectedItem `json:"rejected"`
	Ignored   []IgnoredItem  `json:"ignored"`
	// Warming has what is not in force yet, and what it waits for.
	Warming map[string]string `json:"warming,omitempty"`
}

// XDSServer is one stream to a control plane, or a watched file.
type XDSServer struct {
	Name      string `json:"name"`
	Stream    string `json:"stream"` // "ads", or the type
	Delta     bool   `json:"delta"`
	Connected bool   `json:"connected"`
	LastError string `json:"last_error"`
}

// XDSResources counts resources in force by type.
type XDSResources struct {
	Listener int `json:"listener"`
	Route    int `json:"route"`
	Cluster  int `json:"cluster"`
	Endpoint int `json:"endpoint"`
	Secret   int `json:"secret"`
}

// RejectedItem is a resource that was refused; what was in force before it stays.
type RejectedItem struct {
	Type  string `json:"type"`
	Name  string `json:"name"`
	Error string `json:"error"`
	// InForce: an older version of it still serves.
	InForce bool `json:"in_force"`
}

// IgnoredItem is a field that was accepted without being acted upon.
type IgnoredItem struct {
	Type  string `json:"type"`
	Name  string `json:"name"`
	Field string `json:"field"`
}

// PodCounts counts pods of this node.
type PodCounts struct {
	Local    int `json:"local"`
	Enrolled int `json:"enrolled"`
}

// Connections are counters since the maps were made.
type Connections struct {
	Proxied   uint64 `json:"proxied"`
	Offloaded uint64 `json:"offloaded"`
	Service   uint64 `json:"service"`
	Passed    uint64 `json:"passed"`
	Refused   uint64 `json:"refused"`
	// FailedOpen: claimed connections that met no proxy and went to the address itself.
	FailedOpen uint64 `json:"failed_open"`
	// SteppedAside: of the proxied ones, those whose bytes skipped the proxy.
	SteppedAside uint64 `json:"stepped_aside"`
}

// Proxy is the engine.
type Proxy struct {
	Loops       int    `json:"loops"`
	Connections int    `json:"connections"` // open now
	Accepted    uint64 `json:"accepted"`
	Refused     uint64 `json:"refused"`    // closed unserved
	Generation  uint64 `json:"generation"` // of the configuration snapshot
	// Listeners are the sockets in the node's own network namespace.
	Listeners []NodeListener `json:"listeners,omitempty"`
}

// NodeListener is a listening socket of the node.
type NodeListener struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Error   string `json:"error,omitempty"` // why it isn't bound
}

// Canary is the last connection through the real hooks.
type Canary struct {
	OK        bool   `json:"ok"`
	Error     string `json:"error,omitempty"`
	At        string `json:"at,omitempty"` // RFC 3339
	Micros    int64  `json:"micros"`
	Successes uint64 `json:"successes"`
	Failures  uint64 `json:"failures"`
}

// Pod is one element of GET /pods.
type Pod struct {
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	UID       string   `json:"uid"`
	IPs       []string `json:"ips"`
	Enrolled  bool     `json:"enrolled"`
	// Rule says what decided on enrolment: the pod's label, its namespace's, the policy, host network.
	Rule string `json:"rule"`
	// State is ready, waiting or skipped; Reason says why it is not ready.
	State       string `json:"state"`
	Reason      string `json:"reason,omitempty"`
	Netns       string `json:"netns,omitempty"`
	Cookie      uint64 `json:"cookie,omitempty"`
	Accelerates string `json:"accelerates,omitempty"` // "blocking too" where the pod opted in
}

// Service is one element of GET /services.
type Service struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// InternalTrafficPolicy and ExternalTrafficPolicy are Cluster or Local.
	InternalTrafficPolicy string     `json:"internal_traffic_policy,omitempty"`
	ExternalTrafficPolicy string     `json:"external_traffic_policy,omitempty"`
	Frontends             []Frontend `json:"frontends"`
	// Endpoints are all of them, with where each stands.
	Endpoints   []ServiceEndpoint `json:"endpoints,omitempty"`
	HealthCheck *HealthCheck      `json:"health_check,omitempty"`
	Excluded    []Excluded        `json:"excluded,omitempty"`
	Problems    []string          `json:"problems,omitempty"`
}

// Frontend is an address of a Service.
type Frontend struct {
	Address         string `json:"address"`
	Protocol        string `json:"protocol"`
	Kind            string `json:"kind"`
	Port            string `json:"port,omitempty"` // its name
	AffinitySeconds int64  `json:"affinity_seconds,omitempty"`
	Listener        string `json:"listener,omitempty"` // the xDS listener that claims it for enrolled pods
	// Loopback: only for processes of the host's own network namespace.
	Loopback bool      `json:"loopback,omitempty"`
	Backends []Backend `json:"backends"`
	// External is what clients outside get; absent where there is no outside.
	External *External `json:"external,omitempty"`
}

// External is how an address serves clients outside the node.
type External struct {
	// Policy is Cluster (answers come back through this node: the client's address is translated) or Local.
	Policy   string   `json:"policy"`
	Backends []string `json:"backends"`
	// Without is what a client gets while there is no backend: refused, or no answer.
	Without string `json:"without"`
	// Sources may connect, others get no answer; none: everybody may.
	Sources []string `json:"sources,omitempty"`
}

// Backend is an endpoint that takes new connections.
type Backend struct {
	Address     string `json:"address"`
	Pod         string `json:"pod,omitempty"`
	Node        string `json:"node,omitempty"`
	Zone        string `json:"zone,omitempty"`
	Local       bool   `json:"local"`
	Terminating bool   `json:"terminating,omitempty"`
}

// ServiceEndpoint is an endpoint and where it stands.
type ServiceEndpoint struct {
	Address string `json:"address"`
	// State is ready, draining (terminating and still serving, while others are ready), terminating or not ready.
	State string `json:"state"`
	// Used: new connections of somebody go there; Reason says why not of all, or of none.
	Used   bool   `json:"used"`
	Reason string `json:"reason,omitempty"`
	Local  bool   `json:"local"`
	Pod    string `json:"pod,omitempty"`
	Node   string `json:"node,omitempty"`
	Zone   string `json:"zone,omitempty"`
}

// HealthCheck is a Service's health-check node port.
type HealthCheck struct {
	Port uint16 `json:"port"`
	// LocalReady4 and LocalReady6 are what is answered, by the family of the question: 200 where it is not 0.
	LocalReady4 int      `json:"local_ready_ipv4"`
	LocalReady6 int      `json:"local_ready_ipv6"`
	Addresses   []string `json:"addresses"` // where it is served now
	Error       string   `json:"error,omitempty"`
}

// Excluded is an endpoint that takes no traffic.
type Excluded struct {
	Address string `json:"address"`
	Reason  string `json:"reason"`
}

// Listener is one element of GET /listeners.
type Listener struct {
	Name      string   `json:"name"`
	Version   string   `json:"version,omitempty"`
	Addresses []string `json:"addresses"`
	Direction string   `json:"direction"`
	// Mode is where connections are handled: kernel, proxy, node (a real socket of the node), inbound or passthrough.
	Mode string `json:"mode"`
	// Reason says why the kernel can't carry it alone.
	Reason string        `json:"reason,omitempty"`
	Chains []FilterChain `json:"chains"`
}

// FilterChain is a listener's.
type FilterChain struct {
	Name    string `json:"name,omitempty"`
	Match   string `json:"match"`
	Kind    string `json:"kind"` // http or tcp
	Routes  string `json:"routes,omitempty"`
	Targets string `json:"targets,omitempty"`
}

// Route is one element of GET /routes: a route within its virtual host and configuration.
type Route struct {
	Config  string   `json:"config"`
	Version string   `json:"version,omitempty"`
	Host    string   `json:"host"`
	Domains []string `json:"domains"`
	Index   int      `json:"index"`
	Name    string   `json:"name,omitempty"`
	Match   string   `json:"match"`
	Action  string   `json:"action"`
}

// Cluster is one element of GET /clusters.
type Cluster struct {
	Name      string `json:"name"`
	Version   string `json:"version,omitempty"`
	Discovery string `json:"discovery"`
	Policy    string `json:"policy"`
	Endpoints int    `json:"endpoints"`
	Usable    int    `json:"usable"`
	TimeoutMS int64  `json:"connect_timeout_ms"`
}

// Endpoint is one element of GET /endpoints.
type Endpoint struct {
	Cluster  string `json:"cluster"`
	Address  string `json:"address"`
	Hostname string `json:"hostname,omitempty"`
	Locality string `json:"locality,omitempty"`
	Priority uint32 `json:"priority"`
	Weight   uint32 `json:"weight"`
	Health   string `json:"health"`
	Pod      string `json:"pod,omitempty"` // where it is a pod of this node
}

// Socket is one element of GET /sockets: one socket that the datapath touched.
type Socket struct {
	Cookie uint64 `json:"cookie"`
	Netns  uint64 `json:"netns"`         // cookie of its network namespace
	Pod    string `json:"pod,omitempty"` // whose namespace that is
	Role   string `json:"role"`
	TCP    string `json:"tcp,omitempty"` // TCP state
	Local  string `json:"local"`
	Remote string `json:"remote"`
	Origin string `json:"origin,omitempty"` // where the client wanted to go
	// Redirects: what it sends goes socket to socket; State and Reason say more.
	Redirects  bool   `json:"redirected"`
	State      string `json:"state"`
	Reason     string `json:"reason,omitempty"`
	Peer       uint64 `json:"peer,omitempty"` // cookie of the other end
	Redirected uint64 `json:"redirected_bytes"`
	Passed     uint64 `json:"passed_bytes"`
	// Aside: whether what it sends skips the proxy: armed (from the next moment when nothing is under way there), on, over.
	Aside       string `json:"aside,omitempty"`
	AsideReason string `json:"aside_reason,omitempty"` // why not
	AsideBytes  uint64 `json:"aside_bytes"`            // of the redirected ones
}

// MapDump is GET /maps/NAME.
type MapDump struct {
	Map
	Dump []MapEntry `json:"dump"`
}

// MapEntry is one entry of a BPF map, by field name.
type MapEntry struct {
	Key   json.RawMessage `json:"key"`
	Value json.RawMessage `json:"value"`
}

// Logging is GET and POST /logging.
type Logging struct {
	Level string `json:"level"`
}

// Error is what every path answers when it fails.
type Error struct {
	Error string `json:"error"`
}
