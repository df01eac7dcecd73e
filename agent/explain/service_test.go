package explain

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// balanced is a Service of every kind of address, with one endpoint here and one elsewhere.
func balanced(local bool) *service.Service {
	here, there := service.Backend{Addr: addr("10.0.1.1:8080"), Local: true}, service.Backend{Addr: addr("10.0.9.1:8080")}
	both := []service.Backend{here, there}
	out := &service.External{Backends: both}
	if local {
		out = &service.External{Backends: both[:1], Local: true}
	}
	restricted := *out
	restricted.Sources = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
	front := func(a string, kind service.Kind, x *service.External) service.Frontend {
		return service.Frontend{Addr: addr(a), Protocol: service.TCP, Kind: kind, Backends: both, External: x, Affinity: time.Hour}
	}
	return &service.Service{
		Name: service.Name{Namespace: "shop", Name: "lb"},
		Frontends: []service.Frontend{
			front("10.96.0.60:80", service.ClusterIP, nil), front("192.0.2.1:30080", service.NodePort, out),
			front("203.0.113.1:80", service.LoadBalancer, &restricted), front("198.51.100.1:80", service.ExternalIP, out),
		},
		Loopback: []service.Frontend{front("127.0.0.1:30080", service.NodePort, out)},
	}
}

func TestEveryKindOfAddressIsExplainedForEveryClient(t *testing.T) {
	for _, tt := range []struct {
		from, url, outcome string
		change             func(*World)
		want               []string
	}{
		{"shop/client", "tcp://10.96.0.60:80", Service, nil, []string{"ClusterIP of Service shop/lb", "the client is the network namespace", "within 1h0m0s", "10.0.9.1:8080"}},
		{"shop/client", "tcp://192.0.2.1:30080", Service, nil, []string{"NodePort of Service shop/lb", "short cut that goes by no traffic policy and no source range"}},
		{"shop/client", "tcp://203.0.113.1:80", Service, nil, []string{"LoadBalancer of Service shop/lb", "short cut"}},
		{"host", "tcp://198.51.100.1:80", Service, nil, []string{"a process of this node", "ExternalIP of Service shop/lb"}},
		{"host", "tcp://127.0.0.1:30080", Service, nil, []string{"on loopback for the host's own processes"}},
		{"shop/client", "tcp://127.0.0.1:30080", Passed, nil, []string{"a pod's loopback is its own"}},
		{"outside", "tcp://192.0.2.1:30080", Service, nil, []string{"externalTrafficPolicy: Cluster", "SNAT", "outside the client is its address", "10.0.9.1:8080"}},
		{"outside", "tcp://192.0.2.1:30080", Service, local, []string{"externalTrafficPolicy: Local", "sees the client's own address"}},
		{"outside:198.18.3.4", "tcp://203.0.113.1:80", Service, nil, []string{"198.18.3.4 may connect", "198.18.0.0/15"}},
		{"outside:8.8.8.8", "tcp://203.0.113.1:80", Dropped, nil, []string{"8.8.8.8 may not", "in none of the ranges"}},
		{"outside", "tcp://203.0.113.1:80", Service, nil, []string{"depends on the client", "--from outside:IP"}},
		{"outside:8.8.8.8", "tcp://198.51.100.1:80", Service, nil, []string{"ExternalIP of Service shop/lb"}},
		{"outside", "tcp://10.96.0.60:80", Passed, nil, []string{"for clients of the cluster's nodes only"}},
		{"outside", "tcp://127.0.0.1:30080", Passed, nil, []string{"none for clients outside"}},
		{"outside", "tcp://9.9.9.9:9", Passed, nil, []string{"no Service has the TCP address 9.9.9.9:9"}},
		{"outside", "tcp://192.0.2.1:30080", Passed, func(w *World) { w.Outside = false }, []string{"does not serve clients outside"}},
		{"outside", "tcp://192.0.2.1:30080", Refused, none(false), []string{"no endpoint takes traffic", "refused at once"}},
		{"outside", "tcp://192.0.2.1:30080", Dropped, none(true), []string{"no answer: endpoints are on other nodes"}},
		{"shop/client", "udp://10.96.0.53:53", Unknown, func(w *World) { w.UDP = false }, []string{"don't translate datagrams"}},
		{"shop/client", "udp://10.96.0.54:53", Passed, nil, []string{"no Service has the UDP address", "datagrams go to 10.96.0.54:53"}},
	} {
		w := world(t)
		w.Services = append(w.Services, balanced(false))
		if tt.change != nil {
			tt.change(w)
		}
		e, err := Explain(w, api.ExplainRequest{From: tt.from, URL: tt.url})
		if err != nil {
			t.Errorf("%s -> %s: %v", tt.from, tt.url, err)
			continue
		}
		got := text(e)
		if e.Outcome != tt.outcome {
			t.Errorf("%s -> %s: outcome %q, want %q\n%s", tt.from, tt.url, e.Outcome, tt.outcome, got)
		}
		for _, want := range tt.want {
			if !strings.Contains(got, want) {
				t.Errorf("%s -> %s: no %q in\n%s", tt.from, tt.url, want, got)
			}
		}
	}
	if _, err := Explain(world(t), api.ExplainRequest{From: "outside:nowhere", URL: "tcp://1.2.3.4:1"}); err == nil {
		t.Error("outside:nowhere must be refused")
	}
}

// local makes the Service's external policy Local; none takes its endpoints away from clients outside.
func local(w *World) { w.Services[len(w.Services)-1] = balanced(true) }

func none(silent bool) func(*World) {
	return func(w *World) {
		svc := balanced(true)
		svc.Frontends[1].External = &service.External{Local: true, Silent: silent}
		w.Services[len(w.Services)-1] = svc
	}
}
