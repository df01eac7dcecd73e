// Package inside tests on a real kernel what clients on a node get at a Service's addresses for the outside: node ports,
// load-balancer and external IPs are short-cut at connect time, by no policy and no source range, for pods and for the
// host alike.
package inside

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

const objects = `
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: z1}}
status: {addresses: [{type: InternalIP, address: 10.77.0.1}, {type: InternalIP, address: "fd77::1"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: LoadBalancer
  clusterIPs: [10.96.0.10, "fd96::10"]
  externalTrafficPolicy: Local
  loadBalancerSourceRanges: [198.18.0.0/15, "2001:db8:ffff::/48"]
  externalIPs: [198.51.100.1, "2001:db8:2::1"]
  ports: [{name: http, port: 80, nodePort: 30080}]
status:
  loadBalancer:
    ingress: [{ip: 203.0.113.1}, {ip: "2001:db8:1::1", ipMode: VIP}, {ip: 203.0.113.2, ipMode: Proxy}]
---
apiVersion: v1
kind: Service
metadata: {name: thief, namespace: aaa}
spec:
  clusterIPs: [10.96.0.11]
  externalIPs: [10.96.0.10]
  ports: [{name: http, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-4, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.77.0.21], nodeName: elsewhere, conditions: {ready: true}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-6, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints: [{addresses: ["fd77::21"], nodeName: elsewhere, conditions: {ready: true}}]
`

func TestClientsInsideReachEveryKindOfAddress(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	l, err := lab.New(lab.Config{Binaries: binaries(t)})
	must(t, err)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	client := addPod(t, l, "client", "10.77.0.20", "fd77::20")
	server := addPod(t, l, "server", "10.77.0.21", "fd77::21")
	_, err = server.StartNginx(ctx, 8080, `location / { return 200 "web\n"; }`)
	must(t, err)
	must(t, l.WriteText("manifests", "web.yaml", objects))
	_, err = l.StartAgent(ctx)
	must(t, err)

	get := func(from *lab.Place, addr string) (string, error) {
		return from.Run(ctx, "curl", "--silent", "--show-error", "--max-time", "5", "http://"+addr+"/")
	}
	for _, from := range []*lab.Place{&client.Place, l.Node} {
		for _, addr := range []string{
			"10.96.0.10:80", "[fd96::10]:80", "10.77.0.1:30080", "[fd77::1]:30080",
			"203.0.113.1:80", "[2001:db8:1::1]:80", "198.51.100.1:80", "[2001:db8:2::1]:80",
		} {
			deadline := time.Now().Add(20 * time.Second)
			for {
				answer, err := get(from, addr)
				if err == nil && answer == "web\n" {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("from %s to %s: %q %v", from.Name, addr, answer, err)
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
		if answer, err := get(from, "203.0.113.2:80"); err == nil {
			t.Errorf("from %s: ipMode Proxy was intercepted: %q", from.Name, answer)
		}
		if answer, err := get(from, "10.77.0.1:80"); err == nil {
			t.Errorf("from %s: a port that is no node port answered: %q", from.Name, answer)
		}
	}
	rows, err := l.CLI(ctx, "services", "-o", "json")
	must(t, err)
	if want := "10.96.0.10:80/TCP is not served: it is an address of Service default/web"; !strings.Contains(rows, want) {
		t.Errorf("the other Service does not say %q:\n%s", want, rows)
	}
}

func addPod(t *testing.T, l *lab.Lab, name string, ips ...string) *lab.Pod {
	t.Helper()
	spec := lab.PodSpec{Name: name}
	for _, ip := range ips {
		spec.Addrs = append(spec.Addrs, netip.MustParseAddr(ip))
	}
	p, err := l.AddPod(spec)
	must(t, err)
	return p
}

// binaries builds the agent and the command line.
func binaries(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir+"/", "./cmd/sockmesh-agent", "./cmd/sockmesh")
	build.Dir = filepath.Join("..", "..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatal(fmt.Errorf("build the binaries: %w\n%s", err, out))
	}
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
