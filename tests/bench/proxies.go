package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// outbound is where a proxy listens in the client pod.
var outbound = netip.MustParseAddrPort("127.0.0.1:15001")

// peer is another proxy, tuned as its own documentation advises for benchmarks: one worker, no access log, upstream
// connections kept.
type peer struct {
	name  string
	start func(context.Context) (*lab.Process, error)
}

func (w *world) peers() []peer {
	peers := []peer{{"haproxy", w.startHAProxy}, {"nginx", w.startNginx}}
	if _, err := os.Stat(w.envoyBinary()); err == nil {
		peers = append([]peer{{"envoy", w.startEnvoy}}, peers...)
	} else {
		fmt.Fprintf(os.Stderr, "bench: Envoy is left out: %v\n", err)
	}
	return peers
}

func (w *world) envoyBinary() string { return filepath.Join(w.o.build, "envoy/envoy/_bin/envoy") }

func (w *world) startEnvoy(ctx context.Context) (*lab.Process, error) {
	file, err := w.config("envoy.yaml", `
admin: {address: {pipe: {path: `+filepath.Join(w.lab.Dir, "tmp", "envoy.sock")+`}}}
stats_config: {stats_matcher: {reject_all: true}}
static_resources:
  listeners:
  - name: out
    address: {socket_address: {address: 127.0.0.1, port_value: 15001}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: out
          generate_request_id: false
          route_config:
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: server}}]}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router, dynamic_stats: false}
  clusters:
  - name: server
    type: STATIC
    circuit_breakers: {thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000, max_retries: 100}]}
    load_assignment:
      cluster_name: server
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: ADDR, port_value: PORT}}}}]}]
`)
	if err != nil {
		return nil, err
	}
	return w.startProxy(ctx, "envoy", w.envoyBinary(), "-c", file, "--concurrency", "1", "--base-id", fmt.Sprint(os.Getpid()%30000), "-l", "error")
}

func (w *world) startHAProxy(ctx context.Context) (*lab.Process, error) {
	file, err := w.config("haproxy.cfg", `
global
  nbthread 1
  maxconn 8000
defaults
  mode http
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend out
  bind 127.0.0.1:15001 backlog 4096
  default_backend server
backend server
  server s ADDR:PORT pool-max-conn -1
`)
	if err != nil {
		return nil, err
	}
	return w.startProxy(ctx, "haproxy", "haproxy", "-db", "-f", file)
}

func (w *world) startNginx(ctx context.Context) (*lab.Process, error) {
	dir, err := os.MkdirTemp(filepath.Join(w.lab.Dir, "tmp"), "nginx-proxy")
	if err != nil {
		return nil, err
	}
	file, err := w.config("nginx.conf", strings.ReplaceAll(`
daemon off; user root; worker_processes 1; pid DIR/pid; error_log stderr error;
events { worker_connections 16384; }
http {
  access_log off; tcp_nodelay on; keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fcgi; uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
  upstream server { server ADDR:PORT; keepalive 512; keepalive_requests 1000000000; keepalive_timeout 1h; }
  server {
    listen 127.0.0.1:15001 backlog=4096;
    location / { proxy_pass http://server; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}`, "DIR", dir))
	if err != nil {
		return nil, err
	}
	return w.startProxy(ctx, "nginx", "nginx", "-e", "stderr", "-c", file)
}

