// Package torture is what may happen to a node while people use it: agents that are stopped, killed, upgraded and
// starved of everything that they know, pins and programs torn out of the kernel, and an hour of churn. All of it
// under a mixed load that accounts for every connection, exchange and byte (load_test.go), and with a count of all
// that could leak (census_test.go).
//
// `make torture` is the long form, `make soak DURATION=…` the hour; without their flags the same tests are short.
package torture

import (
	"context"
	"flag"
	"net/netip"
	"strconv"
	"testing"
	"time"

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
	built          int // pods so far: each has addresses of its own
	// rest is what the agent and the kernel hold while nobody wants anything.
	rest census
}

const (
	webPort, echoPort = 8080, 8081 // of traffic servers
	httpPort, tcpPort = 80, 90     // of the Services
)

// The Services, each with an address of both families.
var (
	web       = service{"web", 10, httpPort, webPort}     // claimed by an HTTP listener
	proxied   = service{"proxied", 11, tcpPort, echoPort} // claimed by a TCP listener that is logged, and so not offloaded
	offloaded = service{"offloaded", 12, tcpPort, echoPort}
	plain     = service{"plain", 13, tcpPort, echoPort} // claimed by nobody
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

// newTown builds it, starts everything and waits until all is in force; it lasts at most as long as said.
func newTown(t *testing.T, atMost time.Duration, agentFlags ...string) *town {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), atMost)
	t.Cleanup(cancel)
	w := &town{Lab: labtest.New(t, lab.Config{NodeName: "town-1"}), t: t, ctx: ctx}
	w.client = w.pod("client", true)
	w.servers = []*lab.Pod{w.server("a"), w.server("b")}
	w.must(w.WriteXDS("clusters", lab.Cluster("web").WithIdleTimeout("1s"), lab.Cluster("echo")))
	w.must(w.WriteXDS("routes", lab.Routes("web", lab.Route{Retry: true, Clusters: []lab.Weight{{Cluster: "web", Weight: 1}}})))
	echo := []lab.Weight{{Cluster: "echo", Weight: 1}}
	w.must(w.WriteXDS("listeners", lab.HTTPListener("web", "web", web.addrs()...),
		lab.TCPListener("proxied", echo, "/dev/null", proxied.addrs()...), lab.TCPListener("offloaded", echo, "", offloaded.addrs()...)))
	w.serveBy(w.servers...)
	w.startControl()
	w.agent = w.startAgent(agentFlags...)
	w.rest = w.atRest()
	return w
}

func (w *town) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// pod adds one with an address of each family.
func (w *town) pod(name string, enrolled bool) *lab.Pod {
	w.t.Helper()
	w.built++
	n := strconv.Itoa(2 + w.built%250)
	spec := lab.PodSpec{Namespace: "town", Name: name + "-" + strconv.Itoa(w.built),
		Addrs: []netip.Addr{netip.MustParseAddr("10.77.0." + n), netip.MustParseAddr("fd77::" + n)}}
	if enrolled {
		spec.Labels = map[string]string{"sockmesh.io/enroll": "true"}
	}
	p, err := w.AddPod(spec)
	w.must(err)
	return p
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
	for _, s := range []service{web, proxied, offloaded, plain} {
		spec := lab.ServiceSpec{Namespace: "town", Name: s.name, Port: s.port, TargetPort: s.target, Backends: pods}
		for _, a := range s.addrs() {
			spec.ClusterIPs = append(spec.ClusterIPs, a.Addr())
		}
		w.must(w.SetService(spec))
	}
	endpoints := func(port uint16) (out []netip.AddrPort) {
		for i, p := range pods {
			out = append(out, netip.AddrPortFrom(p.Addrs[i%2], port)) // both families
		}
		return out
	}
	w.must(w.WriteXDS("endpoints", lab.Endpoints("web", endpoints(webPort)...)))
	// The kernel can't send an IPv4 socket to an IPv6 endpoint, so the TCP clusters have both of each pod.
	var both []netip.AddrPort
	for _, p := range pods {
		for _, a := range p.Addrs {
			both = append(both, netip.AddrPortFrom(a, echoPort))
		}
	}
	w.must(w.WriteXDS("endpoints-echo", lab.Endpoints("echo", both...)))
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
	agent, err := w.StartAgent(w.ctx, flags...)
	w.must(err)
	w.must(w.WaitStatus(w.ctx, "the town's configuration", func(s lab.Status) bool {
		return s.XDS.Resources["listener"] == 3 && s.XDS.Resources["cluster"] == 2 && s.XDS.Resources["endpoint"] == 2 &&
			s.Kubernetes.Services >= 4 && s.Pods.Enrolled >= 1 && len(s.Datapath.Errors) == 0
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
