package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
// At each step the proxies start anew, when all objects are there: a proxy that waits for an API server which is away asks less
// and less often, and what it then measured would be that.
//
// Every Service has one endpoint, the server pod of the node. A round goes to many of the Services in turn, evenly spread,
// because a packet filter that walks a list is as fast as the place in it.
//
// A proxy that does not know all Services in time has no result at this number and the greater ones; the others go on.

const (
	serviceConnections = 16  // under way at a time
	serviceTargets     = 500 // Services that a round goes to, at most
	serviceWarmUp      = time.Second / 2
)

// servicesProxy is a way to reach a Service.
type servicesProxy struct {
	name, path string
	start      func(*kubeAPI, *kubeNode, options) (*lab.Process, error)
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
	{"ready after s", func(x result, _ *result) string {
		if ready, ok := x.More[readyAfter]; ok {
			return fmt.Sprintf("%.1f", ready.Median)
		}
		return "-"
	}},
}

// readyAfter is how long after its start a proxy served all Services that rounds go to, in seconds.
const readyAfter = "ready_seconds"

// servicesRun is the scenario under way.
type servicesRun struct {
	o       options
	s       scenario
	r       *report
	api     *kubeAPI
	proxies []servicesProxy
	nodes   []*kubeNode    // of each proxy
	running []*lab.Process // of each proxy
	ready   []float64      // of each proxy: see readyAfter
	broken  map[string]error
}

// runServices is the whole scenario.
func runServices(ctx context.Context, o options, s scenario, r *report) (err error) {
	x := &servicesRun{o: o, s: s, r: r, broken: map[string]error{}}
	x.proxies = slices.DeleteFunc(slices.Clone(servicesProxies), func(p servicesProxy) bool { return !wanted(o.proxy, p.name) })
	x.running, x.ready = make([]*lab.Process, len(x.proxies)), make([]float64, len(x.proxies))
	counts, err := o.serviceCounts()
	if err != nil {
		return err
	}
	defer func() {
		for _, n := range x.nodes {
			err = errors.Join(err, n.close())
		}
	}()
	for i := range x.proxies {
		n, err := newKubeNode(ctx, o)
		x.nodes = append(x.nodes, n)
		if err != nil {
			return err
		}
		if i > 0 {
			continue
		}
		if x.api, err = newKubeAPI(o, n); err != nil {
			return err
		}
		if err := x.api.createNode(ctx); err != nil {
			return err
		}
	}
	have := 0
	for _, count := range counts {
		if err := x.grow(ctx, have, count); err != nil {
			return err
		}
		have = count
		for round := range o.rounds {
			if err := x.round(ctx, count, round); err != nil {
				return err
			}
		}
	}
	return nil
}

