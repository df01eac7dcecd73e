package node

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
)

// An agent that is killed with -9 in the middle of a thousand changes, and started again, ends with the maps that one has
// which never saw anything but the last state.
func TestKilledAmidAThousandChangesTheMapsEndAsIfComputedAfresh(t *testing.T) {
	const rounds, changes, services = 3, 1000, 80
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	l := labtest.New(t, lab.Config{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	pick := rand.New(rand.NewPCG(seed, seed))
	must(l.WriteManifest("node", &corev1.Node{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "node-1", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.77.0.1"}}},
	}))
	there := map[int]bool{}
	change := func() error {
		i := pick.IntN(services)
		name := fmt.Sprintf("service-%d", i)
		if there[i] && pick.IntN(5) == 0 {
			delete(there, i)
			return l.RemoveManifest(name)
		}
		there[i] = true
		return l.WriteManifest(name, anyService(pick, i)...)
	}
	for range services * 2 {
		must(change())
	}
	agent, err := l.StartAgent(ctx, "--xds", "")
	must(err)
	for round := range rounds {
		kill := pick.IntN(changes)
		for n := range changes {
			must(change())
			if n == kill {
				agent.Kill()
				agent, err = l.StartAgentNoWait("--xds", "")
				must(err)
			}
			time.Sleep(time.Duration(pick.IntN(4)) * time.Millisecond)
		}
		must(l.WaitReady(ctx, agent))
		fresh := startFresh(t, ctx, l)
		var differs string
		err := lab.Wait(within(t, 90*time.Second), func() error {
			var has, want []string
			if has, err = contents(l.BPFFS()); err == nil {
				want, err = contents(fresh.bpffs)
			}
			if err == nil && !slices.Equal(has, want) {
				differs = difference(has, want)
				err = fmt.Errorf("the maps differ from those of an agent that starts from nothing (-) by what they have (+)")
			}
			return err
		})
		if err != nil {
			t.Fatalf("round %d, killed at change %d, seed %d: %v\n%s\nthe agent: %s", round, kill, seed, err, differs, agent.Tail())
		}
		has, err := contents(l.BPFFS())
		must(err)
		if len(has) < services/4 {
			t.Fatalf("the maps hold %d lines: too few to say anything", len(has))
		}
		t.Logf("round %d: killed at change %d of %d; %d lines of maps are the same", round, kill, changes, len(has))
		fresh.stop()
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// contents of the maps that hold Services and claims. Network namespaces and addresses of pods are left out: each agent has a
// pod of its own, the canary, and there is no other.
func contents(bpffs string) ([]string, error) {
	v, err := datapath.OpenView(bpffs)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	lines, err := v.Contents()
	return slices.DeleteFunc(lines, func(s string) bool { return strings.HasPrefix(s, "netns ") || strings.HasPrefix(s, "local ") }), err
}

// difference lists lines of one only.
func difference(has, want []string) string {
	var b strings.Builder
	for _, s := range has {
		if !slices.Contains(want, s) {
			fmt.Fprintln(&b, "+", s)
		}
	}
	for _, s := range want {
		if !slices.Contains(has, s) {
			fmt.Fprintln(&b, "-", s)
		}
	}
	return b.String()
}

// freshAgent is a second agent on the same objects, with a cgroup, a bpffs directory and sockets of its own.
type freshAgent struct {
	bpffs string
	stop  func()
}

func startFresh(t *testing.T, ctx context.Context, l *lab.Lab) freshAgent {
	t.Helper()
	dir, err := os.MkdirTemp(l.Dir, "fresh")
	if err != nil {
		t.Fatal(err)
	}
	f := freshAgent{bpffs: filepath.Join(l.Dir, "bpf", filepath.Base(dir))}
	cgroup := filepath.Join(l.Cgroup, filepath.Base(dir))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	admin := filepath.Join(dir, "admin.sock")
	agent, err := l.StartAgentNoWait("--xds", "", "--bpffs", f.bpffs, "--cgroup-root", cgroup, "--admin", "unix://"+admin, "--state-dir", dir, "--metrics", "off")
	if err != nil {
		t.Fatal(err)
	}
	err = lab.Wait(ctx, func() error {
		_, err := contents(f.bpffs)
		return err
	})
	if err != nil {
		t.Fatalf("%v: %s", err, agent.Tail())
	}
	f.stop = func() {
		agent.Kill()
		cfg := datapath.Config{BPFFS: f.bpffs, CgroupRoot: cgroup}
		if err := datapath.Cleanup(cfg); err != nil {
			t.Error(err)
		}
	}
	return f
}

// anyService is a Service with its slices, of whatever kind comes. Addresses are its own, except external ones, which others
// may want too.
func anyService(pick *rand.Rand, i int) []any {
	name, protocols := fmt.Sprintf("service-%d", i), []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP}
	s := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name)},
		Spec: corev1.ServiceSpec{
			Type:       corev1.ServiceTypeClusterIP,
			ClusterIP:  fmt.Sprintf("10.96.1.%d", i+1),
			ClusterIPs: []string{fmt.Sprintf("10.96.1.%d", i+1)}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
		},
	}
	families := []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4}
	if pick.IntN(3) == 0 {
		s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, fmt.Sprintf("fd96::1:%x", i+1))
		s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPv6Protocol)
		families = append(families, discoveryv1.AddressTypeIPv6)
	}
	for p := range 1 + pick.IntN(3) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", p), Protocol: protocols[pick.IntN(2)], Port: int32(80 + p)})
	}
	if pick.IntN(3) == 0 {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	}
	if pick.IntN(4) == 0 {
		local := corev1.ServiceInternalTrafficPolicyLocal
		s.Spec.InternalTrafficPolicy = &local
	}
	switch pick.IntN(4) {
	case 0:
		s.Spec.Type = corev1.ServiceTypeNodePort
	case 1:
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: fmt.Sprintf("203.0.113.%d", i+1)}}
		if pick.IntN(2) == 0 {
			s.Spec.LoadBalancerSourceRanges = []string{"198.18.0.0/15", fmt.Sprintf("198.51.%d.0/24", pick.IntN(4))}
		}
	case 2:
		s.Spec.ExternalIPs = []string{fmt.Sprintf("198.51.100.%d", 1+pick.IntN(10))}
	}
	if s.Spec.Type != corev1.ServiceTypeClusterIP {
		for p := range s.Spec.Ports {
			s.Spec.Ports[p].NodePort = int32(30000 + 4*i + p)
		}
		if pick.IntN(2) == 0 {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}
	}
	objects := []any{s}
	for _, family := range families {
		for n := range 1 + pick.IntN(2) {
			objects = append(objects, anySlice(pick, s, i, family, n))
		}
	}
	return objects
}

func anySlice(pick *rand.Rand, s *corev1.Service, i int, family discoveryv1.AddressType, n int) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace, Name: fmt.Sprintf("%s-%s-%d", s.Name, strings.ToLower(string(family)), n),
			Labels: map[string]string{discoveryv1.LabelServiceName: s.Name},
		},
		AddressType: family, Endpoints: []discoveryv1.Endpoint{},
	}
	for _, p := range s.Spec.Ports {
		number := 8000 + p.Port
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &p.Protocol, Port: &number})
	}
	for e := range pick.IntN(12) {
		address := fmt.Sprintf("10.200.%d.%d", i, 20*n+e)
		if family == discoveryv1.AddressTypeIPv6 {
			address = fmt.Sprintf("fd20::%x:%x", i+1, 20*n+e+1)
		}
		ready, serving, terminating := pick.IntN(4) > 0, pick.IntN(4) > 0, pick.IntN(4) == 0
		node := fmt.Sprintf("node-%d", 1+pick.IntN(3))
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{address}, NodeName: &node,
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		})
	}
	return slice
}
