package node

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// A client that is none of the node's processes uses a node port: the real agent, from a manifest to an answer, killed and
// started again under a connection that is held. pkg/datapath has the variety.
func TestNodePortFromOutside(t *testing.T) {
	w := newWorld(t, anywhere)
	addrs := []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")}
	node := &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "worker-7"}}
	for _, a := range addrs {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	w.must(w.WriteManifest("node", node))
	dual := corev1.IPFamilyPolicyRequireDualStack
	service := &corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "outside"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, ClusterIP: "10.96.0.77", ClusterIPs: []string{"10.96.0.77", "fd96::77"},
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}, IPFamilyPolicy: &dual,
			Ports: []corev1.ServicePort{{Name: "main", Protocol: corev1.ProtocolTCP, Port: 80, NodePort: 30080}},
		},
	}
	w.must(w.WriteManifest("outside", append([]any{service}, w.Slices(lab.ServiceSpec{
		Namespace: "shop", Name: "outside", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.77"), netip.MustParseAddr("fd96::77")},
		Port: 80, TargetPort: 8080, Backends: []*lab.Pod{w.v1},
	})...)...))
	var held []*held
	for _, a := range addrs {
		to := netip.AddrPortFrom(a, 30080)
		w.eventually("an answer at "+to.String(), func() error { _, err := w.once(to); return err })
		held = append(held, w.hold(to))
	}
	// The test's own process is outside the node's cgroup, so nothing was translated at connect, and the pod sees the node.
	for i, a := range addrs {
		if got, err := w.once(netip.AddrPortFrom(a, 30080)); err != nil || got != "v1/direct "+a.String() {
			t.Errorf("%s: %q, %v", a, got, err)
		}
		held[i].ask(t)
	}
	w.agent.Kill()
	for i, a := range addrs {
		if got, err := w.once(netip.AddrPortFrom(a, 30080)); err != nil || got != "v1/direct "+a.String() {
			t.Errorf("without an agent, %s: %q, %v", a, got, err)
		}
		held[i].ask(t)
	}
	w.startAgent()
	for i, a := range addrs {
		if got, err := w.once(netip.AddrPortFrom(a, 30080)); err != nil || got != "v1/direct "+a.String() {
			t.Errorf("after the restart, %s: %q, %v", a, got, err)
		}
		held[i].ask(t)
	}
}

// held is a keep-alive connection.
type held struct {
	net.Conn
	r *bufio.Reader
}

func (w *world) dialOutside(to netip.AddrPort) (c net.Conn, err error) {
	err = w.client.Do(func() error {
		c, err = net.DialTimeout("tcp", to.String(), 5*time.Second)
		return err
	})
	if err == nil {
		err = c.SetDeadline(time.Now().Add(time.Minute))
	}
	return c, err
}

func (w *world) hold(to netip.AddrPort) *held {
	w.t.Helper()
	c, err := w.dialOutside(to)
	w.must(err)
	w.t.Cleanup(func() { c.Close() })
	return &held{c, bufio.NewReader(c)}
}

func (h *held) get() (string, error) {
	if _, err := io.WriteString(h, "GET / HTTP/1.1\r\nHost: shop\r\n\r\n"); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(h.r, nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s", resp.Status)
	}
	return strings.TrimSpace(string(b)), err
}

func (h *held) ask(t *testing.T) {
	t.Helper()
	if got, err := h.get(); err != nil || !strings.HasPrefix(got, "v1/direct ") {
		t.Errorf("the held connection: %q, %v", got, err)
	}
}

// once makes a connection of its own.
func (w *world) once(to netip.AddrPort) (string, error) {
	c, err := w.dialOutside(to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return (&held{c, bufio.NewReader(c)}).get()
}
