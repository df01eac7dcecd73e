package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// outbound is where a proxy listens in the client pod.
var outbound = netip.MustParseAddrPort("127.0.0.1:15001")

// starter runs a proxy in the client pod, for one scenario.
type starter func(context.Context, scenario) (*lab.Process, error)

// peer is another proxy, tuned as its own documentation advises for benchmarks: one worker, no access log, upstream
// connections kept.
type peer struct {
	name  string
	start starter
}

func (w *world) peers() []peer {
	peers := []peer{{"haproxy", w.startHAProxy}, {"nginx", w.startNginx}, {"floor", w.startFloor}}
	if _, err := os.Stat(w.envoyBinary()); err == nil {
		peers = append([]peer{{"envoy", w.startEnvoy}}, peers...)
	} else {
		fmt.Fprintf(os.Stderr, "bench: Envoy is left out: %v\n", err)
	}
	return peers
}

func (w *world) envoyBinary() string { return filepath.Join(w.o.build, "envoy/envoy/_bin/envoy") }

// envoyFilter is the network filter of Envoy and, with a listener of its own, of sockmesh: the same work.
func envoyFilter(s scenario) string {
	if s.tcp {
		return `
      - name: envoy.filters.network.tcp_proxy
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: out, cluster: server}`
	}
	routes := `route_config: {name: out, virtual_hosts: ` + s.virtualHosts() + `}`
	if s.dynamic {
		routes = `rds: {route_config_name: bench, config_source: {path_config_source: {path: TMP/rds.json}, resource_api_version: V3}}`
	}
	return `
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: out
          generate_request_id: false
          ` + routes + `
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router, dynamic_stats: false}`
}

// envoyStatic is a bootstrap with one listener and the scenario's clusters, whose limits nothing here runs into.
func envoyStatic(s scenario) string {
	const limits = `"circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000, "max_retries": 100}]}`
	var clusters []string
	for _, name := range s.clusterNames() {
		endpoints := fmt.Sprintf(`"type": "STATIC", "load_assignment": {"cluster_name": %q,
    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "ADDR", "port_value": PORT}}}}]}]}`, name)
		if s.dynamic {
			endpoints = `"type": "EDS", "eds_cluster_config": {"eds_config": {"path_config_source": {"path": "TMP/eds.json"}, "resource_api_version": "V3"}}`
		}
		clusters = append(clusters, fmt.Sprintf(`{"name": %q, %s, %s}`, name, limits, endpoints))
	}
	return `
node: {id: bench, cluster: bench}
static_resources:
  listeners:
  - name: out
    address: {socket_address: {address: 127.0.0.1, port_value: 15001}}
    filter_chains:
    - filters:` + envoyFilter(s) + `
  clusters: [` + strings.Join(clusters, ",\n    ") + `]
`
}

func (w *world) envoyAdmin() string { return filepath.Join(w.lab.Dir, "tmp", "envoy.sock") }

func (w *world) startEnvoy(ctx context.Context, s scenario) (*lab.Process, error) {
	if s.dynamic {
		if err := w.writeVersion(s, 0); err != nil {
			return nil, err
		}
	}
	file, err := w.config(s, "envoy.yaml", `
admin: {address: {pipe: {path: `+w.envoyAdmin()+`}}}
stats_config: {stats_matcher: {reject_all: true}}
`+envoyStatic(s))
	if err != nil {
		return nil, err
	}
	return w.startProxy(ctx, "envoy", w.envoyBinary(), "-c", file, "--concurrency", s.workers(), "--base-id", fmt.Sprint(os.Getpid()%30000), "-l", "error")
}

func (w *world) startHAProxy(ctx context.Context, s scenario) (*lab.Process, error) {
	mode := "http\n  option http-keep-alive\n  http-reuse always"
	if s.tcp {
		mode = "tcp"
	}
	file, err := w.config(s, "haproxy.cfg", `
global
  nbthread `+s.workers()+`
  no strict-limits
  maxconn 16000
defaults
  mode `+mode+`
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

func (w *world) startNginx(ctx context.Context, s scenario) (*lab.Process, error) {
	dir, err := os.MkdirTemp(filepath.Join(w.lab.Dir, "tmp"), "nginx-proxy")
	if err != nil {
		return nil, err
	}
	work := `
http {
  access_log off; tcp_nodelay on; keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fcgi; uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
  upstream server { server ADDR:PORT; keepalive 512; keepalive_requests 1000000000; keepalive_timeout 1h; }
  server {
    listen 127.0.0.1:15001 backlog=4096;
    location / { proxy_pass http://server; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}`
	if s.tcp {
		work = `
stream { server { listen 127.0.0.1:15001 backlog=4096; proxy_pass ADDR:PORT; proxy_timeout 1h; tcp_nodelay on; } }`
	}
	file, err := w.config(s, "nginx.conf", strings.ReplaceAll(`
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; user root; worker_processes `+s.workers()+`; pid DIR/pid; error_log stderr error;
events { worker_connections 16384; }`+work, "DIR", dir))
	if err != nil {
		return nil, err
	}
	return w.startProxy(ctx, "nginx", "nginx", "-e", "stderr", "-c", file)
}

// bareMetrics is where sockmesh without its hooks tells how it is, in the client pod.
const bareMetrics = "127.0.0.1:15090"

// startBareSockmesh runs the agent as a proxy like the others, with a listener of its own and none of its hooks: what
// it would be behind iptables. Its cgroup root is an empty one.
func (w *world) startBareSockmesh(ctx context.Context, s scenario) (*lab.Process, error) {
	file, err := w.config(s, "sockmesh.yaml", envoyStatic(s))
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
		"--bootstrap", file, "--concurrency", s.workers(), "--services", "off", "--acceleration", "off", "--metrics", bareMetrics,
		"--cgroup-root", empty, "--bpffs", filepath.Join(w.lab.Dir, "bpf", "bare"), "--manifests", filepath.Join(dir, "manifests"),
		"--netns-dir", filepath.Join(dir, "netns"), "--state-dir", filepath.Join(dir, "state"), "--admin", "unix://"+filepath.Join(w.lab.Dir, "bare.sock"))
}

// config writes a configuration file with the server's address in it.
func (w *world) config(s scenario, name, text string) (string, error) {
	file := filepath.Join(w.lab.Dir, "tmp", name)
	text = strings.NewReplacer("ADDR", w.backend(s).Addr().String(), "PORT", fmt.Sprint(w.backend(s).Port()), "TMP", filepath.Dir(file)).Replace(text)
	return file, os.WriteFile(file, []byte(text), 0o644)
}

// startProxy runs a proxy in the client pod and waits for its listener.
func (w *world) startProxy(ctx context.Context, name string, args ...string) (*lab.Process, error) {
	proc, err := w.client.Start(name, pinned(proxyRole, args...)...)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
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
