package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sockmesh/sockmesh/pkg/kube"
)

var now = int64(0)

// deleteNow deletes at once, as a kubelet that has stopped the pod does.
var deleteNow = metav1.DeleteOptions{GracePeriodSeconds: &now}

func TestAServiceAndItsEndpointsComeAndGo(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	a.service("web")
	a.sees("web:80 ->", "web.6:80 ->")
	four := a.slice("web", "web-4", discoveryv1.AddressTypeIPv4, "10.1.0.1", "10.1.0.2")
	a.slice("web", "web-6", discoveryv1.AddressTypeIPv6, "fd01::1")
	a.sees("web:80 -> 10.1.0.1:8080 10.1.0.2:8080", "web.6:80 -> [fd01::1]:8080")

	no := false
	four.Endpoints[0].Conditions.Ready = &no
	_, err := a.admin.DiscoveryV1().EndpointSlices(a.namespace).Update(ctx, four, metav1.UpdateOptions{})
	a.must(err)
	a.sees("web:80 -> 10.1.0.2:8080", "web.6:80 -> [fd01::1]:8080")

	a.must(a.admin.DiscoveryV1().EndpointSlices(a.namespace).Delete(ctx, "web-4", metav1.DeleteOptions{}))
	a.sees("web:80 ->", "web.6:80 -> [fd01::1]:8080")
	a.must(a.admin.CoreV1().Services(a.namespace).Delete(ctx, "web", metav1.DeleteOptions{}))
	a.sees()
}

func TestEndpointsMayComeBeforeTheirService(t *testing.T) {
	a := newAgent(t, kube.EnrollLabelled)
	a.slice("web", "web-4", discoveryv1.AddressTypeIPv4, "10.1.0.1")
	a.service("web")
	a.sees("web:80 -> 10.1.0.1:8080", "web.6:80 ->")
}

func TestChangesOfTypeAndOfLabelsCleanUp(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	single := corev1.IPFamilyPolicySingleStack
	s := a.service("web", func(s *corev1.Service) { s.Spec.IPFamilyPolicy = &single })
	a.slice("web", "web-4", discoveryv1.AddressTypeIPv4, "10.1.0.1")
	a.sees("web:80 -> 10.1.0.1:8080")

	patch := func(p string) {
		t.Helper()
		_, err := a.admin.CoreV1().Services(a.namespace).Patch(ctx, s.Name, types.MergePatchType, []byte(p), metav1.PatchOptions{})
		a.must(err)
	}
	patch(`{"spec":{"type":"ExternalName","externalName":"example.com","clusterIP":null,"clusterIPs":null,"ipFamilies":null,"ipFamilyPolicy":null}}`)
	a.sees()
	patch(`{"spec":{"type":"NodePort","externalName":null}}`)
	a.sees("web:80 -> 10.1.0.1:8080")
	patch(`{"metadata":{"labels":{"service.kubernetes.io/service-proxy-name":"other"}}}`)
	a.sees()
	patch(`{"metadata":{"labels":{"service.kubernetes.io/service-proxy-name":null}}}`)
	a.sees("web:80 -> 10.1.0.1:8080")

	// A slice that is given to another Service, and one that is labelled headless.
	_, err := a.admin.DiscoveryV1().EndpointSlices(a.namespace).Patch(ctx, "web-4", types.MergePatchType,
		[]byte(`{"metadata":{"labels":{"kubernetes.io/service-name":null}}}`), metav1.PatchOptions{})
	a.must(err)
	a.sees("web:80 ->")
	_, err = a.admin.DiscoveryV1().EndpointSlices(a.namespace).Patch(ctx, "web-4", types.MergePatchType,
		[]byte(`{"metadata":{"labels":{"kubernetes.io/service-name":"web"}}}`), metav1.PatchOptions{})
	a.must(err)
	a.sees("web:80 -> 10.1.0.1:8080")
	_, err = a.admin.DiscoveryV1().EndpointSlices(a.namespace).Patch(ctx, "web-4", types.MergePatchType,
		[]byte(`{"metadata":{"labels":{"service.kubernetes.io/headless":""}}}`), metav1.PatchOptions{})
	a.must(err)
	a.sees("web:80 ->")
}

func TestOnlyThisNodesPodsAreWatched(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	a.pod("mine", nodeName, []string{"10.1.0.1", "fd01::1"})
	a.pod("other", "node-2", []string{"10.1.0.2"})
	job := a.pod("job", nodeName, []string{"10.1.0.3"})
	a.sees("pod mine [10.1.0.1 fd01::1]", "pod job [10.1.0.3]")

	job.Status.Phase = corev1.PodSucceeded
	_, err := a.admin.CoreV1().Pods(a.namespace).UpdateStatus(ctx, job, metav1.UpdateOptions{})
	a.must(err)
	a.sees("pod mine [10.1.0.1 fd01::1]", "pod job [10.1.0.3] terminal")

	a.must(a.admin.CoreV1().Pods(a.namespace).Delete(ctx, "mine", deleteNow))
	a.sees("pod job [10.1.0.3] terminal")
	a.pod("mine", nodeName, []string{"10.1.0.4"})
	a.sees("pod mine [10.1.0.4]", "pod job [10.1.0.3] terminal")
	if st := a.source.Status(); st.Pods < 2 || st.Source != cluster.main.REST("").Host {
		t.Errorf("%+v", st)
	}
}

