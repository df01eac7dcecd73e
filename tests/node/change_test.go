package node

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Weights and endpoints change twenty times under 64 connections of load: no request fails.
func TestChangesUnderLoadBreakNothing(t *testing.T) {
	w := newWorld(t, anywhere)
	kept, fresh := w.load(false), w.load(true)
	spare := w.server(anywhere, "v1b", 40)
	for i := range 10 {
		before := w.status().Proxy.Generation
		w.weights(100-i*10, i*10)
		w.inForce(before)
		w.must(kept.WaitRequests(w.ctx, 200))
		before = w.status().Proxy.Generation
		if i%2 == 0 {
			w.endpoints("v1", spare, w.v1)
		} else {
			w.endpoints("v1", w.v1)
		}
		w.inForce(before)
		w.must(fresh.WaitRequests(w.ctx, 200))
	}
	w.weights(0, 100)
	w.eventually("all traffic at v2", func() error {
		before := kept.Now().Answers["v1/proxied"]
		if err := kept.WaitRequests(w.ctx, 300); err != nil {
			return err
		}
		if n := kept.Now().Answers["v1/proxied"] - before; n > 0 {
			return fmt.Errorf("v1 answered %d of the last 300", n)
		}
		return nil
	})
	if r := w.finish(kept); r.Answers["v1b/proxied"] == 0 {
		t.Error("the endpoint that was added never answered")
	}
	w.finish(fresh)
}

// The control plane is killed under load: the last configuration stays; a new one is followed when it is back.
func TestControlPlaneKilledAndRestarted(t *testing.T) {
	w := newWorld(t, anywhere)
	w.weights(100, 0)
	load := w.load(false)
	w.control.Kill()
	w.must(w.WaitStatus(w.ctx, "disconnected", func(s lab.Status) bool { return len(s.XDS.Servers) == 1 && !s.XDS.Servers[0].Connected }))
	w.weights(0, 100) // nobody can hear it yet
	w.must(load.WaitRequests(w.ctx, 1000))
	if c := w.curl(w.client, w.shop.VIP(0), 50); c["v2/proxied "+w.client.Addr4().String()] > 25 {
		t.Errorf("without a control plane the old weights should stay: %v", c)
	}
	var err error
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
	w.eventually("the new weights", func() error {
		if c := w.curl(w.client, w.shop.VIP(0), 50); c["v2/proxied "+w.client.Addr4().String()] != 50 {
			return fmt.Errorf("answers: %v", c)
		}
		return nil
	})
	w.finish(load)
}

// The agent is killed with -9 under 64 + 64 connections and started again. Requests that were in the killed process
// may fail, once; every other is answered: by the kernel while there is no proxy, by the proxy afterwards.
func TestAgentKilledAndRestarted(t *testing.T) {
	w := newWorld(t, anywhere)
	kept, fresh := w.load(false), w.load(true)
	killed := w.agent.KillTimed()
	w.must(kept.WaitRequests(w.ctx, 1000))
	w.must(fresh.WaitRequests(w.ctx, 1000))
	w.startAgent()
	w.must(kept.WaitRequests(w.ctx, 500))
	w.must(fresh.WaitRequests(w.ctx, 500))
	for name, load := range map[string]*lab.Load{"kept connections": kept, "a connection per request": fresh} {
		r, err := load.Stop()
		w.must(err)
		outside := killed.OutsideOf(r.Failures)
		t.Logf("%s: %d requests, %d failed, %d of them not explained by the kill; answers: %v", name, r.Requests, r.Failed, len(outside), r.Answers)
		if len(outside) > 0 {
			t.Errorf("%s: %d requests failed that were not in the killed process; the first, %s after the kill: %+v",
				name, len(outside), outside[0].At.Sub(killed.From), outside[0])
		}
		if r.Failed-uint64(len(outside)) > 64 {
			t.Errorf("%s: %d requests broke with the process, and there were 64 connections", name, r.Failed)
		}
		if r.Answers["v1/direct"]+r.Answers["v2/direct"] == 0 {
			t.Errorf("%s: nothing was answered without the proxy", name)
		}
	}
	if c := w.curl(w.client, w.shop.VIP(0), 50); c["v1/proxied "+w.client.Addr4().String()]+c["v2/proxied "+w.client.Addr4().String()] != 50 {
		t.Errorf("after the restart the proxy should answer: %v", c)
	}
}

// SIGTERM: the agent lets its connections finish, and nobody notices.
func TestAgentStoppedAndRestarted(t *testing.T) {
	w := newWorld(t, anywhere)
	kept, fresh := w.load(false), w.load(true)
	w.must(w.agent.Stop(40 * time.Second))
	w.must(fresh.WaitRequests(w.ctx, 500))
	w.startAgent()
	w.must(fresh.WaitRequests(w.ctx, 500))
	w.finish(kept)
	w.finish(fresh)
}

// --fail-mode closed: while the proxy is away, a claimed connection is refused rather than let past the rules.
func TestFailClosedRefuses(t *testing.T) {
	w := newWorld(t, anywhere, "--fail-mode", "closed")
	w.curl(w.client, w.shop.VIP(0), 10)
	w.agent.Kill()
	for i := range w.shop.ClusterIPs {
		_, err := w.tryCurl(w.client, w.shop.VIP(i), 1)
		if err == nil || !strings.Contains(err.Error(), "exit status 7") {
			t.Errorf("%s: %v; want curl's exit status 7, could not connect", w.shop.VIP(i), err)
		}
	}
	w.startAgent("--fail-mode", "closed")
	w.curl(w.client, w.shop.VIP(0), 10)
}

