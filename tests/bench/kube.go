package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/controlplane"
)

// Nodes that learn Services from a real API server. A node is a lab of its own: node namespace, a client pod and a server
// pod in two subnets, so that what they send each other is routed by the node, as between pods of most networks.

var (
	clientSubnet, serverSubnet = netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("10.78.0.0/24")
	clientAddr, serverAddr     = netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("10.78.0.3")
)

// kubeNode is one node.
type kubeNode struct {
	lab            *lab.Lab
	client, server *lab.Pod
	self           string // this program
}

func newKubeNode(ctx context.Context, o options) (n *kubeNode, err error) {
	n = &kubeNode{}
	if n.self, err = os.Executable(); err != nil {
		return n, err
	}
	if n.lab, err = lab.New(lab.Config{Binaries: filepath.Join(o.build, "bin"), Subnets: []netip.Prefix{clientSubnet, serverSubnet}}); err != nil {
		return n, err
	}
	// Both subnets are on one bridge: the node is not to say so to the pods. And a bridge hands nothing to the packet filter.
	if err := sysctl(n.lab.Node, map[string]string{
		"net/ipv4/conf/all/send_redirects": "0", "net/ipv4/conf/default/send_redirects": "0", "net/ipv4/conf/br0/send_redirects": "0",
		"net/bridge/bridge-nf-call-iptables": "0", "net/bridge/bridge-nf-call-ip6tables": "0",
		"net/ipv4/icmp_ratelimit": "0", // an address that is nobody's yet is to be told at once
	}); err != nil {
		return n, err
	}
	if n.client, err = n.lab.AddPod(lab.PodSpec{Name: "client", Addrs: []netip.Addr{clientAddr}}); err != nil {
		return n, err
	}
	if n.server, err = n.lab.AddPod(lab.PodSpec{Name: "server", Addrs: []netip.Addr{serverAddr}}); err != nil {
		return n, err
	}
	if err := sysctl(&n.client.Place, map[string]string{
		"net/ipv4/ip_local_port_range": "1024 65535",
		// A packet filter leads connections from one port to many Services to one server, whose side of the port's last
		// connection still waits. With an offset of its own for each address the client's clock would seem to go back there,
		// and the server would let the SYN wait for its repetition after a second: a matter of this bench, where all
		// Services have one server.
		"net/ipv4/tcp_timestamps": "2",
	}); err != nil {
		return n, err
	}
	server, err := n.server.Start("connect-server", n.self, "connect-server", netip.AddrPortFrom(serverAddr, tcpPort).String())
	if err != nil {
		return n, err
	}
	return n, n.server.WaitListening(ctx, server, tcpPort)
}

func (n *kubeNode) close() error {
	if n == nil || n.lab == nil {
		return nil
	}
	return n.lab.Close()
}

// sysctl sets kernel parameters of a network namespace. What a kernel does not have needs no setting.
func sysctl(p *lab.Place, values map[string]string) error {
	return p.Do(func() error {
		for name, value := range values {
			if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("set %s: %w", name, err)
			}
		}
		return nil
	})
}

// connects runs the client against addresses for a while.
func (n *kubeNode) connects(ctx context.Context, targets []netip.AddrPort, connections int, d time.Duration, flags ...string) (sample, error) {
	args, err := n.connectArgs(targets, connections, d)
	if err != nil {
		return sample{}, err
	}
	args = append(args, flags...)
	w := &world{client: n.client}
	return w.run(ctx, args)
}

func (n *kubeNode) connectArgs(targets []netip.AddrPort, connections int, d time.Duration) ([]string, error) {
	var text strings.Builder
	for _, t := range targets {
		fmt.Fprintln(&text, t)
	}
	file := filepath.Join(n.lab.Dir, "tmp", "targets")
	err := os.WriteFile(file, []byte(text.String()), 0o644)
	return []string{n.self, "connect-client", "-c", fmt.Sprint(connections), "-d", d.String(), "-targets", file}, err
}

// kubeAPI is a control plane that runs in a node's namespace.
type kubeAPI struct {
	*controlplane.ControlPlane
	server *controlplane.Server
	on     *kubeNode
}

func newKubeAPI(o options, on *kubeNode) (*kubeAPI, error) {
	binary, err := controlplane.Build(filepath.Dir(o.build), "kube-apiserver")
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(on.lab.Dir, "kubernetes")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	a := &kubeAPI{on: on}
	a.ControlPlane, err = controlplane.Start(controlplane.Config{
		Dir: dir, Binary: binary, Within: on.lab.Node.Do, Load: true,
		Start: func(name string, args ...string) (controlplane.Process, error) {
			return on.lab.Node.Start(name, args...)
		},
	})
	if err == nil {
		a.server, err = a.NewServer()
	}
	return a, err
}

