package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/controlplane"
)

// Connections to a Service among many. Each way of reaching it has a node of its own, all nodes learn the same objects from one
// API server, and all run at once: so the number of Services grows in steps, and at each step the rounds alternate between
// nodes that are ready. What idles meanwhile is the same for all.
//
// Every Service has one endpoint, the server pod of the node. A round goes to many of the Services in turn, evenly spread,
// because a packet filter that walks a list is as fast as the place in it.

// serviceCounts are the numbers of Services present.
var serviceCounts = []int{10, 1_000, 10_000, 30_000}

const (
	serviceConnections = 16  // under way at a time
	serviceTargets     = 500 // Services that a round goes to, at most
	serviceWarmUp      = time.Second / 2
	serviceSync        = 5 * time.Minute // how long a proxy may take to know all Services
)

// servicesProxy is a way to reach a Service.
type servicesProxy struct {
	name, path string
	start      func(context.Context, *kubeAPI, *kubeNode, options) error
	direct     bool // to the pod itself
}

var servicesProxies = []servicesProxy{
	{name: "none", path: "none", direct: true},
	{name: "sockmesh", path: "connect", start: startServiceAgent},
	{name: "kube-proxy-iptables", path: "iptables", start: startKubeProxy("iptables")},
	{name: "kube-proxy-nftables", path: "nftables", start: startKubeProxy("nftables")},
}

var servicesColumns = []column{
	{"connections/s", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.RPS.Median) }},
	loadColumns[1], loadColumns[2], loadColumns[3], loadColumns[4], loadColumns[5],
}

// runServices is the whole scenario.
func runServices(ctx context.Context, o options, s scenario, r *report) (err error) {
	var nodes []*kubeNode
	var api *kubeAPI
	defer func() {
		for _, n := range nodes {
			err = errors.Join(err, n.close())
		}
	}()
	proxies := slices.DeleteFunc(slices.Clone(servicesProxies), func(p servicesProxy) bool { return !wanted(o.proxy, p.name) })
	broken := map[string]error{}
	for i, p := range proxies {
		n, err := newKubeNode(ctx, o)
		nodes = append(nodes, n)
		if err != nil {
			return err
		}
		if i == 0 {
			if api, err = newKubeAPI(o, n); err != nil {
				return err
			}
			if err := api.createNode(ctx); err != nil {
				return err
			}
		}
		if p.start != nil {
			if err := p.start(ctx, api, n, o); err != nil {
				broken[p.name] = err
			}
		}
	}
	have := 0
	for _, count := range serviceCounts {
		progress("%s: %d Services", s.name, count)
		var objects []runtime.Object
		for ; have < count; have++ {
			objects = append(objects, serviceObject(have), sliceObject(have, 0, tcpPort, serverAddr))
		}
		began := time.Now()
		if err := api.store(ctx, objects); err != nil {
			return err
		}
		progress("%s: %d Services, stored in %s", s.name, count, time.Since(began).Round(time.Millisecond))
		for i, p := range proxies {
			if broken[p.name] == nil && !p.direct {
				progress("%s: %d Services, waiting for %s", s.name, count, p.name)
				began := time.Now()
				broken[p.name] = nodes[i].knows(ctx, count)
				progress("%s: %d Services, %s knows them after %s", s.name, count, p.name, time.Since(began).Round(time.Millisecond))
			}
		}
		for round := range o.rounds {
			for i, p := range proxies {
				if err := ctx.Err(); err != nil {
					return err
				}
				c := testCase{proxy: p.name, path: p.path, variant: fmt.Sprintf("%d Services", count), services: count}
				progress("%s, round %d of %d: %s", s.name, round+1, o.rounds, c)
				var x sample
				err := broken[p.name]
				if err == nil {
					x, err = nodes[i].round(ctx, p, count, o.duration)
				}
				r.add(s, c, x, err)
			}
		}
	}
	return nil
}

