// Package config is the agent's configuration: what may be set, where from, and what is wrong with it.
//
// Every setting has one name. It is a flag (--drain-time), an environment variable (SOCKMESH_DRAIN_TIME) and a
// key of the YAML file given by --config (drain-time), and they win in that order. Values are parsed by the flag
// in all three cases, so that a bad value gets the same message wherever it stands, naming the place.
//
// It must never touch the machine: what the settings mean here (is there a cgroup2 mount?) is agent/host's.
package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// Values of --enroll.
const (
	EnrollAll      = "all"
	EnrollLabelled = "labelled"
)

// Values of --fail-mode.
const (
	FailOpen   = "open"
	FailClosed = "closed"
)

// Values of --acceleration.
const (
	AccelerationAuto = "auto"
	AccelerationOff  = "off"
)

// Values of --log-format.
const (
	LogText = "text"
	LogJSON = "json"
)

// DevicesAuto is what --devices takes to find the network devices.
const DevicesAuto = "auto"

// Off is what --metrics and --kube-proxy-healthz take to serve none.
const Off = "off"

// MaxMapSize bounds the --map flags: the greatest map that is any use, and far below what would make the kernel refuse
// with a message that nobody understands.
const MaxMapSize = 1 << 24

// MaxNATEstablished bounds --nat-established: who is silent for a month has gone.
const MaxNATEstablished = 30 * 24 * time.Hour

// Config is the agent's configuration after all sources were read.
type Config struct {
	NodeName string

	// Kubeconfig and Manifests are exclusive; with neither the agent uses its service account, if it has one.
	Kubeconfig string
	Manifests  string
	// APIServer replaces the address that the kubeconfig or the environment gives: an agent that is the kube-proxy of
	// its node can't reach the API server through a ClusterIP that it must translate first.
	APIServer string

	Bootstrap string
	XDS       string

	Enroll             string
	FailMode           string
	Acceleration       string
	OriginalDstSockopt bool
	AcceleratePods     bool
	Services           bool
	Concurrency        int
	IO                 string

	// Outside serves clients outside this node, by Devices: auto, or names of network devices and patterns of names.
	Outside bool
	Devices string
	// NATPorts are the first and last source port of outside clients' connections towards backends; NATEstablished is how long a
	// TCP connection of theirs may be silent.
	NATPorts       [2]uint16
	NATEstablished time.Duration
	// NodePortAddresses is what service.ParseNodePortAddresses reads, ExternalIPs what service.ParseExternalIPPolicy does.
	NodePortAddresses string
	ExternalIPs       string
	// KubeProxyHealthz is host:port or "off".
	KubeProxyHealthz string
	// SyncTimeout is how long the first lists may take before those that came may delete; DriftInterval the time between
	// comparisons of the maps with what was written.
	SyncTimeout, DriftInterval time.Duration
	// TCPGrace is how long TCP connections to an endpoint that has left its Service may go on; negative: for ever.
	TCPGrace time.Duration
	// Maps are the maps' capacities.
	Maps datapath.Sizes

	// CgroupRoot is empty where the cgroup2 mount is to be found.
	CgroupRoot string
	BPFFS      string
	NetnsDir   string
	StateDir   string

	// Admin is unix:///path; Metrics host:port or "off".
	Admin   string
	Metrics string

	DrainTime time.Duration

	// MaxConnectionsPerPod bounds the connections of one pod that the proxy serves at a time.
	MaxConnectionsPerPod int

	// DropPrivileges reduces the process to the capabilities that it needs while it runs.
	DropPrivileges bool

	LogLevel  slog.Level
	LogFormat string
}

