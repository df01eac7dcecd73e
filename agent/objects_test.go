package agent

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/pod"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// world stands for datapath, pod finder and proxy, and notes who was told what.
type world struct {
	journal
	addErr error
}

func (w *world) SetService(s *service.Service)   { w.note("kernel service %s", s.Name) }
func (w *world) DeleteService(name service.Name) { w.note("kernel no service %s", name) }
func (w *world) SetPods(list []datapath.Pod) {
	var names []string
	for _, p := range list {
		name := p.Name
		if p.Enrolled {
			name += "+"
		}
		names = append(names, name)
	}
	slices.Sort(names)
	w.note("kernel pods %s", strings.Join(names, " "))
}
func (w *world) Synced(source string) { w.note("synced %s", source) }
func (w *world) SetPod(s pod.Spec) {
	w.note("find %s ignored=%v enrolled=%v", s.Name, s.Ignored, s.Enrolled)
}
func (w *world) DeletePod(uid string)    { w.note("forget %s", uid) }
func (w *world) AddPod(p pod.Pod) error  { w.note("proxy +%s", p.Name); return w.addErr }
func (w *world) RemovePod(cookie uint64) { w.note("proxy -%d", cookie) }

func testObjects() (*objects, *world) {
	w := &world{}
	o := newObjects()
	o.health = noChecks{}
	o.datapath, o.finder, o.proxy, o.log, o.translate, o.synced = w, w, w, quiet, true, func() { w.note("synced called") }
	return o, w
}

func enrolledPod(name string, cookie uint64) pod.Pod {
	return pod.Pod{Spec: pod.Spec{UID: name, Name: name, Enrolled: true}, Cookie: cookie, Netns: os.Stdin, Listeners: []int{-1}}
}

func expect(t *testing.T, w *world, want ...string) {
	t.Helper()
	if got := w.take(); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestAPodIsKnownToTheProxyBeforeTheKernelAndGoneAfter(t *testing.T) {
	o, w := testObjects()
	o.setInternal(datapath.Pod{Name: "canary", Enrolled: true})
	expect(t, w, "kernel pods canary+")
	o.PodReady(enrolledPod("a", 7))
	expect(t, w, "proxy +a", "kernel pods a+ canary+")
	o.PodGone("a")
	expect(t, w, "kernel pods canary+", "proxy -7")
	o.PodGone("a")
	expect(t, w)
}

func TestAPodWithoutListenersIsOnlyKnownToTheKernel(t *testing.T) {
	o, w := testObjects()
	o.PodReady(pod.Pod{Spec: pod.Spec{UID: "b", Name: "b"}, Cookie: 8})
	expect(t, w, "kernel pods b")
	o.PodGone("b")
	expect(t, w, "kernel pods ")
}

// Its connections have no listener of ours to go to, so they meet the fail mode.
func TestAPodThatTheProxyRefusesStaysEnrolled(t *testing.T) {
	o, w := testObjects()
	w.addErr = errors.New("no")
	o.PodReady(enrolledPod("a", 7))
	expect(t, w, "proxy +a", "kernel pods a+")
}

func TestServicesReachTheKernelUnlessSwitchedOff(t *testing.T) {
	o, w := testObjects()
	name := service.Name{Namespace: "n", Name: "s"}
	o.ServiceChanged(name, &service.Service{Name: name})
	o.ServiceChanged(name, nil)
	expect(t, w, "kernel service n/s", "kernel no service n/s")
	o.translate = false
	o.ServiceChanged(name, &service.Service{Name: name})
	expect(t, w)
	if len(o.serviceList()) != 1 {
		t.Error("a Service must be known even if it is not translated: explain and services show it")
	}
	o.Synced()
	expect(t, w, "synced services", "synced called")
}

func TestHostNetworkAndEndedPodsAreNotLookedFor(t *testing.T) {
	o, w := testObjects()
	o.PodChanged(&kube.Pod{UID: "1", Name: "host", HostNetwork: true})
	o.PodChanged(&kube.Pod{UID: "2", Name: "done", Terminal: true})
	o.PodChanged(&kube.Pod{UID: "3", Name: "run", Enrolled: true})
	expect(t, w, "find host ignored=true enrolled=false", "find done ignored=true enrolled=false", "find run ignored=false enrolled=true")
	o.PodDeleted(&kube.Pod{UID: "3"})
	expect(t, w, "forget 3")
}

func TestPodRowsSayWhy(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	pods := []*kube.Pod{
		{UID: "1", Name: "host", HostNetwork: true}, {UID: "2", Name: "done", Terminal: true},
		{UID: "3", Name: "own", Label: kube.No, NamespaceLabel: kube.Yes, IPs: []netip.Addr{ip}},
		{UID: "4", Name: "ns", NamespaceLabel: kube.Yes, Enrolled: true}, {UID: "5", Name: "none"}, {UID: "6", Name: "new"},
	}
	found := []pod.Status{
		{Spec: pod.Spec{UID: "3"}, Ready: true, NetnsName: "cni-3", Cookie: 33}, {Spec: pod.Spec{UID: "4"}, Reason: "its port is taken"},
		{Spec: pod.Spec{UID: "5"}, Ready: true},
	}
	want := []struct{ state, reason, rule string }{
		{"skipped", "host network", "never enrolled"}, {"skipped", "it has ended", ""},
		{"ready", "", "the pod's label sockmesh.io/enroll=false"}, {"waiting", "its port is taken", "the namespace's label"},
		{"ready", "", "--enroll=labelled"}, {"waiting", "", ""},
	}
	rows := podRows("labelled", pods, found, true)
	for i, r := range rows {
		if r.State != want[i].state || r.Reason != want[i].reason || !strings.Contains(r.Rule, want[i].rule) {
			t.Errorf("%+v, expected %+v", r, want[i])
		}
	}
	if rows[2].Netns != "cni-3" || rows[2].Cookie != 33 || rows[2].IPs[0] != "10.0.0.1" {
		t.Errorf("%+v", rows[2])
	}
	if r := podRows("all", pods, nil, false)[3]; !strings.Contains(r.Reason, "xDS") {
		t.Errorf("before the first configuration: %+v", r)
	}
	if p := explainPods(pods, rows)[3]; p.Listening || p.NotListening != "its port is taken" {
		t.Errorf("%+v", p)
	}
}

// noChecks are health checks of nobody's.
type noChecks struct{}

func (noChecks) Set(service.Name, *service.HealthCheck) {}
