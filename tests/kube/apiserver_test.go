package kube

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// loads are connections of every kind from the client to Services: through the proxy, past it, and datagrams. A failed
// exchange is a failed test, whatever happens to the API server.
type loads struct {
	n    *realNode
	list map[string]*lab.Load
}

// startLoads starts eight connections of each kind.
func (n *realNode) startLoads(web, plain, dns *corev1.Service) *loads {
	n.t.Helper()
	l := &loads{n, map[string]*lab.Load{}}
	for name, k := range map[string]struct {
		to  string
		cfg traffic.Config
	}{
		"HTTP, proxied":      {vips(web)[0], traffic.Config{Kind: traffic.HTTP, PerConnection: 20}},
		"a connection each":  {vips(web)[1], traffic.Config{Kind: traffic.HTTP, NewConnection: true}},
		"large bodies":       {vips(web)[0], traffic.Config{Kind: traffic.Large, Size: 64 << 10, PerConnection: 10}},
		"WebSocket, proxied": {vips(web)[1], traffic.Config{Kind: traffic.WebSocket, Size: 4 << 10, PerConnection: 10}},
		"TCP Service":        {vips(plain)[0], traffic.Config{Kind: traffic.TCP, Size: 16 << 10, PerConnection: 10}},
		"UDP Service":        {vips(dns)[1], traffic.Config{Kind: traffic.UDP, Size: 1200, PerConnection: 20}},
	} {
		cfg := k.cfg
		cfg.Addr, cfg.Host, cfg.Connections, cfg.Pause, cfg.Timeout = k.to, "web", 8, 30*time.Millisecond, 20*time.Second
		load, err := n.client.StartTraffic(cfg)
		n.must(err)
		l.list[name] = load
	}
	l.flow(20)
	return l
}

// flow waits for n more exchanges of each kind.
func (l *loads) flow(n uint64) {
	l.n.t.Helper()
	for name, load := range l.list {
		if err := load.WaitRequests(l.n.ctx, n); err != nil {
			l.n.t.Fatalf("%s: %v", name, err)
		}
	}
}

// judge ends them.
func (l *loads) judge() {
	l.n.t.Helper()
	for name, load := range l.list {
		r, err := load.Stop()
		if err != nil || r.Failed > 0 {
			l.n.t.Errorf("%s: %d of %d exchanges failed (%v): %+v", name, r.Failed, r.Requests, err, r.Failures)
		}
		l.n.t.Logf("%-20s %6d exchanges, %d failed", name, r.Requests, r.Failed)
	}
}

// deletes is how many entries the agent has deleted from the kernel's maps.
func (n *realNode) deletes() (count float64) {
	n.t.Helper()
	text, err := n.lab.Metrics(n.ctx, "/metrics")
	n.must(err)
	_, rest, _ := strings.Cut(text, "\nsockmesh_datapath_map_deletes_total ")
	if _, err := fmt.Sscanf(rest, "%g", &count); err != nil {
		n.t.Fatal("the metric of deletions:", err)
	}
	return count
}

// The API server goes under a mixed load, a cluster goes on without this node hearing of it, and etcd forgets what the
// node's watches would have to be told: nothing fails, nothing is deleted meanwhile, and when it is back the node sees all of
// it, deletions as well.
func TestAPIServerGoneUnderMixedLoad(t *testing.T) {
	n := newBareNode(t)
	var pods []*lab.Pod
	for i, name := range []string{"a", "b"} {
		p := n.addPod(name, 21+i)
		_, err := p.StartServer(n.ctx, 8080) // HTTP there, echo of TCP and UDP at the next port
		n.must(err)
		pods = append(pods, p)
	}
	said := n.server("said", 23, 8080)
	web, plain, dns := n.service("web"), n.service("plain"), n.service("dns", withUDP)
	n.endpoints("web", "web", tcp("", 8080), pods)
	n.endpoints("plain", "plain", tcp("", 8081), pods)
	n.endpoints("dns", "dns", udp("", 8081), pods)
	goes := vips(n.service("goes"))
	n.endpoints("goes", "goes", tcp("", 8080), []*lab.Pod{said})
	n.pod("client", nodeName, []string{n.client.Addr4().String(), n.client.Addr6().String()}, func(p *corev1.Pod) {
		p.Labels = map[string]string{"sockmesh.io/enroll": "true"}
	})
	var claimed, endpoints []netip.AddrPort
	for i, vip := range vips(web) {
		claimed = append(claimed, netip.MustParseAddrPort(vip))
		endpoints = append(endpoints, netip.AddrPortFrom(pods[i].Addr4(), 8080))
	}
	n.must(n.lab.WriteXDS("web", lab.Cluster("web"), lab.Routes("web", lab.Route{Clusters: []lab.Weight{{Cluster: "web", Weight: 1}}}),
		lab.Endpoints("web", endpoints...), lab.HTTPListener("web", "web", claimed...)))
	_, err := n.lab.StartControl(n.ctx)
	n.must(err)
	n.start("--xds", "127.0.0.1:18000")
	n.must(n.lab.WaitStatus(n.ctx, "the client is enrolled and the listener in force", func(s lab.Status) bool {
		return s.Pods.Enrolled == 1 && s.XDS.Resources["listener"] == 1 && s.Kubernetes.Synced
	}))
	n.answers("before", n.client.Run, goes, "said")
	load := n.startLoads(web, plain, dns)
	status, err := n.lab.Status(n.ctx)
	n.must(err)
	if status.Connections.Proxied == 0 {
		t.Fatal("nothing goes through the proxy: this tests nothing")
	}

	for round := range 2 {
		name := fmt.Sprintf("late%d", round)
		deleted := n.deletes()
		cluster.main.Kill()
		time.Sleep(2 * time.Second) // long enough for the agent to try again
		load.flow(20)
		other, err := cluster.NewServer()
		n.must(err)
		n.admin = other.Client("admin-token")
		late := vips(n.service(name))
		n.endpoints(name, name, tcp("", 8080), []*lab.Pod{said})
		n.must(n.admin.CoreV1().Services(n.namespace).Delete(n.ctx, "goes", metav1.DeleteOptions{}))
		n.noEndpoints("goes")
		if round == 1 {
			n.must(cluster.Compact(n.ctx))
		}
		load.flow(20)
		n.answers("what this node was told last stays in force", n.client.Run, goes, "said")
		if now := n.deletes(); now != deleted {
			t.Errorf("%g entries were deleted while the API server was away", now-deleted)
		}
		other.Kill()
		n.must(cluster.main.Start())
		n.admin = cluster.main.Client("admin-token")
		n.answers("a Service that came meanwhile", n.client.Run, late, "said")
		n.answers("a Service that went meanwhile", n.client.Run, goes, nowhere)
		load.flow(20)
		goes = vips(n.service("goes"))
		n.endpoints("goes", "goes", tcp("", 8080), []*lab.Pod{said})
		n.answers("a change afterwards", n.client.Run, goes, "said")
	}
	load.judge()
}
