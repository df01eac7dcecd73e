package node

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// world is a cluster with a shop in two versions behind one Service that an HTTP listener claims, and a client that
// is enrolled.
type world struct {
	*lab.Lab
	t              *testing.T
	ctx            context.Context
	client, v1, v2 *lab.Pod
	shop           lab.ServiceSpec
	agent, control *lab.Process
}

// place says where a world stands: addresses and namespaces that no part of the product knows.
type place struct {
	namespace string
	subnets   []string // v4, v6 or both
	vips      []string // one per subnet
}

var anywhere = place{"shop", []string{"10.77.0.0/24", "fd77::/64"}, []string{"10.96.0.10", "fd96::10"}}

// enrolled is the label that lets the proxy take a pod's connections.
var enrolled = map[string]string{"sockmesh.io/enroll": "true"}

// newWorld builds it and starts control plane and agent.
func newWorld(t *testing.T, p place, agentFlags ...string) *world {
	t.Helper()
	w := newBareWorld(t, p)
	var err error
	if w.control, err = w.StartControl(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.startAgent(agentFlags...)
	return w
}

// newBareWorld builds the cluster and its configuration, and starts nothing of ours yet.
func newBareWorld(t *testing.T, p place) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	cfg := lab.Config{NodeName: "worker-7"}
	for _, s := range p.subnets {
		cfg.Subnets = append(cfg.Subnets, netip.MustParsePrefix(s))
	}
	l := labtest.New(t, cfg)
	w := &world{Lab: l, t: t, ctx: ctx}
	w.client = w.pod(p, "client", 20, enrolled)
	w.v1, w.v2 = w.server(p, "v1", 21), w.server(p, "v2", 22)
	w.shop = lab.ServiceSpec{Namespace: p.namespace, Name: "shop", Port: 80, TargetPort: 8080, Backends: []*lab.Pod{w.v1, w.v2}}
	for _, vip := range p.vips {
		w.shop.ClusterIPs = append(w.shop.ClusterIPs, netip.MustParseAddr(vip))
	}
	w.must(l.SetService(w.shop))
	w.must(l.WriteXDS("clusters", lab.Cluster("v1"), lab.Cluster("v2")))
	w.endpoints("v1", w.v1)
	w.endpoints("v2", w.v2)
	w.weights(50, 50)
	var addrs []netip.AddrPort
	for i := range w.shop.ClusterIPs {
		addrs = append(addrs, w.shop.VIP(i))
	}
	w.must(l.WriteXDS("listener", lab.HTTPListener("shop", "shop", addrs...)))
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// startAgent waits until everything that the folders hold is in force.
func (w *world) startAgent(flags ...string) {
	w.t.Helper()
	var err error
	w.agent, err = w.StartAgent(w.ctx, flags...)
	w.must(err)
	w.must(w.WaitStatus(w.ctx, "listener, clusters, endpoints and the enrolled pod", func(s lab.Status) bool {
		return s.XDS.Resources["listener"] >= 1 && s.XDS.Resources["cluster"] >= 2 && s.XDS.Resources["endpoint"] >= 2 && s.Pods.Enrolled >= 1
	}))
}

// pod adds one with an address of each family, n counting from the subnet's start.
func (w *world) pod(p place, name string, n int, labels map[string]string) *lab.Pod {
	w.t.Helper()
	spec := lab.PodSpec{Namespace: p.namespace, Name: name, Labels: labels}
	for _, s := range p.subnets {
		addr := netip.MustParsePrefix(s).Addr()
		for range n {
			addr = addr.Next()
		}
		spec.Addrs = append(spec.Addrs, addr)
	}
	pod, err := w.AddPod(spec)
	w.must(err)
	return pod
}

// server is a pod with an nginx that says who it is, whether the proxy was on the way, and whom it sees.
func (w *world) server(p place, name string, n int) *lab.Pod {
	w.t.Helper()
	pod := w.pod(p, name, n, nil)
	_, err := pod.StartNginx(w.ctx, 8080, fmt.Sprintf(
		`location / { set $how proxied; if ($http_x_request_id = "") { set $how direct; } return 200 "%s/$how $remote_addr\n"; }`, name))
	w.must(err)
	return pod
}

func (w *world) endpoints(cluster string, pods ...*lab.Pod) {
	w.t.Helper()
	var addrs []netip.AddrPort
	for _, p := range pods {
		addrs = append(addrs, netip.AddrPortFrom(p.Addrs[0], 8080))
	}
	w.must(w.WriteXDS("endpoints-"+cluster, lab.Endpoints(cluster, addrs...)))
}

// weights of the shop's route; x-canary: always goes to v2 whatever they are.
func (w *world) weights(v1, v2 int) {
	w.t.Helper()
	w.must(w.WriteXDS("routes", lab.Routes("shop",
		lab.Route{Header: "x-canary", Value: "always", Clusters: []lab.Weight{{Cluster: "v2", Weight: 1}}},
		lab.Route{Retry: true, Clusters: []lab.Weight{{Cluster: "v1", Weight: v1}, {Cluster: "v2", Weight: v2}}},
	)))
}

// inForce waits until a configuration newer than that generation is.
func (w *world) inForce(before uint64) {
	w.t.Helper()
	w.must(w.WaitStatus(w.ctx, fmt.Sprintf("newer than generation %d", before), func(s lab.Status) bool { return s.Proxy.Generation > before }))
}

// curl sends n requests from the pod to the address, on one connection, and counts the lines of the answers.
func (w *world) curl(from *lab.Pod, to netip.AddrPort, n int, flags ...string) map[string]int {
	w.t.Helper()
	counts, err := w.tryCurl(from, to, n, flags...)
	w.must(err)
	return counts
}

func (w *world) tryCurl(from *lab.Pod, to netip.AddrPort, n int, flags ...string) (map[string]int, error) {
	// The brackets of an IPv6 URL and the range that counts requests don't go together in curl.
	args := append([]string{"curl", "-sS", "-f", "-m", "20", "--resolve", fmt.Sprintf("shop.example:%d:[%s]", to.Port(), to.Addr())}, flags...)
	if to.Addr().Is4() {
		args[6] = fmt.Sprintf("shop.example:%d:%s", to.Port(), to.Addr())
	}
	out, err := from.Run(w.ctx, append(args, fmt.Sprintf("http://shop.example:%d/[1-%d]", to.Port(), n))...)
	counts := map[string]int{}
	for line := range strings.Lines(out) {
		counts[strings.TrimSpace(line)]++
	}
	return counts, err
}

// load is 64 connections of traffic to the shop, which must have begun to flow before it returns.
func (w *world) load(fresh bool) *lab.Load {
	w.t.Helper()
	l, err := w.client.StartTraffic(traffic.Config{
		Addr: w.shop.VIP(0).String(), Host: "shop", Connections: 64, Pause: 5 * time.Millisecond, NewConnection: fresh,
	})
	w.must(err)
	w.must(l.WaitRequests(w.ctx, 500))
	return l
}

// finish ends the load and fails the test if any request failed.
func (w *world) finish(l *lab.Load) traffic.Report {
	w.t.Helper()
	r, err := l.Stop()
	w.must(err)
	w.t.Logf("%d requests on %d connections, %d failed; answers: %v", r.Requests, r.Connected, r.Failed, r.Answers)
	if r.Failed > 0 {
		w.t.Errorf("%d requests failed, the first: %+v", r.Failed, r.Failures[0])
	}
	return r
}

// eventually waits for what cannot be waited for otherwise.
func (w *world) eventually(what string, try func() error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, 30*time.Second)
	defer cancel()
	if err := lab.Wait(ctx, try); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

func (w *world) status() lab.Status {
	w.t.Helper()
	s, err := w.Status(w.ctx)
	w.must(err)
	return s
}
