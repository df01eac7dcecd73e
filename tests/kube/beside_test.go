package kube

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/controlplane"
)

// connections is how many the agent's programs have sent to Services.
func (n *realNode) connections() uint64 {
	n.t.Helper()
	out, err := n.lab.CLI(n.ctx, "status", "-o", "json")
	n.must(err)
	var s api.Status
	n.must(json.Unmarshal([]byte(out), &s))
	return s.Connections.Service
}

// TestMigrationFromARealKubeProxyAndBack does what docs/replacing-kube-proxy.md says: kube-proxy alone, both, sockmesh alone,
// both, kube-proxy alone, with a Service that answers all the time.
func TestMigrationFromARealKubeProxyAndBack(t *testing.T) {
	n := newBareNode(t)
	a := n.server("a", 21, 8080)
	s := n.service("web", withNodePort)
	n.endpoints("web", "web", tcp("", 8080), []*lab.Pod{a})
	answers := func(what string) {
		t.Helper()
		// From the host: kube-proxy's rules for pods would need the node between client and endpoint, which share a bridge here.
		n.answers(what, n.lab.Node.Run, vips(s), "a")
		n.answers(what+": node port", n.lab.Node.Run, nodePorts(s), "a")
	}

	// A real node has a default route, without which the kernel refuses a cluster IP before kube-proxy's rules see it.
	for _, cidr := range strings.Split(controlplane.ServiceCIDRs, ",") {
		_, err := n.lab.Node.Run(n.ctx, "ip", "route", "add", cidr, "dev", "br0")
		n.must(err)
	}
	proxy := n.startKubeProxy()
	answers("kube-proxy alone")

	n.start("--kube-proxy-healthz", "127.0.0.1:10256")
	before := n.connections()
	answers("both")
	if now := n.connections(); now < before+12 {
		t.Errorf("beside kube-proxy only %d of 12 connections went by sockmesh", now-before)
	}

	proxy.Kill()
	for _, family := range []string{"ip", "ip6"} { // what kube-proxy --cleanup does
		out, err := n.lab.Node.Run(n.ctx, "nft", "delete", "table", family, "kube-proxy")
		if err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	}
	answers("sockmesh alone")
	n.must(lab.Wait(n.ctx, func() error {
		_, err := n.lab.Node.Run(n.ctx, "curl", "-sf", "--noproxy", "*", "http://127.0.0.1:10256/healthz")
		return err
	}))

	n.startKubeProxy()
	n.must(lab.Wait(n.ctx, func() error {
		for _, family := range []string{"ip", "ip6"} {
			rules, err := n.lab.Node.Run(n.ctx, "nft", "list", "table", family, "kube-proxy")
			if err == nil && !strings.Contains(rules, n.namespace) {
				err = fmt.Errorf("kube-proxy has not written its rules yet")
			}
			if err != nil {
				return err
			}
		}
		return nil
	}))
	n.proc.Kill()
	answers("the agent dead: its programs go on")
	cleanup := n.lab.AgentCommand()
	if out, err := n.lab.Node.Run(n.ctx, append([]string{cleanup[0], "cleanup"}, cleanup[1:]...)...); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	if _, err := os.Stat(n.lab.BPFFS()); !os.IsNotExist(err) {
		t.Errorf("pins are left: %v", err)
	}
	answers("kube-proxy alone again")
	n.nothingIsLeft()
}

// nothingIsLeft looks where the kernel would show programs of ours: at the lab's cgroups and on the node's devices.
func (n *realNode) nothingIsLeft() {
	n.t.Helper()
	links, err := n.lab.Node.Run(n.ctx, "ip", "-details", "link", "show")
	n.must(err)
	filters, err := n.lab.Node.Run(n.ctx, "sh", "-c", "for d in $(ip -o link show | awk -F'[ :@]+' '{print $2}'); do tc filter show dev $d ingress; tc filter show dev $d egress; done 2>/dev/null; true")
	n.must(err)
	if all := links + filters; strings.Contains(all, "sm_") {
		n.t.Errorf("programs are left on devices:\n%s", all)
	}
}

// startKubeProxy starts upstream's kube-proxy with its rules in nftables, and leaves the machine's own settings alone.
func (n *realNode) startKubeProxy() *lab.Process {
	n.t.Helper()
	binary, err := controlplane.Build("../..", "kube-proxy")
	n.must(err)
	file := filepath.Join(n.lab.Dir, "tmp", "kube-proxy.yaml")
	n.must(os.WriteFile(file, []byte(fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: %q}
hostnameOverride: %s
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
clusterCIDR: "10.77.0.0/24,fd77::/64"
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, n.adminConfig(), nodeName)), 0o644))
	proc, err := n.lab.Node.Start("kube-proxy", binary, "--config", file)
	n.must(err)
	return proc
}

// adminConfig is the node's kubeconfig with the rights of everybody: kube-proxy has its own in a real cluster.
func (n *realNode) adminConfig() string {
	n.t.Helper()
	text, err := os.ReadFile(n.config)
	n.must(err)
	file := n.config + "-admin"
	n.must(os.WriteFile(file, []byte(strings.Replace(string(text), "agent-token", controlplane.AdminToken, 1)), 0o600))
	return file
}
