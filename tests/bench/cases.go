package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// target is the Service address that the client calls. Only interception, of one kind or the other, makes it work.
var target = netip.MustParseAddrPort("10.96.0.10:80")

// world is the node with a client pod, in whose namespace the proxy under test listens, and a server pod.
type world struct {
	o              options
	lab            *lab.Lab
	client, server *lab.Pod
	envoyHalf      float64 // requests/s, once known
}

func newWorld(ctx context.Context, o options) (*world, error) {
	l, err := lab.New(lab.Config{Binaries: filepath.Join(o.build, "bin")})
	if err != nil {
		return nil, err
	}
	w := &world{o: o, lab: l}
	add := func(name, addr string) *lab.Pod {
		var p *lab.Pod
		if err == nil {
			p, err = l.AddPod(lab.PodSpec{Name: name, Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Labels: map[string]string{"sockmesh.io/enroll": "true"}})
		}
		return p
	}
	w.client, w.server = add("client", "10.77.0.2"), add("server", "10.77.0.3")
	if err != nil {
		return w, err
	}
	if err := sysctl(&w.client.Place, endedConnections); err != nil {
		return w, err
	}
	return w, w.startServer(ctx)
}

// endedConnections lets the connection table of a place forget ended connections as soon as the bench needs their ports again.
// The default of two minutes fills it, or keeps ports taken, at the rate of a connection per request, and the kernel then
// drops packets: a row behind iptables would show the table and not the proxy. The ports end above those at which proxies listen.
var endedConnections = map[string]string{
	"net/ipv4/ip_local_port_range":                     "20000 65535",
	"net/netfilter/nf_conntrack_tcp_timeout_time_wait": "5",
	"net/netfilter/nf_conntrack_tcp_timeout_close":     "1",
	"net/netfilter/nf_conntrack_tcp_timeout_last_ack":  "5",
}

// startServer runs the nginx that answers, small bodies from memory, large ones from files; and the TCP server.
func (w *world) startServer(ctx context.Context) error {
	files := filepath.Join(w.lab.Dir, "tmp", "www")
	if err := writeBodies(files, map[string]int{"16k": 16 << 10, "1m": 1 << 20}); err != nil {
		return err
	}
	answer := fmt.Sprintf(`return 200 "%s";`, strings.Repeat("x", 128))
	nginx, err := w.server.StartNginx(ctx, httpPort, fmt.Sprintf(`listen %d backlog=4096; root %s; location = /small { %s } location /r { %s }`, otherPort, files, answer, answer))
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := pin(serverRole, nginx); err != nil {
		return err
	}
	echo, err := w.server.Start("tcp-server", pinned(serverRole, self, "tcp-server")...)
	if err != nil {
		return err
	}
	return w.server.WaitListening(ctx, echo, tcpPort)
}

// httpPort is where the server listens; where a second endpoint comes and goes, that is the same server at otherPort.
const httpPort, otherPort = 8080, 8081

func (w *world) backend(s scenario) netip.AddrPort {
	port := uint16(httpPort)
	if s.tcp {
		port = tcpPort
	}
	return netip.AddrPortFrom(w.server.Addr4(), port)
}

// testCase is one proxy in one place. Cases of one scenario that share both differ by variant ("2 loops"), and by what they
// change in the scenario.
type testCase struct {
	proxy, path, variant string
	setUp                setUp
	change               func(*scenario)
	services             int // present in the cluster, where that is what differs
}

func (c testCase) String() string {
	name := c.proxy + " by " + c.path
	if c.variant != "" {
		name += ", " + c.variant
	}
	return name
}

// as is the case as a variant.
func (c testCase) as(variant string, change func(*scenario)) testCase {
	c.variant, c.change = variant, change
	return c
}

// setUp starts a case.
type setUp func(context.Context, scenario) (setup, error)

