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

// Services are dual-stack here, as a.service makes them, and every question is asked at the addresses of both families: one test
// is both families' test.

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

// Addresses of both families: the node's own, in the pods' subnets, and everybody's loopback.
var nodeIPs, loopbacks = []string{"10.77.0.1", "fd77::1"}, []string{"127.0.0.1", "::1"}

// families are the kinds of slices.
var families = []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6}

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
	exe, err := os.Executable()
	n.must(err)
	n.lab, err = lab.New(lab.Config{NodeName: nodeName, Binaries: binaries, Helper: []string{exe, helper}})
	n.must(err)
	t.Cleanup(func() {
		if t.Failed() && n.proc != nil {
			t.Logf("the agent's last words:\n%s", n.proc.Tail())
		}
		if err := n.lab.Close(); err != nil {
			t.Error(err)
		}
	})
	n.thisNode("z1", nodeIPs...)
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
	n.must(n.startUnready(flags...))
	n.must(n.lab.WaitReady(n.ctx, n.proc))
}

// startUnready starts the agent and returns at once.
func (n *realNode) startUnready(flags ...string) (err error) {
	n.proc, err = n.lab.StartAgentNoWait(append([]string{"--manifests", "", "--xds", "", "--kubeconfig", n.config, "--drain-time", "1s"}, flags...)...)
	return err
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
	silence = "silence" // neither an answer nor a refusal
)

// from runs a command as a client would: a process of a pod (n.client.Run), of the host (n.lab.Node.Run), or n.outside.
type from func(ctx context.Context, command ...string) (string, error)

// outside is a client that is no process of the node: in the client pod's network namespace but not in its cgroup, so that
// what it sends is seen at the node's devices first.
func (n *realNode) outside(ctx context.Context, command ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + n.client.NetnsPath}, command...)...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, said.String())
	}
	return string(out), err
}

// get asks by HTTP.
func get(ctx context.Context, who from, addr string) string {
	out, err := who(ctx, "curl", "-sv", "--noproxy", "*", "--max-time", "10", "http://"+addr+"/") // -v has the errno's text
	switch {
	case err == nil:
		return out
	case strings.Contains(err.Error(), "Connection refused"):
		return refused
	case strings.Contains(err.Error(), "No route to host"), strings.Contains(err.Error(), "unreachable"):
		return nowhere
	case strings.Contains(err.Error(), "timed out"):
		return silence
	}
	return err.Error()
}

// ask sends one datagram on a connected socket and says who answered.
func ask(ctx context.Context, who from, addr string) string {
	ip, port, _ := net.SplitHostPort(addr)
	out, err := who(ctx, "bash", "-c", fmt.Sprintf("exec 3<>/dev/udp/%s/%s && echo who >&3 && timeout 3 head -n1 <&3", ip, port))
	switch {
	case err == nil:
		return strings.TrimSpace(out)
	case strings.Contains(err.Error(), "refused"):
		return refused
	case strings.Contains(err.Error(), "No route to host"), strings.Contains(err.Error(), "unreachable"):
		return nowhere
	case strings.Contains(err.Error(), "exit status 124"): // of timeout
		return silence
	}
	return err.Error()
}

// answers waits until exactly these answer by HTTP at each of the addresses, and nobody else: "a b" for two endpoints that
// both do.
func (n *realNode) answers(what string, who from, addrs []string, want string) {
	n.t.Helper()
	n.reaches(what, get, who, addrs, want)
}

// answersUDP does the same by datagrams.
func (n *realNode) answersUDP(what string, who from, addrs []string, want string) {
	n.t.Helper()
	n.reaches(what, ask, who, addrs, want)
}

func (n *realNode) reaches(what string, ask func(context.Context, from, string) string, who from, addrs []string, want string) {
	n.t.Helper()
	wanted := map[string]bool{}
	for _, name := range strings.Fields(want) {
		wanted[name] = true
	}
	for _, addr := range addrs {
		var last map[string]int
		err := lab.Wait(n.ctx, func() error {
			last = map[string]int{}
			for i := range 12 * len(wanted) { // an endpoint of two is missed by chance once in 2^23
				got := ask(n.ctx, who, addr)
				last[got]++
				if !wanted[got] {
					break
				}
				if len(last) == len(wanted) && (i >= 3*len(wanted)-1 || got == silence) { // that took its time
					return nil
				}
			}
			return errors.New("not yet")
		})
		if err != nil {
			n.t.Fatalf("%s: at %s answer %v, want %q; %s", what, addr, last, want, n.describe())
		}
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

// tcp and udp are ports of a slice.
func tcp(name string, port int32) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Port: &port, Protocol: new(corev1.ProtocolTCP)}
}

func udp(name string, port int32) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Port: &port, Protocol: new(corev1.ProtocolUDP)}
}

// endpoints makes or changes the slices of pods at a port, one of each family, which have the name and the family's; change
// is applied to each endpoint.
func (n *realNode) endpoints(service, name string, port discoveryv1.EndpointPort, pods []*lab.Pod, change ...func(int, *discoveryv1.Endpoint)) {
	n.t.Helper()
	for _, family := range families {
		s := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: sliceName(name, family), Labels: map[string]string{discoveryv1.LabelServiceName: service}},
			AddressType: family, Ports: []discoveryv1.EndpointPort{port},
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
		n.writeSlice(s)
	}
}

func sliceName(name string, family discoveryv1.AddressType) string {
	return name + "-" + strings.ToLower(string(family))
}

func (n *realNode) writeSlice(s *discoveryv1.EndpointSlice) {
	n.t.Helper()
	slices := n.admin.DiscoveryV1().EndpointSlices(n.namespace)
	if old, err := slices.Get(n.ctx, s.Name, metav1.GetOptions{}); err == nil {
		s.ResourceVersion = old.ResourceVersion
		_, err = slices.Update(n.ctx, s, metav1.UpdateOptions{})
		n.must(err)
		return
	}
	_, err := slices.Create(n.ctx, s, metav1.CreateOptions{})
	n.must(err)
}

// noEndpoints deletes the slices that endpoints made.
func (n *realNode) noEndpoints(name string) {
	n.t.Helper()
	for _, family := range families {
		n.must(n.admin.DiscoveryV1().EndpointSlices(n.namespace).Delete(n.ctx, sliceName(name, family), metav1.DeleteOptions{}))
	}
}

// setIngress gives a Service the addresses of a load balancer.
func (n *realNode) setIngress(name string, mode corev1.LoadBalancerIPMode, ips ...string) {
	n.t.Helper()
	s, err := n.admin.CoreV1().Services(n.namespace).Get(n.ctx, name, metav1.GetOptions{})
	n.must(err)
	s.Status.LoadBalancer.Ingress = nil
	for _, ip := range ips {
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip, IPMode: &mode})
	}
	_, err = n.admin.CoreV1().Services(n.namespace).UpdateStatus(n.ctx, s, metav1.UpdateOptions{})
	n.must(err)
}

// at puts a port behind each address; vips are a Service's cluster IPs with it, nodePorts the node's addresses with the
// Service's node port.
func at(ips []string, port int32) (all []string) {
	for _, ip := range ips {
		all = append(all, net.JoinHostPort(ip, fmt.Sprint(port)))
	}
	return all
}

func vips(s *corev1.Service) []string { return at(s.Spec.ClusterIPs, s.Spec.Ports[0].Port) }

func nodePorts(s *corev1.Service) []string { return at(nodeIPs, s.Spec.Ports[0].NodePort) }
