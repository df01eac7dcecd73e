package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/controlplane"
)

// binaries is where buildBinaries put the real agent and CLI.
var binaries string

// buildBinaries builds what a node runs.
func buildBinaries(dir string) error {
	binaries = filepath.Join(dir, "bin")
	build := exec.Command("go", "build", "-o", binaries+"/", "./cmd/...")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the binaries: %w\n%s", err, out)
	}
	return nil
}

// realNode is a node in a network namespace, with the real agent, which follows the real API server with exactly the rights
// that deploy/ gives it, and pods with real applications. What objects mean is seen by who answers at their addresses.
type realNode struct {
	*agent // for objects: its namespace, service, slice
	lab    *lab.Lab
	ctx    context.Context
	client *lab.Pod
	proc   *lab.Process
	config string // kubeconfig that works on the node
}

// The pods' subnets and the node's own addresses in them.
const nodeIP, nodeIP6 = "10.77.0.1", "fd77::1"

// newNode makes a node with a client pod; agent flags are added to the usual ones.
func newNode(t *testing.T, flags ...string) *realNode {
	t.Helper()
	n := newBareNode(t)
	n.start(flags...)
	return n
}

// newBareNode has no agent yet.
func newBareNode(t *testing.T) *realNode {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	t.Cleanup(cancel)
	n := &realNode{agent: &agent{t: t, admin: cluster.main.Client(controlplane.AdminToken)}, ctx: ctx}
	created, err := n.admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "node-"}}, metav1.CreateOptions{})
	n.must(err)
	n.namespace = created.Name
	t.Cleanup(n.forgetServices)
	n.lab, err = lab.New(lab.Config{NodeName: nodeName, Binaries: binaries})
	n.must(err)
	t.Cleanup(func() {
		if t.Failed() && n.proc != nil {
			t.Logf("the agent's last words:\n%s", n.proc.Tail())
		}
		if err := n.lab.Close(); err != nil {
			t.Error(err)
		}
	})
	n.thisNode(nodeIP, "z1")
	n.config = n.kubeconfig()
	n.client = n.addPod("client", 20)
	return n
}

// forgetServices removes what other tests' nodes would serve as well.
func (n *realNode) forgetServices() {
	ctx := context.Background()
	services, err := n.admin.CoreV1().Services(n.namespace).List(ctx, metav1.ListOptions{})
	n.must(err)
	for _, s := range services.Items {
		n.must(n.admin.CoreV1().Services(n.namespace).Delete(ctx, s.Name, metav1.DeleteOptions{}))
	}
	n.must(n.admin.DiscoveryV1().EndpointSlices(n.namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
}

// kubeconfig brings the node, which has no way out, to the API server through a socket of this process.
func (n *realNode) kubeconfig() string {
	n.t.Helper()
	var l net.Listener
	n.must(n.lab.Node.Do(func() (err error) {
		l, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	}))
	n.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				up, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", cluster.main.Port))
				if err != nil {
					return
				}
				defer up.Close()
				done := make(chan struct{}, 2)
				for _, way := range [][2]net.Conn{{c, up}, {up, c}} {
					go func() { _, _ = io.Copy(way[0], way[1]); done <- struct{}{} }()
				}
				<-done
			}()
		}
	}()
	file, err := cluster.main.Kubeconfig("https://"+l.Addr().String(), "agent-token")
	n.must(err)
	return file
}

// start starts the agent and waits until it is ready.
func (n *realNode) start(flags ...string) {
	n.t.Helper()
	var err error
	n.proc, err = n.lab.StartAgent(n.ctx, append([]string{"--manifests", "", "--xds", "", "--kubeconfig", n.config, "--drain-time", "1s"}, flags...)...)
	n.must(err)
}

// addPod makes a pod with an address of each family that ends in i.
func (n *realNode) addPod(name string, i int) *lab.Pod {
	n.t.Helper()
	p, err := n.lab.AddPod(lab.PodSpec{Namespace: n.namespace, Name: name, Addrs: []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("10.77.0.%d", i)), netip.MustParseAddr(fmt.Sprintf("fd77::%x", i)),
	}})
	n.must(err)
	return p
}