// Default is what holds where nothing was set.
func Default() Config {
	return Config{
		Enroll: EnrollLabelled, FailMode: FailOpen, Acceleration: AccelerationAuto, Services: true, Outside: true, Devices: DevicesAuto,
		Concurrency: runtime.GOMAXPROCS(0), IO: loop.IOAuto, NodePortAddresses: "primary", ExternalIPs: "all", KubeProxyHealthz: Off,
		SyncTimeout: 30 * time.Second, DriftInterval: 30 * time.Second, TCPGrace: 2 * time.Minute, Maps: datapath.DefaultSizes(),
		NATPorts: datapath.DefaultNATPorts, NATEstablished: datapath.DefaultNATEstablished,
		BPFFS: "/sys/fs/bpf/sockmesh", NetnsDir: "/var/run/netns", StateDir: "/var/lib/sockmesh",
		Admin: "unix:///run/sockmesh/admin.sock", Metrics: "127.0.0.1:15090",
		DrainTime: 30 * time.Second, DropPrivileges: true, MaxConnectionsPerPod: 10_000, LogLevel: slog.LevelInfo, LogFormat: LogText,
	}
}

// complete fills what follows from the environment rather than from a setting.
func (c *Config) complete(lookupEnv func(string) (string, bool)) error {
	if c.NodeName != "" {
		return nil
	}
	if n, ok := lookupEnv("NODE_NAME"); ok && n != "" {
		c.NodeName = n
		return nil
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("no --node-name, no NODE_NAME in the environment, and no host name: %w", err)
	}
	// The kubelet registers nodes by the lower-cased host name.
	c.NodeName = strings.ToLower(host)
	return nil
}

// Validate checks what one setting alone can't say. inCluster tells whether a service account is mounted.
func (c *Config) Validate(inCluster bool) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Kubeconfig != "" && c.Manifests != "" {
		bad("--kubeconfig and --manifests are both set: Kubernetes objects come from one place, remove one of them")
	}
	if !c.HasKubernetes(inCluster) {
		switch {
		case c.Services:
			bad("no source of Kubernetes objects: give --manifests DIR or --kubeconfig FILE, run in a pod with a service account, " +
				"or set --services=off to run listeners of the node from --bootstrap or --xds alone")
		case c.Bootstrap == "" && c.XDS == "":
			bad("nothing to do: no Kubernetes objects (--manifests, --kubeconfig) and no xDS configuration (--bootstrap, --xds)")
		}
	}
	if c.Concurrency < 1 || c.Concurrency > 1024 {
		bad("--concurrency: %d: expected a number of proxy loops from 1 to 1024", c.Concurrency)
	}
	if c.MaxConnectionsPerPod < 1 || c.MaxConnectionsPerPod > 1<<20 {
		bad("--max-connections-per-pod: %d: expected a number from 1 to 1048576", c.MaxConnectionsPerPod)
	}
	if c.DrainTime < 0 {
		bad("--drain-time: %s: expected zero or more", c.DrainTime)
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{{"--sync-timeout", c.SyncTimeout}, {"--drift-interval", c.DriftInterval}} {
		if d.value < time.Second {
			bad("%s: %s: expected at least 1s", d.flag, d.value)
		}
	}
	if c.TCPGrace == 0 {
		bad("--tcp-grace: 0: expected a time like 2m, or a negative one to never end such connections")
	}
	for _, m := range c.Maps.ByMap() {
		if n := *m.Entries; n < 1 || n > MaxMapSize {
			bad("--map-%s: %d: expected a number of entries from 1 to %d", m.Flag(), n, MaxMapSize)
		}
	}
	if err := datapath.CheckDevices(c.DeviceList()); err != nil {
		errs = append(errs, err)
	}
	if c.NATPorts[0] == 0 || c.NATPorts[0] > c.NATPorts[1] {
		bad("--nat-ports: %d-%d: expected a range of ports from 1 to 65535, the lower one first, like 10000-29999", c.NATPorts[0], c.NATPorts[1])
	}
	if c.NATEstablished < time.Minute || c.NATEstablished > MaxNATEstablished {
		bad("--nat-established: %s: expected a time from 1m to %s", c.NATEstablished, MaxNATEstablished)
	}
	if slices.ContainsFunc(strings.Split(c.NodePortAddresses, ","), func(word string) bool { return strings.TrimSpace(word) == "" }) {
		bad("--nodeport-addresses: %q: an empty word says nothing: expected primary, all, loopback or ranges such as 192.168.0.0/16, or leave the flag out",
			c.NodePortAddresses)
	}
	if _, err := service.ParseNodePortAddresses(c.NodePortAddresses); err != nil {
		errs = append(errs, err)
	}
	if c.ExternalIPs == "" {
		bad("--external-ips: expected all, own or none")
	} else if _, err := service.ParseExternalIPPolicy(c.ExternalIPs); err != nil {
		errs = append(errs, err)
	}
	for _, p := range []struct{ flag, path string }{
		{"--bpffs", c.BPFFS}, {"--netns-dir", c.NetnsDir}, {"--state-dir", c.StateDir},
	} {
		if !filepath.IsAbs(p.path) {
			bad("%s: %q: expected an absolute path", p.flag, p.path)
		}
	}
	if c.CgroupRoot != "" && !filepath.IsAbs(c.CgroupRoot) {
		bad("--cgroup-root: %q: expected an absolute path", c.CgroupRoot)
	}
	if _, err := SocketPath(c.Admin); err != nil {
		bad("--admin: %w", err)
	}
	for _, a := range []struct{ flag, addr string }{{"--metrics", c.Metrics}, {"--kube-proxy-healthz", c.KubeProxyHealthz}} {
		if a.addr == Off {
			continue
		}
		if _, _, err := net.SplitHostPort(a.addr); err != nil {
			bad("%s: %q: expected host:port, or off: %w", a.flag, a.addr, err)
		}
	}
	if c.APIServer != "" {
		if u, err := url.Parse(c.APIServer); err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			bad("--api-server: %q: expected a URL like https://10.0.0.1:6443", c.APIServer)
		}
		if c.Manifests != "" {
			bad("--api-server and --manifests are both set: Kubernetes objects come from one place, remove one of them")
		}
	}
	if c.Bootstrap != "" && c.XDS != "" {
		bad("--bootstrap and --xds are both set: --xds is a shorthand for a bootstrap with one server; name the server in the bootstrap, under dynamic_resources")
	}
	if c.XDS != "" {
		if err := checkXDSAddress(c.XDS); err != nil {
			bad("--xds: %w", err)
		}
	}
	return errors.Join(errs...)
}