// A Service appears, loses its endpoints and goes: it works, is refused at once, and is nobody's again.
func TestServicesComeAndGo(t *testing.T) {
	w := newWorld(t, anywhere)
	svc := lab.ServiceSpec{Namespace: "late", Name: "late", Port: 8000, TargetPort: 8080, Backends: []*lab.Pod{w.v1},
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.9.9"), netip.MustParseAddr("fd96::99")}}
	w.must(w.SetService(svc))
	for i := range svc.ClusterIPs {
		w.eventually("the new Service answers", func() error { _, err := w.tryCurl(w.client, svc.VIP(i), 1); return err })
	}
	svc.Backends = nil
	w.must(w.SetService(svc))
	refused := func() error {
		for i := range svc.ClusterIPs {
			start := time.Now()
			_, err := w.tryCurl(w.client, svc.VIP(i), 1)
			if err == nil || !strings.Contains(err.Error(), "refused") && !strings.Contains(err.Error(), "exit status 7") {
				return fmt.Errorf("%s: %v after %s; want a refusal", svc.VIP(i), err, time.Since(start).Round(time.Millisecond))
			}
		}
		return nil
	}
	w.eventually("without endpoints it refuses", refused)
	w.must(w.DeleteService(svc))
	w.eventually("gone", func() error {
		if s := w.status(); s.Kubernetes.Services != 1 {
			return fmt.Errorf("%d services", s.Kubernetes.Services)
		}
		return nil
	})
}

// A pod that comes later is enrolled at once; one that goes is forgotten.
func TestPodsComeAndGo(t *testing.T) {
	w := newWorld(t, anywhere)
	for round := range 3 {
		late := w.pod(anywhere, fmt.Sprintf("late-%d", round), 50+round, enrolled)
		w.eventually("the new pod goes through the proxy", func() error {
			c, err := w.tryCurl(late, w.shop.VIP(0), 1)
			if err == nil && c["v1/proxied "+late.Addr4().String()]+c["v2/proxied "+late.Addr4().String()] != 1 {
				err = fmt.Errorf("answers: %v", c)
			}
			return err
		})
		w.must(late.Delete())
		w.must(w.WaitStatus(w.ctx, "one enrolled pod", func(s lab.Status) bool { return s.Pods.Enrolled == 1 && s.Pods.Local == 3 }))
	}
}

// Bad manifests and bad resources are reported by name and disturb nothing.
func TestBadInputDisturbsNothing(t *testing.T) {
	w := newWorld(t, anywhere)
	load := w.load(true)
	manifests := map[string]string{
		"not-yaml.yaml": "kind: [\n",
		"no-kind.yaml":  "apiVersion: v1\nmetadata: {name: x}\n",
		"bad-ip.yaml": "apiVersion: v1\nkind: Service\nmetadata: {name: bad, namespace: x}\n" +
			"spec: {clusterIP: 10.96.0.999, clusterIPs: [10.96.0.999], ports: [{port: 80}]}\n",
	}
	for name, text := range manifests {
		w.must(w.WriteText("manifests", name, text))
	}
	// The control plane serves nothing new while a file does not parse; it says which.
	w.must(w.WriteText("xds", "half.yaml", "\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster\nname: [half\n"))
	w.eventually("both logs name the bad files", func() error {
		for name := range manifests {
			if !strings.Contains(w.agent.Output(), name) {
				return fmt.Errorf("the agent's log does not name %s", name)
			}
		}
		if !strings.Contains(w.control.Output(), "half.yaml") {
			return errors.New("the control plane's log does not name half.yaml")
		}
		return nil
	})
	w.must(w.RemoveXDS("half"))
	// It serves what parses but means nothing; the agent refuses that by name and field.
	w.must(w.WriteText("xds", "bad-filter.yaml", badListener))
	w.must(w.WaitStatus(w.ctx, "the bad listener refused by name", func(s lab.Status) bool {
		for _, r := range s.XDS.Rejected {
			if r.Name == "bad" && strings.Contains(r.Error, "no.such.filter") {
				return true
			}
		}
		return false
	}))
	// What is good among the bad still applies: a weight over xDS, a Service from the folder.
	w.weights(0, 100)
	w.eventually("a good change beside the bad ones", func() error {
		if c := w.curl(w.client, w.shop.VIP(0), 50); c["v2/proxied "+w.client.Addr4().String()] != 50 {
			return fmt.Errorf("answers: %v", c)
		}
		return nil
	})
	good := lab.ServiceSpec{Namespace: "x", Name: "good", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.8.8")}, Port: 80, TargetPort: 8080, Backends: []*lab.Pod{w.v1}}
	w.must(w.SetService(good))
	w.eventually("a good Service beside the bad one", func() error { _, err := w.tryCurl(w.client, good.VIP(0), 1); return err })
	w.must(load.WaitRequests(w.ctx, 500))
	w.finish(load)
}

const badListener = `
"@type": type.googleapis.com/envoy.config.listener.v3.Listener
name: bad
bind_to_port: false
address: {socket_address: {address: 10.96.0.66, port_value: 80}}
filter_chains: [{filters: [{name: no.such.filter, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo}}]}]
`

// Wrong flags: exit at once, with the flag's name, before anything is attached.
func TestWrongFlagsAreNamed(t *testing.T) {
	w := newBareWorld(t, anywhere)
	for _, flags := range [][]string{{"--fail-mode", "ajar"}, {"--enroll", "some"}, {"--concurrency", "-3"}, {"--no-such-flag"}} {
		agent, err := w.StartAgentNoWait(flags...)
		w.must(err)
		select {
		case <-agent.Done():
		case <-w.ctx.Done():
			t.Fatal(errors.New("the agent runs with wrong flags"))
		}
		if out := agent.Output(); !strings.Contains(out, strings.TrimPrefix(flags[0], "--")) {
			t.Errorf("%v: the message does not name the flag: %s", flags, out)
		}
	}
}