// server is a pod whose nginx says its name.
func (n *realNode) server(name string, i int, port uint16) *lab.Pod {
	n.t.Helper()
	p := n.addPod(name, i)
	_, err := p.StartNginx(n.ctx, port, fmt.Sprintf("location / { return 200 %q; }", name))
	n.must(err)
	return p
}

// What a client may meet beside a name.
const (
	refused = "refused" // at once
	nowhere = "nowhere" // nobody has the address
)

// get asks as a process of a place would.
func get(ctx context.Context, p *lab.Place, addr string) string {
	out, err := p.Run(ctx, "curl", "-sv", "--noproxy", "*", "--max-time", "10", "http://"+addr+"/") // -v has the errno's text
	switch {
	case err == nil:
		return out
	case strings.Contains(err.Error(), "Connection refused"):
		return refused
	case strings.Contains(err.Error(), "No route to host"), strings.Contains(err.Error(), "unreachable"):
		return nowhere
	}
	return err.Error()
}

// answers waits until exactly these answer at an address, and nobody else: "a b" for two endpoints that both do.
func (n *realNode) answers(what string, p *lab.Place, addr string, want string) {
	n.t.Helper()
	wanted := map[string]bool{}
	for _, name := range strings.Fields(want) {
		wanted[name] = true
	}
	var last map[string]int
	err := lab.Wait(n.ctx, func() error {
		last = map[string]int{}
		for i := range 12 * len(wanted) { // an endpoint of two is missed by chance once in 2^23
			got := get(n.ctx, p, addr)
			last[got]++
			if !wanted[got] {
				break
			}
			if len(last) == len(wanted) && i >= 3*len(wanted)-1 {
				return nil
			}
		}
		return errors.New("not yet")
	})
	if err != nil {
		n.t.Fatalf("%s: at %s answer %v, want %q; %s", what, addr, last, want, n.describe())
	}
}

// describe is what the agent says of the test's Services.
func (n *realNode) describe() string {
	out, err := n.lab.CLI(context.Background(), "services")
	return fmt.Sprint(out, err)
}

// services asks the agent for one Service, as a user would.
func (n *realNode) status(name string) (s api.Service) {
	n.t.Helper()
	out, err := n.lab.CLI(n.ctx, "services", n.namespace+"/"+name, "-o", "json")
	if err != nil {
		return s // not known (yet, any more)
	}
	var list []api.Service
	n.must(json.Unmarshal([]byte(out), &list))
	return list[0]
}

// says waits until the agent says something of a Service.
func (n *realNode) says(what, name string, ok func(api.Service) bool) {
	n.t.Helper()
	err := lab.Wait(n.ctx, func() error {
		if s := n.status(name); !ok(s) {
			text, _ := json.Marshal(s)
			return fmt.Errorf("it says %s", text)
		}
		return nil
	})
	if err != nil {
		n.t.Fatalf("%s: %v", what, err)
	}
}

func (n *realNode) patch(name, patch string) *corev1.Service {
	n.t.Helper()
	s, err := n.admin.CoreV1().Services(n.namespace).Patch(n.ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	n.must(err)
	return s
}

// endpoints makes a slice of pods at a port; change is applied to each endpoint.
func (n *realNode) endpoints(service, name string, family discoveryv1.AddressType, port int32, portName string, pods []*lab.Pod, change ...func(int, *discoveryv1.Endpoint)) {
	n.t.Helper()
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: family, Ports: []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
	}
	for i, p := range pods {
		addr := p.Addr4()
		if family == discoveryv1.AddressTypeIPv6 {
			addr = p.Addr6()
		}
		e := discoveryv1.Endpoint{
			Addresses: []string{addr.String()}, NodeName: new(string(nodeName)),
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: n.namespace, Name: p.PodSpec.Name},
		}
		for _, c := range change {
			c(i, &e)
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	slices := n.admin.DiscoveryV1().EndpointSlices(n.namespace)
	if old, err := slices.Get(n.ctx, name, metav1.GetOptions{}); err == nil {
		s.ResourceVersion = old.ResourceVersion
		_, err = slices.Update(n.ctx, s, metav1.UpdateOptions{})
		n.must(err)
		return
	}
	_, err := slices.Create(n.ctx, s, metav1.CreateOptions{})
	n.must(err)
}

func address(ip string, port int32) string { return net.JoinHostPort(ip, fmt.Sprint(port)) }