// DeviceList is --devices; nil: auto.
func (c *Config) DeviceList() []string {
	if c.Devices == DevicesAuto {
		return nil
	}
	list := strings.Split(c.Devices, ",")
	for i := range list {
		list[i] = strings.TrimSpace(list[i])
	}
	return list
}

// HasKubernetes says whether Kubernetes objects come from anywhere.
func (c *Config) HasKubernetes(inCluster bool) bool {
	return c.Kubeconfig != "" || c.Manifests != "" || inCluster
}

// InCluster says whether this process has a pod's service account, in client-go's terms.
func InCluster() bool {
	if os.Getenv("KUBERNETES_SERVICE_HOST") == "" || os.Getenv("KUBERNETES_SERVICE_PORT") == "" {
		return false
	}
	_, err := os.Stat("/var/run/secrets/kubernetes.io/serviceaccount/token")
	return err == nil
}

// SocketPath is the path in unix:///path. TCP is refused on purpose: whatever listens on an address of the node
// can be reached from pods, and the admin API shows and changes everything.
func SocketPath(addr string) (string, error) {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok {
		return "", fmt.Errorf("%q: expected unix:///path/to.sock (the admin API is never served over TCP, where pods could reach it)", addr)
	}
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("%q: expected an absolute path after unix://, like unix:///run/sockmesh/admin.sock", addr)
	}
	if len(path) > 90 { // sun_path holds 108 and the socket is bound under a longer temporary name
		return "", fmt.Errorf("%q: the path is %d bytes long; a Unix socket's can have 90 here", addr, len(path))
	}
	return path, nil
}

// checkXDSAddress accepts host:port and unix:///path.
func checkXDSAddress(addr string) error {
	if strings.HasPrefix(addr, "unix://") {
		if !filepath.IsAbs(strings.TrimPrefix(addr, "unix://")) {
			return fmt.Errorf("%q: expected an absolute path after unix://", addr)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q: expected host:port or unix:///path: %w", addr, err)
	}
	if host == "" || port == "" {
		return fmt.Errorf("%q: expected host:port or unix:///path", addr)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return fmt.Errorf("%q: port %q: expected a number from 1 to 65535", addr, port)
	}
	return nil
}