func TestLabelsOfPodsAndNamespacesEnrolLive(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	label := func(value string) []byte {
		return []byte(fmt.Sprintf(`{"metadata":{"labels":{%q:%s}}}`, kube.EnrollLabel, value))
	}
	a.pod("a", nodeName, []string{"10.1.0.1"})
	a.pod("b", nodeName, []string{"10.1.0.2"}, func(p *corev1.Pod) { p.Labels = map[string]string{kube.EnrollLabel: "false"} })
	a.pod("h", nodeName, []string{"10.9.9.9"}, func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	a.sees("pod a [10.1.0.1]", "pod b [10.1.0.2]", "pod h [10.9.9.9]")
	_, err := a.admin.CoreV1().Namespaces().Patch(ctx, a.namespace, types.MergePatchType, label(`"true"`), metav1.PatchOptions{})
	a.must(err)
	a.sees("pod a [10.1.0.1] enrolled", "pod b [10.1.0.2]", "pod h [10.9.9.9]")
	_, err = a.admin.CoreV1().Pods(a.namespace).Patch(ctx, "b", types.MergePatchType, label("null"), metav1.PatchOptions{})
	a.must(err)
	a.sees("pod a [10.1.0.1] enrolled", "pod b [10.1.0.2] enrolled", "pod h [10.9.9.9]")
	_, err = a.admin.CoreV1().Namespaces().Patch(ctx, a.namespace, types.MergePatchType, label("null"), metav1.PatchOptions{})
	a.must(err)
	a.sees("pod a [10.1.0.1]", "pod b [10.1.0.2]", "pod h [10.9.9.9]")
}

func TestThisNodeIsWatched(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	for _, name := range []string{nodeName, "node-2"} {
		n, err := a.admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name,
			Labels: map[string]string{corev1.LabelTopologyZone: "zone-of-" + name}}}, metav1.CreateOptions{})
		a.must(err)
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.0.1"}, {Type: corev1.NodeHostName, Address: name}}
		_, err = a.admin.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
		a.must(err)
	}
	a.eventually("this node", func() bool {
		return a.node != nil && a.node.Name == nodeName && a.node.Zone == "zone-of-"+nodeName && len(a.node.Addresses) == 1
	})
}

func TestWhatIsNotSupportedIsAnEventOnTheService(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	s := a.service("web", func(s *corev1.Service) {
		s.Spec.Ports = []corev1.ServicePort{{Name: "a", Port: 80}, {Name: "b", Port: 81, Protocol: corev1.ProtocolSCTP}}
	})
	a.sees("web:80 ->", "web.6:80 ->")
	a.eventually("an Event", func() bool {
		events, err := a.admin.CoreV1().Events(a.namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(s.UID)})
		return err == nil && len(events.Items) == 1 && strings.Contains(events.Items[0].Message, "spec.ports[1].protocol: SCTP is not supported")
	})
}

func TestAnAPIServerThatRestartsChangesNothingAndIsFoundAgain(t *testing.T) {
	a := newAgent(t, kube.EnrollLabelled)
	a.service("web")
	a.slice("web", "web-4", discoveryv1.AddressTypeIPv4, "10.1.0.1")
	a.pod("p", nodeName, []string{"10.1.0.9"})
	state := []string{"web:80 -> 10.1.0.1:8080", "web.6:80 ->", "pod p [10.1.0.9]"}
	a.sees(state...)

	cluster.main.Kill()
	a.eventually("the loss in Status", func() bool { return len(a.source.Status().Errors) > 0 })
	time.Sleep(2 * time.Second) // Long enough for it to try again.
	a.sees(state...)
	a.must(cluster.main.Start())
	a.eventually("no error in Status", func() bool { return len(a.source.Status().Errors) == 0 })
	if a.gone > 0 {
		t.Errorf("%d deletions told over the restart", a.gone)
	}
	a.slice("web", "web-6", discoveryv1.AddressTypeIPv6, "fd01::1")
	a.sees("web:80 -> 10.1.0.1:8080", "web.6:80 -> [fd01::1]:8080", "pod p [10.1.0.9]")
}

