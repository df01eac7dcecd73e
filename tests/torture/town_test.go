// Package torture is what may happen to a node while people use it: agents that are stopped, killed, upgraded and
// starved of everything that they know, pins and programs torn out of the kernel, and an hour of churn. All of it
// under a mixed load that accounts for every connection, exchange and byte (load_test.go), and with a count of all
// that could leak (census_test.go).
//
// `make torture` is the long form, `make soak DURATION=…` the hour; without their flags the same tests are short.
package torture

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
)

var long = flag.Bool("long", false, "the long form: 100 kills, more of everything")

func TestMain(m *testing.M) { labtest.Main(m, "../..") }

// times is how often something is done: in make test, and in make torture.
func times(short, inLong int) int {
	if *long {
		return inLong
	}
	return short
}

// town is a node with a client that is enrolled, two servers, and each way in which sockmesh carries a connection.
type town struct {
	*lab.Lab
	t              *testing.T
	ctx            context.Context
	client         *lab.Pod
	servers        []*lab.Pod
	agent, control *lab.Process
	built          int             // pods so far
	living         map[string]bool // hosts of pods that there are
	// patience of the load, where it isn't the usual.
	patience time.Duration
	// rest is what the agent and the kernel hold while nobody wants anything.
	rest census
}

const (
	webPort, echoPort = 8080, 8081 // of traffic servers
	httpPort, tcpPort = 80, 90     // of the Services
	udpPort           = 53
)

// The Services, each with an address of both families.
var (
	web       = service{"web", 10, httpPort, webPort}     // claimed by an HTTP listener
	proxied   = service{"proxied", 11, tcpPort, echoPort} // claimed by a TCP listener that is logged, and so not offloaded
	offloaded = service{"offloaded", 12, tcpPort, echoPort}
	plain     = service{"plain", 13, tcpPort, echoPort} // claimed by nobody
	datagrams = service{"datagrams", 14, udpPort, echoPort}
)

type service struct {
	name         string
	host         int
	port, target uint16
}

func (s service) addrs() []netip.AddrPort {
	n := strconv.Itoa(s.host)
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.MustParseAddr("10.96.0."+n), s.port), netip.AddrPortFrom(netip.MustParseAddr("fd96::"+n), s.port),
	}
}

// spec of the Service with pods behind it.
func (s service) spec(pods []*lab.Pod) lab.ServiceSpec {
	spec := lab.ServiceSpec{Namespace: "town", Name: s.name, Port: s.port, TargetPort: s.target, Backends: pods}
	if s.port == udpPort {
		spec.Protocol = corev1.ProtocolUDP
	}
	for _, a := range s.addrs() {
		spec.ClusterIPs = append(spec.ClusterIPs, a.Addr())
	}
	return spec
}

// newTown builds it, starts everything and waits until all is in force; it lasts at most as long as said.
func newTown(t *testing.T, atMost time.Duration, agentFlags ...string) *town {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), atMost)
	t.Cleanup(cancel)
	w := &town{Lab: labtest.New(t, lab.Config{NodeName: "town-1"}), t: t, ctx: ctx, living: map[string]bool{}}
	w.client = w.pod("client", true)
	w.servers = []*lab.Pod{w.server("a"), w.server("b")}
	w.must(w.WriteXDS("clusters", lab.Cluster("web").WithIdleTimeout("1s"), lab.Cluster("echo"), lab.Cluster("four")))
	w.routes(1)
	echo := []lab.Weight{{Cluster: "echo", Weight: 1}}
	w.must(w.WriteXDS("listeners", lab.HTTPListener("web", "web", web.addrs()...),
		lab.TCPListener("proxied", echo, "/dev/null", proxied.addrs()...), lab.TCPListener("offloaded", []lab.Weight{{Cluster: "four", Weight: 1}}, "", offloaded.addrs()[0])))
	w.serveBy(w.servers...)
	w.startControl()
	w.agent = w.startAgent(agentFlags...)
	w.load(w.client, 10*time.Millisecond).stop(nothing) // what is opened once, at first use, is no leak
	w.rest = w.atRest()
	return w
}

func (w *town) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// pod adds one with an address of each family, which nobody has and which nobody has had for as long as possible.
func (w *town) pod(name string, enrolled bool) *lab.Pod {
	w.t.Helper()
	for w.built++; w.living[w.host()]; w.built++ {
	}
	n := w.host()
	w.living[n] = true
	spec := lab.PodSpec{Namespace: "town", Name: name + "-" + strconv.Itoa(w.built),
		Addrs: []netip.Addr{netip.MustParseAddr("10.77.0." + n), netip.MustParseAddr("fd77::" + n)}}
	if enrolled {
		spec.Labels = map[string]string{"sockmesh.io/enroll": "true"}
	}
	p, err := w.AddPod(spec)
	w.must(err)
	return p
}