// grow adds Services and starts the proxies, one after another, each when the one before is ready.
func (x *servicesRun) grow(ctx context.Context, have, count int) error {
	for i, p := range x.running {
		if p != nil {
			p.Kill()
			x.running[i] = nil
		}
	}
	var objects []runtime.Object
	for ; have < count; have++ {
		objects = append(objects, serviceObject(have), sliceObject(have, 0, tcpPort, serverAddr))
	}
	began := time.Now()
	if err := x.api.store(ctx, objects); err != nil {
		return err
	}
	stage("%s: %d Services, stored in %s", x.s.name, count, time.Since(began).Round(time.Millisecond))
	for i, p := range x.proxies {
		if p.direct || x.broken[p.name] != nil {
			continue
		}
		began, err := time.Now(), error(nil)
		if x.running[i], err = p.start(x.api, x.nodes[i], x.o); err == nil {
			err = x.nodes[i].knows(ctx, count, x.o.sync)
		}
		took := time.Since(began)
		x.ready[i] = took.Seconds()
		if err == nil {
			stage("%s: %d Services, %s is ready after %s", x.s.name, count, p.name, took.Round(time.Millisecond))
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		stage("%s: %d Services, %s is left out after %s: %v", x.s.name, count, p.name, took.Round(time.Millisecond), err)
		x.broken[p.name] = fmt.Errorf("not ready for %d Services after %s: %w", count, took.Round(time.Second), err)
		if x.running[i] != nil { // what it does in vain is not to slow the others down
			x.running[i].KillGroup()
		}
	}
	return nil
}

// round measures each proxy once. Each round begins with another one: what a place in the round does to a figure, the rounds
// share out.
func (x *servicesRun) round(ctx context.Context, count, round int) error {
	stage("%s: %d Services, round %d of %d", x.s.name, count, round+1, x.o.rounds)
	type measured struct {
		x   sample
		err error
	}
	all := make([]measured, len(x.proxies))
	for k := range x.proxies {
		i := (round + k) % len(x.proxies)
		p := x.proxies[i]
		m := measured{err: x.broken[p.name]}
		if m.err == nil {
			m.x, m.err = x.nodes[i].round(ctx, p, count, x.o.duration)
		}
		if ctx.Err() != nil {
			return ctx.Err() // a round counts as a whole
		}
		if m.err == nil && !p.direct {
			m.x.more = map[string]float64{readyAfter: x.ready[i]}
		}
		all[i] = m
	}
	for i, p := range x.proxies {
		x.r.add(x.s, testCase{proxy: p.name, path: p.path, variant: fmt.Sprintf("%d Services", count), services: count}, all[i].x, all[i].err)
	}
	return nil
}

// servicesSummary says for each proxy what part of the direct connections it reaches at each number of Services, and how flat
// that is: the ratios of single rounds, in which both were measured seconds apart; medians with minimum and maximum.
func servicesSummary(out io.Writer, rows []*row) {
	direct := map[int]*row{}
	ratios := map[string]map[int]spread{}
	var names []string
	var counts []int
	for _, w := range rows {
		if w.c.proxy == "none" {
			direct[w.c.services] = w
		}
		if !slices.Contains(counts, w.c.services) {
			counts = append(counts, w.c.services)
		}
	}
	for _, w := range rows {
		d := direct[w.c.services]
		if w.c.proxy == "none" || d == nil || len(w.problems)+len(d.problems) > 0 || len(w.samples) != len(d.samples) {
			continue
		}
		if ratios[w.c.proxy] == nil {
			ratios[w.c.proxy] = map[int]spread{}
			names = append(names, w.c.proxy)
		}
		var each []float64
		for i := range w.samples {
			each = append(each, w.samples[i].rps/d.samples[i].rps)
		}
		ratios[w.c.proxy][w.c.services] = spreadOfValues(each)
	}
	for _, name := range names {
		fmt.Fprintf(out, "%s, of direct, round by round:", name)
		var first, last spread
		for _, count := range counts {
			r, ok := ratios[name][count]
			if !ok {
				fmt.Fprintf(out, "  %d: no result", count)
				continue
			}
			fmt.Fprintf(out, "  %d: %.3f (%.3f to %.3f)", count, r.Median, r.Min, r.Max)
			if first.Median == 0 {
				first = r
			}
			last = r
		}
		if first.Median > 0 {
			fmt.Fprintf(out, "; the last is %.3f of the first", last.Median/first.Median)
		}
		fmt.Fprintln(out)
	}
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
func startServiceAgent(api *kubeAPI, n *kubeNode, _ options) (*lab.Process, error) {
	return n.startAgent(api)
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
func startKubeProxy(mode string) func(*kubeAPI, *kubeNode, options) (*lab.Process, error) {
	return func(api *kubeAPI, n *kubeNode, o options) (*lab.Process, error) {
		binary, err := controlplane.Build(filepath.Dir(o.build), "kube-proxy")
		if err != nil {
			return nil, err
		}
		kubeconfig, err := api.kubeconfig(n)
		if err != nil {
			return nil, err
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
			return nil, err
		}
		proxy, err := n.lab.Node.Start("kube-proxy", binary, "--config", file)
		if err != nil {
			return nil, err
		}
		return proxy, sysctl(n.lab.Node, endedConnections)
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
func (n *kubeNode) knows(ctx context.Context, count int, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return lab.Wait(ctx, func() error {
		to := targets(count)
		x, err := n.connects(ctx, to, 4, within, "-once")
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
