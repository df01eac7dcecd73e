package kube

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/service"
)

type remarks []string

func (r *remarks) Warn(on Ref, reason, message string) {
	*r = append(*r, on.Name+" "+reason+" "+message)
}

// steps runs a table until it has nothing more to tell.
func steps(t *table) {
	for t.step() {
	}
}

func testTable(t *testing.T, policy EnrollPolicy) (*table, *ledger, *remarks) {
	l, r := newLedger(t), &remarks{}
	return newTable(Config{NodeName: "here", Enroll: policy, Handler: l, Logger: slog.New(slog.DiscardHandler)}, r), l, r
}

func webObject() *service.Object {
	return &service.Object{
		Name:       service.Name{Namespace: "default", Name: "web"},
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
		Ports:      []service.Port{{Protocol: service.TCP, Port: 80}},
	}
}

func TestNoServiceIsAnnouncedBeforeItsEndpointsAreKnown(t *testing.T) {
	tb, l, _ := testTable(t, EnrollLabelled)
	tb.set(webObject())
	tb.listed(kindService)
	steps(tb)
	if len(l.calls) != 0 {
		t.Fatalf("told before EndpointSlices were listed: %v", l.calls)
	}
	tb.set(&service.Slice{Name: service.Name{Namespace: "default", Name: "web-x"}, Service: "web",
		Ports:     []service.Port{{Protocol: service.TCP, Port: 8080}},
		Endpoints: []service.Endpoint{{Addr: netip.MustParseAddr("10.0.0.1"), Ready: true}}})
	tb.listed(kindEndpointSlice)
	steps(tb)
	if l.view() != "10.96.0.1:80 -> 10.0.0.1:8080" {
		t.Error(l.view())
	}
	if l.synced != 0 {
		t.Error("synced before all kinds were listed")
	}
	if st := tb.status("x"); st.Synced || !slices.Equal(st.Waiting, []string{"Pod", "Namespace", "Node"}) {
		t.Errorf("status: %+v", st)
	}
}

func TestSyncedComesOnceAndAfterAllThatExists(t *testing.T) {
	tb, l, _ := testTable(t, EnrollLabelled)
	tb.set(webObject())
	tb.set(&Pod{UID: "1", Namespace: "default", Name: "a"})
	for _, k := range kinds {
		tb.listed(k)
	}
	steps(tb)
	if got := strings.Join(l.calls, ", "); got != "node here, pod default/a, service default/web, synced" {
		t.Error(got)
	}
	tb.unset(webObject())
	steps(tb)
	if l.synced != 1 || l.calls[len(l.calls)-1] != "service default/web gone" {
		t.Error(l.calls)
	}
}

func TestEnrolment(t *testing.T) {
	for _, test := range []struct {
		name           string
		policy         EnrollPolicy
		pod, namespace Choice
		hostNetwork    bool
		want           bool
	}{
		{"labelled: nothing said", EnrollLabelled, Unset, Unset, false, false},
		{"labelled: the pod says yes", EnrollLabelled, Yes, Unset, false, true},
		{"labelled: the namespace says yes", EnrollLabelled, Unset, Yes, false, true},
		{"labelled: the pod's no wins", EnrollLabelled, No, Yes, false, false},
		{"labelled: the pod's yes wins", EnrollLabelled, Yes, No, false, true},
		{"all: nothing said", EnrollAll, Unset, Unset, false, true},
		{"all: the pod says no", EnrollAll, No, Yes, false, false},
		{"all: the namespace says no", EnrollAll, Unset, No, false, false},
		{"all: host network never", EnrollAll, Yes, Yes, true, false},
		{"labelled: host network never", EnrollLabelled, Yes, Yes, true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			tb, l, _ := testTable(t, test.policy)
			tb.set(&namespace{"default", test.namespace})
			tb.set(&Pod{UID: "1", Namespace: "default", Name: "a", Label: test.pod, HostNetwork: test.hostNetwork})
			tb.listed(kindPod)
			tb.listed(kindNamespace)
			steps(tb)
			if got := l.pods["1"].Enrolled; got != test.want {
				t.Errorf("enrolled %v", got)
			}
		})
	}
}

func TestANamespacesLabelChangesItsPodsLive(t *testing.T) {
	tb, l, _ := testTable(t, EnrollLabelled)
	tb.listed(kindPod)
	tb.listed(kindNamespace)
	tb.set(&Pod{UID: "1", Namespace: "a", Name: "x"})
	tb.set(&Pod{UID: "2", Namespace: "b", Name: "y"})
	steps(tb)
	l.calls = nil
	tb.set(&namespace{"a", Yes})
	steps(tb)
	if !l.pods["1"].Enrolled || l.pods["2"].Enrolled || len(l.calls) != 1 {
		t.Errorf("%v %v", l.view(), l.calls)
	}
	tb.unset(&namespace{"a", Yes})
	steps(tb)
	if l.pods["1"].Enrolled {
		t.Error("still enrolled after the namespace is gone")
	}
}

func TestAPodMadeAgainUnderItsNameIsDeletedFirst(t *testing.T) {
	tb, l, _ := testTable(t, EnrollLabelled)
	tb.listed(kindPod)
	tb.listed(kindNamespace)
	tb.set(&Pod{UID: "1", Namespace: "default", Name: "a"})
	steps(tb)
	tb.set(&Pod{UID: "2", Namespace: "default", Name: "a"}) // The deletion was missed, as after an outage.
	steps(tb)
	if got := strings.Join(l.calls, ", "); got != "pod default/a, pod default/a gone, pod default/a" {
		t.Error(got)
	}
	tb.unset(&Pod{Namespace: "default", Name: "a"})
	steps(tb)
	if len(l.pods) != 0 || len(tb.pods) != 0 {
		t.Errorf("left behind: %v %v", l.pods, tb.pods)
	}
}

func TestChangesWhileTheHandlerIsBusyAreCoalesced(t *testing.T) {
	tb, l, _ := testTable(t, EnrollLabelled)
	tb.listed(kindService)
	tb.listed(kindEndpointSlice)
	tb.set(webObject())
	for i := range 50 {
		tb.set(&service.Slice{Name: service.Name{Namespace: "default", Name: "web-x"}, Service: "web",
			Ports:     []service.Port{{Protocol: service.TCP, Port: uint16(8000 + i)}},
			Endpoints: []service.Endpoint{{Addr: netip.MustParseAddr("10.0.0.1"), Ready: true}}})
	}
	steps(tb)
	if l.view() != "10.96.0.1:80 -> 10.0.0.1:8049" || len(l.calls) != 1 {
		t.Errorf("%s %v", l.view(), l.calls)
	}
}

func TestWhatIsNotSupportedIsToldOnceOnTheService(t *testing.T) {
	tb, _, r := testTable(t, EnrollLabelled)
	tb.listed(kindService)
	tb.listed(kindEndpointSlice)
	o := webObject()
	o.Problems = []service.Problem{{Field: "spec.ports[1].protocol", Detail: "SCTP is not supported"}, {Field: "x", Detail: "minor", Minor: true}}
	tb.set(o)
	steps(tb)
	again := *o
	again.InternalLocal = true
	tb.set(&again)
	steps(tb)
	if len(*r) != 1 || (*r)[0] != "web Unsupported spec.ports[1].protocol: SCTP is not supported" {
		t.Errorf("%q", *r)
	}
}