// host is the last part of the newest pod's addresses.
func (w *town) host() string { return strconv.Itoa(2 + w.built%250) }

// remove deletes a pod.
func (w *town) remove(p *lab.Pod) {
	w.t.Helper()
	w.must(p.Delete())
	delete(w.living, p.Addr4().String()[len("10.77.0."):])
}

func (w *town) server(name string) *lab.Pod {
	w.t.Helper()
	p := w.pod(name, false)
	_, err := p.StartServer(w.ctx, webPort)
	w.must(err)
	return p
}

// serveBy makes pods the backends of every Service and the endpoints of every cluster.
func (w *town) serveBy(pods ...*lab.Pod) {
	w.t.Helper()
	for _, s := range []service{web, proxied, offloaded, plain, datagrams} {
		w.must(w.SetService(s.spec(pods)))
	}
	endpoints := func(port uint16) (out []netip.AddrPort) {
		for i, p := range pods {
			out = append(out, netip.AddrPortFrom(p.Addrs[i%2], port)) // both families
		}
		return out
	}
	w.must(w.WriteXDS("endpoints", lab.Endpoints("web", endpoints(webPort)...)))
	w.must(w.WriteXDS("endpoints-echo", lab.Endpoints("echo", endpoints(echoPort)...)))
	// Chosen at connect, where an IPv4 socket can't be sent to an IPv6 endpoint.
	var four []netip.AddrPort
	for _, p := range pods {
		four = append(four, netip.AddrPortFrom(p.Addr4(), echoPort))
	}
	w.must(w.WriteXDS("endpoints-four", lab.Endpoints("four", four...)))
}

// routes sends everything to the one web cluster, by two shares, of which one has the weight.
func (w *town) routes(weight int) {
	w.t.Helper()
	w.must(w.WriteXDS("routes", lab.Routes("web", lab.Route{Retry: true, Clusters: []lab.Weight{{Cluster: "web", Weight: weight}, {Cluster: "web", Weight: 1}}})))
}

// replaceServer puts a new pod in a server's place as Kubernetes does: the new one serves before the old one is taken
// out of the endpoints, and the old one goes when those who had it have had time to finish.
func (w *town) replaceServer(i int, load *mixed) {
	w.t.Helper()
	old := w.servers[i]
	w.servers[i] = w.server("s")
	w.serveBy(w.servers...)
	time.Sleep(leave(load.pause))
	w.remove(old)
}

// kill is kill -9. What it explains lasts until nobody accepts in the client's pod any more: io_uring lets go of a dead
// process's listeners some milliseconds after the process has ended.
func (w *town) kill() lab.Window {
	w.t.Helper()
	k := w.agent.KillTimed()
	for _, addr := range []string{"127.0.0.1:15001", "[::1]:15001"} {
		w.eventually("a dead agent's listener is gone", func() error {
			c, err := w.client.Dial(w.ctx, "tcp", addr)
			if err == nil {
				c.Close()
				return errors.New("it still accepts")
			}
			return nil
		})
	}
	k.Until = time.Now()
	return k
}

// upgrade starts a second agent beside the first, which is ended when the second is ready.
func (w *town) upgrade() {
	w.t.Helper()
	old := w.agent
	w.agent = w.startAgent()
	w.must(old.Stop(time.Minute))
}

func (w *town) startControl() {
	w.t.Helper()
	var err error
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
}

// startAgent waits until everything that the folders hold is in force.
func (w *town) startAgent(flags ...string) *lab.Process {
	w.t.Helper()
	agent, err := w.StartAgentNoWait(flags...)
	w.must(err)
	// An agent that still runs beside it answers /readyz too, so the new one's own word is waited for first.
	w.eventually("the new agent's canary arrives", func() error {
		if !agent.Running() || !strings.Contains(agent.Output(), "canary connections go through") {
			return fmt.Errorf("the agent runs: %v; it says: %s", agent.Running(), agent.Tail())
		}
		return nil
	})
	w.must(w.WaitReady(w.ctx, agent))
	w.must(w.WaitStatus(w.ctx, "the town's configuration", func(s lab.Status) bool {
		return s.XDS.Resources["listener"] == 3 && s.XDS.Resources["cluster"] == 3 && s.XDS.Resources["endpoint"] == 3 &&
			s.Kubernetes.Services >= 5 && s.Pods.Enrolled >= 1 && len(s.Datapath.Errors) == 0
	}))
	return agent
}

// eventually waits for what cannot be waited for otherwise.
func (w *town) eventually(what string, try func() error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
	defer cancel()
	if err := lab.Wait(ctx, try); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

func (w *town) status() lab.Status {
	w.t.Helper()
	s, err := w.Status(w.ctx)
	w.must(err)
	return s
}