// kubeconfig is a file for a process in the node's namespace. On nodes other than the API server's own a forwarder, which
// ends with the program, brings them there.
func (a *kubeAPI) kubeconfig(n *kubeNode) (string, error) {
	if n == a.on {
		return a.server.Kubeconfig(a.server.URL(), controlplane.AdminToken)
	}
	var l net.Listener
	err := n.lab.Node.Do(func() (err error) {
		l, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
		return err
	})
	if err != nil {
		return "", err
	}
	to := fmt.Sprintf("127.0.0.1:%d", a.server.Port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go forward(c, func() (net.Conn, error) { return a.on.lab.Node.Dial(context.Background(), "tcp", to) })
		}
	}()
	return a.server.Kubeconfig(fmt.Sprintf("https://%s", l.Addr()), controlplane.AdminToken)
}

func forward(c net.Conn, dial func() (net.Conn, error)) {
	defer c.Close()
	up, err := dial()
	if err != nil {
		return
	}
	defer up.Close()
	done := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{c, up}, {up, c}} {
		go func() {
			_, _ = io.Copy(way[0], way[1])
			done <- struct{}{}
		}()
	}
	<-done
}

// serviceIP is the i-th cluster IP.
func serviceIP(i int) netip.Addr {
	i += 256
	return netip.AddrFrom4([4]byte{10, 96 + byte(i>>16), byte(i >> 8), byte(i)})
}

const servicePort = 80

func serviceAddr(i int) netip.AddrPort { return netip.AddrPortFrom(serviceIP(i), servicePort) }

func serviceName(i int) string { return fmt.Sprintf("service-%05d", i) }

// serviceObject is the i-th Service, as an API server stores it.
func serviceObject(i int) *corev1.Service {
	ip := serviceIP(i).String()
	single, cluster := corev1.IPFamilyPolicySingleStack, corev1.ServiceInternalTrafficPolicyCluster
	return &corev1.Service{
		ObjectMeta: objectMeta(serviceName(i), nil),
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, SessionAffinity: corev1.ServiceAffinityNone,
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, IPFamilyPolicy: &single, InternalTrafficPolicy: &cluster,
			Selector: map[string]string{"app": serviceName(i)},
			Ports:    []corev1.ServicePort{{Name: "main", Protocol: corev1.ProtocolTCP, Port: servicePort}},
		},
	}
}

func objectMeta(name string, labels map[string]string) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: metav1.NamespaceDefault, Name: name, UID: types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012x", hash(name))),
		CreationTimestamp: metav1.NewTime(time.Now().Truncate(time.Second)), Labels: labels, Generation: 1,
	}
}

// hash is FNV-1a, cut to what a UID's last part holds.
func hash(s string) uint64 {
	h := uint64(14695981039346656037)
	for _, b := range []byte(s) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h & (1<<48 - 1)
}

// sliceObject is one of the i-th Service's EndpointSlices, with what the controller writes of each pod.
func sliceObject(i, n int, port uint16, addrs ...netip.Addr) *discoveryv1.EndpointSlice {
	name, protocol, number := "main", corev1.ProtocolTCP, int32(port)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: objectMeta(fmt.Sprintf("%s-%d", serviceName(i), n), map[string]string{
			discoveryv1.LabelServiceName: serviceName(i), discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
		}),
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Protocol: &protocol, Port: &number}},
	}
	for _, a := range addrs {
		s.Endpoints = append(s.Endpoints, endpointObject(i, a))
	}
	return s
}

func endpointObject(i int, a netip.Addr) discoveryv1.Endpoint {
	yes, no := true, false
	pod := fmt.Sprintf("%s-%s", serviceName(i), strings.ReplaceAll(a.String(), ".", "-"))
	node, zone := fmt.Sprintf("node-%d", hash(pod)%5000), fmt.Sprintf("zone-%c", 'a'+hash(pod)%3)
	return discoveryv1.Endpoint{
		Addresses:  []string{a.String()},
		Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no},
		NodeName:   &node, Zone: &zone,
		TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: metav1.NamespaceDefault, Name: pod, UID: types.UID(fmt.Sprintf("00000000-0000-4000-9000-%012x", hash(pod)))},
	}
}

// store adds objects behind the API server's back, which is away meanwhile: its watchers list everything again.
func (a *kubeAPI) store(ctx context.Context, objects []runtime.Object) error {
	a.server.Kill()
	if err := a.Store(ctx, objects...); err != nil {
		return err
	}
	// Its check of all cluster IPs has a minute, which it needs where there are many and the machine is busy; then it ends.
	err := a.server.Start()
	for again := 0; err != nil && again < serverAttempts && ctx.Err() == nil; again++ {
		stage("once more: %v", err)
		a.server.Kill()
		err = a.server.Start()
	}
	return err
}

// serverAttempts is how often an API server that did not get ready is started again.
const serverAttempts = 3
