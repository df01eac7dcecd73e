package main

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// scenario is one kind of load.
type scenario struct {
	name, what string
	path       string   // of the request: the server has a body of each size
	headers    []string // of the request
}

var scenarios = []scenario{
	{"http1-small", "HTTP/1.1 keep-alive, 128 bytes", "/small", nil},
	{"http1-16k", "HTTP/1.1 keep-alive, 16 KiB", "/16k", nil},
	{"http1-1m", "HTTP/1.1 keep-alive, 1 MiB", "/1m", nil},
	{"http1-close", "HTTP/1.1, a connection per request, 128 bytes", "/small", []string{"Connection: close"}},
}

func scenarioNames() []string {
	var names []string
	for _, s := range scenarios {
		names = append(names, s.name)
	}
	return names
}

func chooseScenarios(list string) ([]scenario, error) {
	if list == "all" {
		return scenarios, nil
	}
	var chosen []scenario
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
		if i < 0 {
			return nil, fmt.Errorf("no scenario %q; there are %s", name, strings.Join(scenarioNames(), ", "))
		}
		chosen = append(chosen, scenarios[i])
	}
	return chosen, nil
}

// target is the Service address that the client calls. Only interception, of one kind or the other, makes it work.
var target = netip.MustParseAddrPort("10.96.0.10:80")

// world is the node with a client pod, in whose namespace the proxy under test listens, and a server pod.
type world struct {
	o              options
	lab            *lab.Lab
	client, server *lab.Pod
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
	return w, w.startServer(ctx)
}

// startServer runs the nginx that answers: small ones from memory, large ones from files.
func (w *world) startServer(ctx context.Context) error {
	files := filepath.Join(w.lab.Dir, "tmp", "www")
	if err := writeBodies(files, map[string]int{"16k": 16 << 10, "1m": 1 << 20}); err != nil {
		return err
	}
	body := strings.Repeat("x", 128)
	_, err := w.server.StartNginx(ctx, 8080, fmt.Sprintf(`root %s; location = /small { return 200 "%s"; }`, files, body))
	return err
}

func (w *world) backend() netip.AddrPort { return netip.AddrPortFrom(w.server.Addr4(), 8080) }

// testCase is one proxy in one place.
type testCase struct {
	proxy, path string
	// setUp starts it and returns what the client calls, the process that is the proxy (nil: none) and how to
	// undo everything.
	setUp func(context.Context) (setup, error)
}

type setup struct {
	target netip.AddrPort
	proxy  *lab.Process
	undo   func() error
}

// cases in the order in which they are measured: the alternation is the round.
func (w *world) cases(scenario) []testCase {
	all := []testCase{
		{"none", "none", w.direct},
		{"sockmesh", "sockmap", w.sockmesh("auto")},
		{"sockmesh", "connect", w.sockmesh("off")},
		{"sockmesh", "iptables", w.behindIptables(w.startBareSockmesh)},
	}
	for _, peer := range w.peers() {
		all = append(all,
			testCase{peer.name, "iptables", w.behindIptables(peer.start)},
			testCase{peer.name, "connect", w.behindHooks(peer.start, false)},
			testCase{peer.name, "sockmap", w.behindHooks(peer.start, true)},
		)
	}
	return slices.DeleteFunc(all, func(c testCase) bool { return !wanted(w.o.proxy, c.proxy) || !wanted(w.o.path, c.path) })
}

func wanted(list, name string) bool {
	return list == "" || slices.Contains(strings.Split(list, ","), name)
}

func (w *world) direct(context.Context) (setup, error) {
	return setup{target: w.backend(), undo: func() error { return nil }}, nil
}
