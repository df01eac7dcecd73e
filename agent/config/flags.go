package config

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/pflag"

	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
)

// EnvPrefix begins the environment variable of every setting.
const EnvPrefix = "SOCKMESH_"

// Group is a titled part of --help.
type Group struct {
	Title string
	Flags *pflag.FlagSet
}

// Flags are the agent's settings as flags, bound to one Config.
type Flags struct {
	Groups []Group
	// File is --config.
	File string
	// Warnings are what Load found odd but not wrong.
	Warnings []string

	config Config
	all    *pflag.FlagSet
}

// NewFlags registers every setting on fs.
func NewFlags(fs *pflag.FlagSet) *Flags {
	f := &Flags{config: Default(), all: fs}
	c := &f.config
	group := func(title string, add func(*pflag.FlagSet)) {
		g := pflag.NewFlagSet(title, pflag.ContinueOnError)
		g.SortFlags = false
		add(g)
		fs.AddFlagSet(g)
		f.Groups = append(f.Groups, Group{title, g})
	}
	oneOf := func(g *pflag.FlagSet, to *string, name, usage string, choices ...string) {
		g.Var(&choice{to, choices}, name, usage)
	}
	group("Sources", func(g *pflag.FlagSet) {
		g.StringVar(&f.File, "config", "", "read settings from this YAML `file`; its keys are the names of the flags below")
		g.StringVar(&c.NodeName, "node-name", "", "`name` of the Node object that this is (default $NODE_NAME, else the host name)")
		g.StringVar(&c.Kubeconfig, "kubeconfig", "", "`file` that says how to reach the Kubernetes API (default: the pod's service account)")
		g.StringVar(&c.APIServer, "api-server", "", "`URL` of the API server, instead of the one in the kubeconfig or the pod's environment: needed where "+
			"that is a ClusterIP and no kube-proxy runs")
		g.StringVar(&c.Manifests, "manifests", "", "take Kubernetes objects from the YAML files of this `directory`, watched, instead of from an API server")
		g.StringVar(&c.Bootstrap, "bootstrap", "", "Envoy v3 bootstrap `file`, YAML or JSON: node, static_resources, dynamic_resources")
		g.StringVar(&c.XDS, "xds", "", "`address` of an xDS server, host:port or unix:///path: delta ADS over plaintext gRPC")
	})
	group("Traffic", func(g *pflag.FlagSet) {
		oneOf(g, &c.Enroll, "enroll", "which pods' connections the proxy may take: all, or those that (or whose namespace) "+
			"carry the label sockmesh.io/enroll=true; a pod's own label wins", EnrollAll, EnrollLabelled)
		oneOf(g, &c.FailMode, "fail-mode", "what an enrolled pod's claimed connection meets while the proxy is away: the Service "+
			"or address itself, or connection refused", FailOpen, FailClosed)
		g.Var(onOff{&c.Services}, "services", "translate Kubernetes Services in the kernel: the kube-proxy replacement")
		oneOf(g, &c.Acceleration, "acceleration", "move bytes between local sockets past the TCP stack (sockops and sk_msg), "+
			"where this kernel does it correctly", AccelerationAuto, AccelerationOff)
		g.Var(onOff{&c.AcceleratePods}, "accelerate-pods", "accelerate connections between two enrolled pods with no proxy between "+
			"them too; their bytes then bypass packet filters")
		g.Var(onOff{&c.OriginalDstSockopt}, "original-dst-sockopt", "let a foreign proxy on port 15001 of a pod have its claimed connections, and answer its getsockopt(SO_ORIGINAL_DST); "+
			"costs every getsockopt on the node a little")
		g.Var(number{&c.Concurrency}, "concurrency", "`number` of proxy loops, one thread each")
		oneOf(g, &c.IO, "io", "how the proxy loops talk to the kernel: io_uring where the kernel has it (6.1 and later, unless "+
			"switched off), else epoll; or one of them", loop.IOAuto, loop.IOEpoll, loop.IORing)
		g.Var(number{&c.MaxConnectionsPerPod}, "max-connections-per-pod", "how many connections of one pod the proxy serves at a time; more are "+
			"reset, so that others get theirs; never more than half of what the descriptor limit allows for all")
		g.Var(duration{&c.DrainTime}, "drain-time", "how long open connections may finish after SIGTERM")
	})
	group("Services", func(g *pflag.FlagSet) {
		g.Var(onOff{&c.Outside}, "outside", "serve clients outside this node too, at NodePort, load-balancer and external IPs, by programs on its network devices")
		g.StringVar(&c.Devices, "devices", c.Devices, "network `devices` by which clients outside may come: auto (all but loopback and those of pods), or "+
			"names and patterns like eth0,bond*")
		g.Var(ports{&c.NATPorts}, "nat-ports", "source ports of such clients' connections towards backends that don't see the client (policy Cluster); "+
			"below node ports and the host's own ephemeral ports, so that no connection of the host's can have the same")
		g.Var(duration{&c.NATEstablished}, "nat-established", "how long a TCP connection of a client outside may be silent before it is forgotten")
		g.StringVar(&c.NodePortAddresses, "nodeport-addresses", c.NodePortAddresses, "where node ports are served: primary (the Node object's "+
			"first `address` of each family), all, or ranges like 192.168.0.0/16,fd00::/8; loopback, as one more word, serves them to the host there too")
		oneOf(g, &c.ExternalIPs, "external-ips", "which of Services' externalIPs are honoured: all, those that this node itself has, or none; "+
			"whoever may write Services can name any address there", "all", "own", "none")
		g.StringVar(&c.KubeProxyHealthz, "kube-proxy-healthz", c.KubeProxyHealthz, "`address`, host:port, of the /healthz that cloud load balancers ask a "+
			"kube-proxy's (port 10256), or off; a kube-proxy that still has the port is waited for")
		g.Var(duration{&c.SyncTimeout}, "sync-timeout", "how long to wait for every source's first list before those that came may delete what an earlier agent left")
		g.Var(duration{&c.DriftInterval}, "drift-interval", "time between comparisons of the maps with what was written to them")
		g.Var(duration{&c.TCPGrace}, "tcp-grace", "how long TCP connections to an endpoint that has left its Service altogether may go on before "+
			"they are reset; negative: for ever. Those to an endpoint that drains always go on")
		for _, m := range c.Maps.ByMap() {
			g.Var(size{m.Entries}, "map-"+m.Flag(), "entries that "+m.Map+" has room for: "+m.Holds)
		}
	})
	group("Machine", func(g *pflag.FlagSet) {
		g.StringVar(&c.CgroupRoot, "cgroup-root", "", "cgroup v2 `directory` whose processes are served (default: the cgroup2 mount)")
		g.StringVar(&c.BPFFS, "bpffs", c.BPFFS, "`directory` on a BPF file system where maps and links are pinned; a BPF file system is mounted if there is none")
		g.StringVar(&c.NetnsDir, "netns-dir", c.NetnsDir, "`directory` in which the container runtime names pods' network namespaces")
		g.StringVar(&c.StateDir, "state-dir", c.StateDir, "`directory` for what must survive a restart: the last good xDS configuration")
		g.Var(onOff{&c.DropPrivileges}, "drop-privileges", "keep only the capabilities that the agent needs while it runs, on every thread, and "+
			"never get any back; files must then be readable to root by their modes")
	})
	group("Observing", func(g *pflag.FlagSet) {
		g.StringVar(&c.Admin, "admin", c.Admin, "Unix `socket` of the admin API, mode 0600")
		g.StringVar(&c.Metrics, "metrics", c.Metrics, "`address` of /metrics, /healthz and /readyz, or off")
		g.Var(level{&c.LogLevel}, "log-level", "least severe level that is logged")
		oneOf(g, &c.LogFormat, "log-format", "how log lines are written", LogText, LogJSON)
	})
	return f
}

// WriteUsage prints the settings by group, each with its default.
func (f *Flags) WriteUsage(w io.Writer, width int) {
	for _, g := range f.Groups {
		fmt.Fprintf(w, "%s:\n%s\n", g.Title, g.Flags.FlagUsagesWrapped(width))
	}
	fmt.Fprintf(w, "Every flag may also stand in the environment (--drain-time as %s) and in the file given by --config;\n"+
		"flags win over the environment, the environment over the file.\n", EnvName("drain-time"))
}

// EnvName is the environment variable of a flag.
func EnvName(flag string) string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}