func TestWhatHappenedDuringALongOutageIsNoticed(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	for _, name := range []string{"stays", "goes", "again"} {
		a.service(name)
		a.slice(name, name+"-4", discoveryv1.AddressTypeIPv4, "10.1.0.1")
		a.pod(name, nodeName, []string{"10.1.0.9"})
	}
	a.sees("stays:80 -> 10.1.0.1:8080", "stays.6:80 ->", "goes:80 -> 10.1.0.1:8080", "goes.6:80 ->", "again:80 -> 10.1.0.1:8080", "again.6:80 ->",
		"pod stays [10.1.0.9]", "pod goes [10.1.0.9]", "pod again [10.1.0.9]")

	// The agent's API server is gone; the cluster goes on with another one.
	cluster.main.Kill()
	other, err := cluster.NewServer()
	a.must(err)
	a.admin = other.Client("admin-token")
	for _, name := range []string{"goes", "again"} {
		a.must(a.admin.CoreV1().Services(a.namespace).Delete(ctx, name, metav1.DeleteOptions{}))
		a.must(a.admin.DiscoveryV1().EndpointSlices(a.namespace).Delete(ctx, name+"-4", metav1.DeleteOptions{}))
		a.must(a.admin.CoreV1().Pods(a.namespace).Delete(ctx, name, deleteNow))
	}
	a.service("again")
	a.slice("again", "again-4", discoveryv1.AddressTypeIPv4, "10.1.0.2")
	a.pod("again", nodeName, []string{"10.1.0.8"})
	a.service("new")
	other.Kill()
	a.must(cluster.main.Start())
	a.sees("stays:80 -> 10.1.0.1:8080", "stays.6:80 ->", "again:80 -> 10.1.0.2:8080", "again.6:80 ->", "new:80 ->", "new.6:80 ->",
		"pod stays [10.1.0.9]", "pod again [10.1.0.8]")
}

func TestTheAgentsRightsAreEnoughAndNoMore(t *testing.T) {
	a, ctx := newAgent(t, kube.EnrollLabelled), context.Background()
	agent := cluster.main.Client("agent-token") // That the rights are enough, every other test shows.
	forbidden := map[string]func() error{
		"read Secrets": func() error {
			_, err := agent.CoreV1().Secrets(a.namespace).List(ctx, metav1.ListOptions{})
			return err
		},
		"read ConfigMaps": func() error {
			_, err := agent.CoreV1().ConfigMaps(a.namespace).List(ctx, metav1.ListOptions{})
			return err
		},
		"create Services": func() error {
			_, err := agent.CoreV1().Services(a.namespace).Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, metav1.CreateOptions{})
			return err
		},
		"delete pods": func() error { return agent.CoreV1().Pods(a.namespace).Delete(ctx, "x", metav1.DeleteOptions{}) },
		"exec into pods": func() error {
			return agent.CoreV1().RESTClient().Post().AbsPath("/api/v1/namespaces", a.namespace, "pods/x/exec").Do(ctx).Error()
		},
		"patch this Node": func() error {
			_, err := agent.CoreV1().Nodes().Patch(ctx, nodeName, types.MergePatchType, []byte("{}"), metav1.PatchOptions{})
			return err
		},
		"delete slices": func() error {
			return agent.DiscoveryV1().EndpointSlices(a.namespace).Delete(ctx, "x", metav1.DeleteOptions{})
		},
		"label Namespaces": func() error {
			_, err := agent.CoreV1().Namespaces().Patch(ctx, a.namespace, types.MergePatchType, []byte("{}"), metav1.PatchOptions{})
			return err
		},
		"delete Events":     func() error { return agent.CoreV1().Events(a.namespace).Delete(ctx, "x", metav1.DeleteOptions{}) },
		"read ClusterRoles": func() error { _, err := agent.RbacV1().ClusterRoles().List(ctx, metav1.ListOptions{}); return err },
		"create token for SA": func() error {
			return agent.CoreV1().RESTClient().Post().AbsPath("/api/v1/namespaces", a.namespace, "serviceaccounts/x/token").Do(ctx).Error()
		},
	}
	for what, try := range forbidden {
		if err := try(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: want forbidden, got %v", what, err)
		}
	}

	// The file itself grants nothing that pkg/kube has no use for.
	role, _, err := rights()
	a.must(err)
	read := []string{"list", "watch"}
	use := map[string][]string{
		"services": read, "namespaces": read, "nodes": read, "pods": read, "endpointslices": read,
		"events": {"create", "patch"},
	}
	for _, rule := range role.Rules {
		for _, resource := range rule.Resources {
			for _, verb := range rule.Verbs {
				if !slices.Contains(use[resource], verb) {
					t.Errorf("%s grants %s on %s %v, which nothing needs", deployment, verb, resource, rule.APIGroups)
				}
			}
		}
		if len(rule.NonResourceURLs) > 0 {
			t.Errorf("%s grants %v", deployment, rule.NonResourceURLs)
		}
	}
}

func TestWithoutRightsItSaysWhatItWaitsFor(t *testing.T) {
	a := &agent{t: t}
	source, err := kube.NewAPI(kube.Config{NodeName: nodeName, Handler: a, Logger: slog.New(slog.DiscardHandler)}, cluster.main.REST("nobody-token"))
	a.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- source.Run(ctx) }()
	a.source = source
	a.eventually("five kinds that are forbidden", func() bool {
		st := source.Status()
		return len(st.Errors) == 5 && len(st.Waiting) == 5 && !st.Synced && strings.Contains(st.Errors[0], "forbidden")
	})
	cancel()
	a.must(<-ended)
}