// createNode makes the Node object that all the nodes go by.
func (a *kubeAPI) createNode(ctx context.Context) error {
	nodes := a.server.Client(controlplane.AdminToken).CoreV1().Nodes()
	n, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}, Spec: corev1.NodeSpec{PodCIDR: "10.77.0.0/16", PodCIDRs: []string{"10.77.0.0/16"}}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: clientSubnet.Addr().Next().String()}}
	_, err = nodes.UpdateStatus(ctx, n, metav1.UpdateOptions{})
	return err
}

// startServiceAgent starts sockmesh as it runs on a node that has no control plane for proxies.
func startServiceAgent(ctx context.Context, api *kubeAPI, n *kubeNode, _ options) error {
	agent, err := n.startAgent(api)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return n.lab.WaitReady(ctx, agent)
}

func (n *kubeNode) startAgent(api *kubeAPI, flags ...string) (*lab.Process, error) {
	kubeconfig, err := api.kubeconfig(n)
	if err != nil {
		return nil, err
	}
	return n.lab.StartAgentNoWait(append([]string{"--manifests", "", "--xds", "", "--kubeconfig", kubeconfig, "--drain-time", "1s", "--log-format", "json"}, flags...)...)
}

// startKubeProxy starts upstream's kube-proxy in a mode, with its defaults except that it does not write all its rules again
// every so often, and leaves the connection table's size alone, which belongs to the machine. Connections that have ended
// leave that table after seconds instead of two minutes: at the benchmark's rate it would be full, and kube-proxy out.
func startKubeProxy(mode string) func(context.Context, *kubeAPI, *kubeNode, options) error {
	return func(_ context.Context, api *kubeAPI, n *kubeNode, o options) error {
		binary, err := controlplane.Build(filepath.Dir(o.build), "kube-proxy")
		if err != nil {
			return err
		}
		kubeconfig, err := api.kubeconfig(n)
		if err != nil {
			return err
		}
		file := filepath.Join(n.lab.Dir, "tmp", "kube-proxy.yaml")
		text := fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
clientConnection: {kubeconfig: %q, qps: -1}
hostnameOverride: node-1
healthzBindAddress: ""
metricsBindAddress: 127.0.0.1:10249
clusterCIDR: 10.64.0.0/10
detectLocalMode: ClusterCIDR
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
iptables: {syncPeriod: 24h}
nftables: {syncPeriod: 24h}
`, mode, kubeconfig)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
		if _, err := n.lab.Node.Start("kube-proxy", binary, "--config", file); err != nil {
			return err
		}
		return sysctl(n.lab.Node, map[string]string{"net/netfilter/nf_conntrack_tcp_timeout_time_wait": "5"})
	}
}

// targets are Services to connect to, evenly spread over those that there are.
func targets(count int) []netip.AddrPort {
	var all []netip.AddrPort
	n := min(count, serviceTargets)
	for i := range n {
		all = append(all, serviceAddr(i*count/n))
	}
	return append(all, serviceAddr(count-1))
}

// knows waits until every Service that rounds go to answers.
func (n *kubeNode) knows(ctx context.Context, count int) error {
	ctx, cancel := context.WithTimeout(ctx, serviceSync)
	defer cancel()
	return lab.Wait(ctx, func() error {
		to := targets(count)
		x, err := n.connects(ctx, to, 4, serviceSync, "-once")
		if err == nil && int(x.requests) < len(to) {
			err = fmt.Errorf("of %d Services some do not answer: of %d exchanges %d failed", count, len(to), x.errors)
		}
		return err
	})
}

// round is one measurement of one node.
func (n *kubeNode) round(ctx context.Context, p servicesProxy, count int, d time.Duration) (sample, error) {
	to := targets(count)
	if p.direct {
		to = []netip.AddrPort{netip.AddrPortFrom(serverAddr, tcpPort)}
	}
	if _, err := n.connects(ctx, to, serviceConnections, serviceWarmUp); err != nil {
		return sample{}, err
	}
	x, err := n.connects(ctx, to, serviceConnections, d)
	if err == nil && x.requests == 0 {
		err = errors.New("not one exchange succeeded")
	}
	return x, err
}