// startBareSockmesh runs the agent as a proxy like the others, with a listener of its own and none of its hooks: what
// it would be behind iptables. Its cgroup root is an empty one.
func (w *world) startBareSockmesh(ctx context.Context) (*lab.Process, error) {
	file, err := w.config("sockmesh.yaml", `
static_resources:
  listeners:
  - name: out
    bind_to_port: true
    address: {socket_address: {address: 127.0.0.1, port_value: 15001}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: out
          generate_request_id: false
          route_config:
            name: out
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: server}}]}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
  clusters:
  - name: server
    type: STATIC
    circuit_breakers: {thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}]}
    load_assignment:
      cluster_name: server
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: ADDR, port_value: PORT}}}}]}]
`)
	if err != nil {
		return nil, err
	}
	empty := filepath.Join(w.client.Cgroup, "bare")
	if err := os.Mkdir(empty, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	dir := filepath.Join(w.lab.Dir, "tmp", "bare")
	for _, d := range []string{"manifests", "netns", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	return w.startProxy(ctx, "sockmesh-agent", filepath.Join(w.o.build, "bin/sockmesh-agent"),
		"--bootstrap", file, "--concurrency", "1", "--services", "off", "--acceleration", "off", "--metrics", "127.0.0.1:15090",
		"--cgroup-root", empty, "--bpffs", filepath.Join(w.lab.Dir, "bpf", "bare"), "--manifests", filepath.Join(dir, "manifests"),
		"--netns-dir", filepath.Join(dir, "netns"), "--state-dir", filepath.Join(dir, "state"), "--admin", "unix://"+filepath.Join(w.lab.Dir, "bare.sock"))
}

// config writes a configuration file with the server's address in it.
func (w *world) config(name, text string) (string, error) {
	file := filepath.Join(w.lab.Dir, "tmp", name)
	text = strings.NewReplacer("ADDR", w.backend().Addr().String(), "PORT", fmt.Sprint(w.backend().Port())).Replace(text)
	return file, os.WriteFile(file, []byte(text), 0o644)
}

// startProxy runs a proxy in the client pod and waits for its listener.
func (w *world) startProxy(ctx context.Context, name string, args ...string) (*lab.Process, error) {
	proc, err := w.client.Start(name, args...)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := lab.Wait(ctx, func() error {
		if !proc.Running() {
			cancel()
		}
		c, err := w.client.Dial(ctx, "tcp", outbound.String())
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		_ = proc.Stop(time.Second)
		return nil, fmt.Errorf("%s did not come up: %w: %s", name, err, proc.Tail())
	}
	return proc, nil
}

// behindIptables is how a mesh without eBPF does it: a REDIRECT rule in the pod.
func (w *world) behindIptables(start func(context.Context) (*lab.Process, error)) func(context.Context) (setup, error) {
	return func(ctx context.Context) (setup, error) {
		proc, err := start(ctx)
		if err != nil {
			return setup{}, err
		}
		undo := func() error {
			// The whole rule set goes, so that the next case does not pay for an empty NAT table.
			_, err := w.client.Run(context.WithoutCancel(ctx), "nft", "flush", "ruleset")
			return errors.Join(stop(proc), err)
		}
		_, err = w.client.Run(ctx, "iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", target.Addr().String(),
			"--dport", fmt.Sprint(target.Port()), "-j", "REDIRECT", "--to-ports", fmt.Sprint(outbound.Port()))
		return setup{target, proc, undo}, err
	}
}

// behindHooks puts a foreign proxy behind our own programs: the bench itself drives the datapath, as the agent would,
// and the proxy merely listens where the hooks look for a listener.
func (w *world) behindHooks(start func(context.Context) (*lab.Process, error), accelerate bool) func(context.Context) (setup, error) {
	return func(ctx context.Context) (setup, error) {
		proc, err := start(ctx)
		if err != nil {
			return setup{}, err
		}
		detach, err := w.attachHooks(ctx, accelerate)
		return setup{target, proc, func() error { return errors.Join(stop(proc), detach()) }}, err
	}
}

func (w *world) attachHooks(ctx context.Context, accelerate bool) (detach func() error, err error) {
	cfg := datapath.Config{
		CgroupRoot: w.lab.Cgroup, BPFFS: w.lab.BPFFS(), Services: true,
		// The proxy's upstream connections carry no mark of ours, so they count as what they look like: a pod
		// calling a pod.
		Acceleration: accelerate, AcceleratePods: accelerate,
	}
	dp, err := datapath.Open(cfg)
	if err != nil {
		return func() error { return nil }, err
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	detach = func() error {
		cancel()
		return errors.Join(dp.Close(), datapath.Cleanup(cfg))
	}
	rec := dp.Reconciler()
	go func() { _ = rec.Run(ctx) }()
	var pods []datapath.Pod
	for _, p := range []*lab.Pod{w.client, w.server} {
		cookie, err := p.Cookie()
		if err != nil {
			return detach, err
		}
		pods = append(pods, datapath.Pod{Cookie: cookie, IPs: p.Addrs, Enrolled: true, Namespace: p.Namespace, Name: p.PodSpec.Name})
	}
	rec.SetPods(pods)
	rec.SetClaims([]mesh.Claim{{Addr: target, Listener: "bench"}})
	for _, source := range []string{datapath.SourceServices, datapath.SourceClaims, datapath.SourcePods} {
		rec.Synced(source)
	}
	return detach, rec.Flush(ctx)
}

// sockmesh is the whole thing as it runs on a node.
func (w *world) sockmesh(acceleration string) func(context.Context) (setup, error) {
	return func(ctx context.Context) (setup, error) {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		cluster := lab.Cluster("server")
		if err := errors.Join(
			w.lab.WriteXDS("bench", cluster, lab.Endpoints("server", w.backend()), lab.HTTPListener("bench", "bench", target),
				lab.Routes("bench", lab.Route{Clusters: []lab.Weight{{Cluster: "server", Weight: 1}}})),
		); err != nil {
			return setup{}, err
		}
		control, err := w.lab.StartControl(ctx)
		if err != nil {
			return setup{}, err
		}
		agent, err := w.lab.StartAgent(ctx, "--acceleration", acceleration, "--concurrency", "1", "--drain-time", "1s")
		if err != nil {
			return setup{}, errors.Join(err, stop(control))
		}
		undo := func() error {
			err := errors.Join(stop(agent), stop(control))
			// The agent leaves its programs attached, which is what it is for; the next case must not meet them.
			cleanup, cleanErr := exec.Command(filepath.Join(w.o.build, "bin/sockmesh-agent"), "cleanup", "--cgroup-root", w.lab.Cgroup, "--bpffs", w.lab.BPFFS()).CombinedOutput()
			if cleanErr != nil {
				err = errors.Join(err, fmt.Errorf("sockmesh-agent cleanup: %w: %s", cleanErr, cleanup))
			}
			return err
		}
		err = w.lab.WaitStatus(ctx, "the listener and two enrolled pods", func(s lab.Status) bool {
			return s.XDS.Resources["listener"] == 1 && s.XDS.Resources["cluster"] == 1 && s.Pods.Enrolled == 2
		})
		return setup{target, agent, undo}, err
	}
}

// stop ends a process in good order; that it ended by our signal is not an error.
func stop(p *lab.Process) error {
	_ = p.Stop(5 * time.Second)
	return nil
}