// setup is a case that runs: what the client calls, the process that is the proxy (nil: none), what the kernel did with
// the connections meanwhile (nil: no hooks of ours), how many objects the proxy has allocated and the number of its
// configuration (nil: it does not say), how to undo it all.
type setup struct {
	target  netip.AddrPort
	proxy   *lab.Process
	kernel  func(context.Context) (kernelCounts, error)
	mallocs func(context.Context) (float64, error)
	version func(context.Context) (float64, error)
	undo    func() error
}

// kernelCounts prove that a case measured what its name says.
type kernelCounts struct {
	taken              uint64 // connections that the hooks sent to the proxy, or chose an endpoint for
	redirected, passed uint64 // bytes from socket to socket, and by TCP
	aside, asideBytes  uint64 // connections that skipped the proxy, and the bytes that did, which are among the redirected ones
}

// asideShares are the part of the proxy's connections that skipped it, and of the bytes. A byte that does is sent once, one
// that goes through the proxy twice.
func (k kernelCounts) asideShares() (connections, bytes float64) {
	through := (k.redirected + k.passed - k.asideBytes) / 2
	return float64(k.aside) / float64(max(1, k.taken)), float64(k.asideBytes) / float64(max(1, k.asideBytes+through))
}

// share is the part of the bytes that went from socket to socket.
func (k kernelCounts) share() float64 {
	return float64(k.redirected) / float64(max(1, k.redirected+k.passed))
}

// prove returns an error if the connections did not take the path of the case. Not all bytes need be redirected: a
// direction whose reader is slow goes back to TCP.
func (k kernelCounts) prove(path string) error {
	switch {
	case k.taken == 0:
		return errors.New("the hooks saw no connection")
	case path == "sockmap" && k.redirected == 0:
		return errors.New("not a byte went from socket to socket")
	case path == "connect" && k.redirected > 0:
		return fmt.Errorf("%d bytes went from socket to socket", k.redirected)
	}
	return nil
}

// allCases is every proxy on every path, in the order in which they are measured: the alternation is the round.
func (w *world) allCases() []testCase {
	all := []testCase{
		{proxy: "none", path: "none", setUp: w.direct},
		{proxy: "none", path: "connect", setUp: w.throughKernel(false)},
		{proxy: "none", path: "sockmap", setUp: w.throughKernel(true)},
		{proxy: "sockmesh", path: "sockmap", setUp: w.sockmesh("auto")},
		{proxy: "sockmesh-epoll", path: "sockmap", setUp: w.sockmesh("auto", "--io=epoll")},
		{proxy: "sockmesh", path: "connect", setUp: w.sockmesh("off")},
		{proxy: "sockmesh", path: "iptables", setUp: w.behindIptables(w.startBareSockmesh)},
	}
	for _, peer := range w.peers() {
		all = append(all,
			testCase{proxy: peer.name, path: "iptables", setUp: w.behindIptables(peer.start)},
			testCase{proxy: peer.name, path: "connect", setUp: w.behindHooks(peer.start, false)},
			testCase{proxy: peer.name, path: "sockmap", setUp: w.behindHooks(peer.start, true)},
		)
	}
	return all
}

// cases are those of the scenario that the command line wants.
func (w *world) cases(s scenario) []testCase {
	all := w.allCases()
	if s.cases != nil {
		all = s.cases(all)
	}
	return slices.DeleteFunc(all, func(c testCase) bool { return !wanted(w.o.proxy, c.proxy) || !wanted(w.o.path, c.path) })
}

// only keeps the cases that are named as PROXY/PATH.
func only(names ...string) func([]testCase) []testCase {
	return func(all []testCase) []testCase {
		return slices.DeleteFunc(all, func(c testCase) bool { return !slices.Contains(names, c.proxy+"/"+c.path) })
	}
}

func wanted(list, name string) bool {
	return list == "" || slices.Contains(strings.Split(list, ","), name)
}

func (w *world) direct(_ context.Context, s scenario) (setup, error) {
	return setup{target: w.backend(s), undo: func() error { return nil }}, nil
}
