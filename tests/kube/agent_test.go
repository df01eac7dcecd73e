package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"

	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// agent is a running source with a Handler that remembers what concerns one namespace.
type agent struct {
	t         *testing.T
	namespace string
	source    kube.Source
	admin     kubernetes.Interface

	mu       sync.Mutex
	services map[string]*service.Service
	pods     map[string]*kube.Pod
	node     *kube.Node
	synced   bool
	gone     int
}

// newAgent starts a source with the agent's rights, in a test's own namespace.
func newAgent(t *testing.T, policy kube.EnrollPolicy) *agent {
	t.Helper()
	a := &agent{t: t, admin: cluster.main.Client("admin-token"), services: map[string]*service.Service{}, pods: map[string]*kube.Pod{}}
	created, err := a.admin.CoreV1().Namespaces().Create(context.Background(),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}, metav1.CreateOptions{})
	a.must(err)
	a.namespace = created.Name
	source, err := kube.NewAPI(kube.Config{NodeName: nodeName, Enroll: policy, Handler: a, Logger: slog.New(slog.DiscardHandler)}, cluster.main.REST("agent-token"))
	a.must(err)
	a.source = source
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- source.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	a.eventually("synced", func() bool { return a.synced && source.Status().Synced })
	return a
}

func (a *agent) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

func (a *agent) ServiceChanged(name service.Name, svc *service.Service) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if name.Namespace != a.namespace {
		return
	}
	if svc == nil {
		delete(a.services, name.Name)
		a.gone++
		return
	}
	a.services[name.Name] = svc
}

func (a *agent) PodChanged(p *kube.Pod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p.Namespace == a.namespace {
		a.pods[p.UID] = p
	}
}

func (a *agent) PodDeleted(p *kube.Pod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p.Namespace == a.namespace {
		delete(a.pods, p.UID)
		a.gone++
	}
}

func (a *agent) NodeChanged(n *kube.Node) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.node = n
}

func (a *agent) Synced() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.synced = true
}

// view renders what is known: "web:80 -> 10.0.0.1:8080" for each IPv4 frontend, "web.6:80 -> …" for IPv6, and pods.
func (a *agent) view() string {
	var lines []string
	for name, svc := range a.services {
		for _, f := range svc.Frontends {
			label := name
			if f.Addr.Addr().Is6() {
				label += ".6"
			}
			line := fmt.Sprintf("%s:%d ->", label, f.Addr.Port())
			for _, b := range f.Backends {
				line += " " + b.Addr.String()
			}
			lines = append(lines, line)
		}
	}
	for _, p := range a.pods {
		line := fmt.Sprintf("pod %s %v", p.Name, p.IPs)
		if p.Enrolled {
			line += " enrolled"
		}
		if p.Terminal {
			line += " terminal"
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// sees waits until the view is as given.
func (a *agent) sees(lines ...string) {
	a.t.Helper()
	slices.Sort(lines)
	want, got := strings.Join(lines, "\n"), ""
	if !a.wait(func() bool { got = a.view(); return got == want }) {
		a.t.Fatalf("got\n%s\nwant\n%s\nstatus %+v", got, want, a.source.Status())
	}
}

func (a *agent) eventually(what string, ok func() bool) {
	a.t.Helper()
	if !a.wait(ok) {
		a.t.Fatalf("not seen: %s; status %+v", what, a.source.Status())
	}
}

// wait polls with the lock held. The deadline is long because client-go backs off; it measures nothing.
func (a *agent) wait(ok func() bool) bool {
	deadline := time.Now().Add(90 * time.Second)
	for {
		a.mu.Lock()
		now := ok()
		a.mu.Unlock()
		if now {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// service creates a Service of both families with one TCP port.
func (a *agent) service(name string, change ...func(*corev1.Service)) *corev1.Service {
	a.t.Helper()
	policy := corev1.IPFamilyPolicyRequireDualStack
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			IPFamilyPolicy: &policy,
			Ports:          []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}
	for _, c := range change {
		c(s)
	}
	created, err := a.admin.CoreV1().Services(a.namespace).Create(context.Background(), s, metav1.CreateOptions{})
	a.must(err)
	return created
}

// slice creates an EndpointSlice of a Service, all endpoints ready.
func (a *agent) slice(service, name string, family discoveryv1.AddressType, addresses ...string) *discoveryv1.EndpointSlice {
	a.t.Helper()
	portName, port := "", int32(8080)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: family,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
	}
	for _, ip := range addresses {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{ip}})
	}
	created, err := a.admin.DiscoveryV1().EndpointSlices(a.namespace).Create(context.Background(), s, metav1.CreateOptions{})
	a.must(err)
	return created
}

// pod creates a pod on a node and gives it addresses.
func (a *agent) pod(name, node string, ips []string, change ...func(*corev1.Pod)) *corev1.Pod {
	a.t.Helper()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	for _, c := range change {
		c(p)
	}
	created, err := a.admin.CoreV1().Pods(a.namespace).Create(context.Background(), p, metav1.CreateOptions{})
	a.must(err)
	for _, ip := range ips {
		created.Status.PodIPs = append(created.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	if len(ips) > 0 {
		created.Status.PodIP = ips[0]
	}
	created.Status.Phase = corev1.PodRunning
	created, err = a.admin.CoreV1().Pods(a.namespace).UpdateStatus(context.Background(), created, metav1.UpdateOptions{})
	a.must(err)
	return created
}
