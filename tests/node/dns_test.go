package node

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
)

// A real DNS server (dnsmasq) behind a Service with UDP and TCP port 53, and the resolvers that applications have:
// glibc (connected UDP), Go (connected UDP, a socket for each look-up), and sendto on one socket for all look-ups, which takes
// answers only from whom it asked, as musl does. Backends are replaced, hang and are killed under load.
//
//	kubernetes.md                                 here
//	UDP pinned to a dead CoreDNS pod              TestNoLookUpIsLostBeyondThoseInFlight
//	preserve UDP across the proxy's restart       TestDNSOutlivesTheAgent
//	IPv4 and IPv6, TCP and UDP, pods and host     TestEveryResolverReachesTheDNSService

const (
	dnsName   = "answer.sockmesh.test"
	dnsAnswer = "192.0.2.53"
)

// dnsClient is the environment that makes this binary a resolver: its value is a dnsLoad as JSON.
const dnsClient = "SOCKMESH_TEST_DNS"

// dnsLoad is what a resolver does.
type dnsLoad struct {
	Kind   string // sendto, go
	Server netip.AddrPort
	// Mapped: an AF_INET6 socket that sends to a v4-mapped address.
	Mapped bool
	// Report is the file that the figures are written to after each look-up.
	Report string
}

// dnsReport is how it went.
type dnsReport struct {
	Answered int
	Lost     []lostLookUp
}

// lostLookUp is one that got no answer.
type lostLookUp struct {
	Began time.Time
	Error string
}

// mainIfDNS never returns in a process that startDNS made.
func mainIfDNS() {
	text := os.Getenv(dnsClient)
	if text == "" {
		return
	}
	var l dnsLoad
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, l.run())
	os.Exit(1)
}

// lookUpTimeout is long for a machine that does much else, and what a lost look-up costs.
const lookUpTimeout = 3 * time.Second

func (l dnsLoad) run() error {
	look := l.goResolver()
	if l.Kind == "sendto" {
		s, err := newSender(l)
		if err != nil {
			return err
		}
		look = s.look
	}
	var r dnsReport
	for {
		began := time.Now()
		if err := look(); err != nil {
			r.Lost = append(r.Lost, lostLookUp{began, err.Error()})
		} else {
			r.Answered++
		}
		text, err := json.Marshal(r)
		if err == nil {
			err = os.WriteFile(l.Report+".new", text, 0o644)
		}
		if err == nil {
			err = os.Rename(l.Report+".new", l.Report)
		}
		if err != nil {
			return err
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// goResolver looks up as a Go program does: connected UDP, its own retries.
func (l dnsLoad) goResolver() func() error {
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, l.Server.String())
	}}
	return func() error {
		addrs, err := r.LookupHost(context.Background(), dnsName)
		if err == nil && (len(addrs) != 1 || addrs[0] != dnsAnswer) {
			err = fmt.Errorf("wrong answer %v", addrs)
		}
		return err
	}
}

// sender has one unconnected socket for all look-ups, and no retries.
type sender struct {
	fd int
	to unix.Sockaddr
	is netip.AddrPort
	id uint16
}

func newSender(l dnsLoad) (*sender, error) {
	s := &sender{is: l.Server}
	family := unix.AF_INET
	s.to = &unix.SockaddrInet4{Port: int(l.Server.Port()), Addr: [4]byte(l.Server.Addr().AsSlice()[:4])}
	if l.Mapped || l.Server.Addr().Is6() {
		family = unix.AF_INET6
		s.to = &unix.SockaddrInet6{Port: int(l.Server.Port()), Addr: l.Server.Addr().As16()}
	}
	var err error
	if s.fd, err = unix.Socket(family, unix.SOCK_DGRAM, 0); err != nil {
		return nil, err
	}
	return s, nil
}

// question asks for dnsName's A record.
func question(id uint16) []byte {
	m := binary.BigEndian.AppendUint16(nil, id)
	m = append(m, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	for label := range strings.SplitSeq(dnsName, ".") {
		m = append(append(m, byte(len(label))), label...)
	}
	return append(m, 0, 0, 1, 0, 1)
}

// look fails when no answer to this question comes from the address that was asked.
func (s *sender) look() error {
	s.id++
	if err := unix.Sendto(s.fd, question(s.id), 0, s.to); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	deadline := time.Now().Add(lookUpTimeout)
	b := make([]byte, 1500)
	for {
		left := unix.NsecToTimeval(max(time.Until(deadline), time.Millisecond).Nanoseconds())
		if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &left); err != nil {
			return err
		}
		n, from, err := unix.Recvfrom(s.fd, b, 0)
		if err == unix.EINTR { // a signal of Go's scheduler
			if !time.Now().Before(deadline) {
				return errors.New("no answer in time")
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if sender := addressOf(from); sender != s.is {
			return fmt.Errorf("asked %v, and %v answers", s.is, sender)
		}
		if n > 12 && binary.BigEndian.Uint16(b) == s.id {
			if want := netip.MustParseAddr(dnsAnswer).As4(); string(b[n-4:n]) != string(want[:]) && !strings.Contains(string(b[:n]), string(want[:])) {
				return errors.New("wrong answer")
			}
			return nil
		}
		if !time.Now().Before(deadline) {
			return errors.New("no answer in time")
		}
	}
}

func addressOf(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// dnsWorld is a node with a DNS Service.
type dnsWorld struct {
	*world
	vips    []netip.AddrPort
	servers map[string]*lab.Process // by pod
	pods    []*lab.Pod
	made    int

	resolvers int
}

func newDNSWorld(t *testing.T, servers int) *dnsWorld {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	t.Cleanup(cancel)
	l := labtest.New(t, lab.Config{NodeName: "worker-7"})
	w := &dnsWorld{world: &world{Lab: l, t: t, ctx: ctx}, servers: map[string]*lab.Process{}}
	for _, vip := range anywhere.vips {
		w.vips = append(w.vips, netip.AddrPortFrom(netip.MustParseAddr(vip), 53))
	}
	w.client = w.pod(anywhere, "client", 20, nil)
	for range servers {
		w.pods = append(w.pods, w.dnsServer())
	}
	w.publish()
	var err error
	w.control, err = w.StartControl(ctx)
	w.must(err)
	w.start()
	return w
}

func (w *dnsWorld) start() {
	w.t.Helper()
	var err error
	w.agent, err = w.StartAgent(w.ctx)
	w.must(err)
	w.must(w.WaitStatus(w.ctx, "the DNS Service", func(s lab.Status) bool { return s.Kubernetes.Synced && s.Kubernetes.Services >= 1 }))
}

// dnsServer is a pod with a dnsmasq that knows one name.
func (w *dnsWorld) dnsServer() *lab.Pod {
	w.t.Helper()
	w.made++
	pod := w.pod(anywhere, fmt.Sprint("dns", w.made), 30+w.made, nil)
	proc, err := pod.Start("dnsmasq", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=",
		"--no-resolv", "--no-hosts", "--log-facility=-", "--host-record="+dnsName+","+dnsAnswer)
	w.must(err)
	w.must(pod.WaitListening(w.ctx, proc, 53))
	w.servers[pod.PodSpec.Name] = proc
	return pod
}

// publish writes the Service and its slices.
func (w *dnsWorld) publish() {
	w.t.Helper()
	yes, node := true, "worker-7"
	ports := map[string]corev1.Protocol{"dns": corev1.ProtocolUDP, "dns-tcp": corev1.ProtocolTCP}
	svc := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "dns", UID: "dns"},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: w.vips[0].Addr().String(),
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}},
	}
	var slicePorts []discoveryv1.EndpointPort
	for name, proto := range ports {
		port := int32(53)
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: name, Protocol: proto, Port: port, TargetPort: intstr.FromInt32(port)})
		slicePorts = append(slicePorts, discoveryv1.EndpointPort{Name: &name, Protocol: &proto, Port: &port})
	}
	objects := []any{svc}
	for i, kind := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, w.vips[i].Addr().String())
		slice := &discoveryv1.EndpointSlice{
			TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: fmt.Sprint("dns-", i),
				Labels: map[string]string{discoveryv1.LabelServiceName: "dns"}},
			AddressType: kind, Ports: slicePorts, Endpoints: []discoveryv1.Endpoint{},
		}
		for _, p := range w.pods {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{p.Addrs[i].String()}, NodeName: &node,
				Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes}})
		}
		objects = append(objects, slice)
	}
	w.must(w.WriteManifest("dns", objects...))
}

// resolver starts look-ups without end in a place.
func (w *dnsWorld) resolver(from *lab.Place, l dnsLoad) *dnsLoad {
	w.t.Helper()
	exe, err := os.Executable()
	w.must(err)
	w.resolvers++
	l.Report = filepath.Join(w.Dir, "tmp", fmt.Sprint("resolver-", w.resolvers, ".json")) // the lab removes it after the resolver
	text, err := json.Marshal(l)
	w.must(err)
	_, err = from.Start("resolver", "env", dnsClient+"="+string(text), exe)
	w.must(err)
	return &l
}

func (w *dnsWorld) report(l *dnsLoad) dnsReport {
	var r dnsReport
	if text, err := os.ReadFile(l.Report); err == nil {
		w.must(json.Unmarshal(text, &r))
	}
	return r
}

// more waits until each of the resolvers has been answered n more times.
func (w *dnsWorld) more(n int, loads ...*dnsLoad) {
	w.t.Helper()
	for _, l := range loads {
		target := w.report(l).Answered + n
		w.eventually(fmt.Sprintf("%d more answers for %+v", n, *l), func() error {
			if r := w.report(l); r.Answered < target {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
	}
}

// everyResolver is one of each kind, in a pod and in the host's namespace.
func (w *dnsWorld) everyResolver() []*dnsLoad {
	var loads []*dnsLoad
	for _, from := range []*lab.Place{&w.client.Place, w.Node} {
		for _, vip := range w.vips {
			loads = append(loads, w.resolver(from, dnsLoad{Kind: "sendto", Server: vip}), w.resolver(from, dnsLoad{Kind: "go", Server: vip}))
		}
		loads = append(loads, w.resolver(from, dnsLoad{Kind: "sendto", Server: w.vips[0], Mapped: true}))
	}
	return loads
}

// getent resolves by glibc, which reads its name server from a resolv.conf that only it sees.
func (w *dnsWorld) getent(from *lab.Place, server netip.AddrPort, options string) (string, error) {
	conf := filepath.Join(w.t.TempDir(), "resolv.conf")
	write(w.t, conf, fmt.Sprintf("nameserver %s\noptions timeout:5 %s\n", server.Addr(), options))
	return from.Run(w.ctx, "unshare", "--mount", "sh", "-c",
		fmt.Sprintf("mount --bind %s /etc/resolv.conf && exec getent -s hosts:dns ahostsv4 %s", conf, dnsName))
}

func TestEveryResolverReachesTheDNSService(t *testing.T) {
	w := newDNSWorld(t, 3)
	w.more(30, w.everyResolver()...)
	for name, from := range map[string]*lab.Place{"pod": &w.client.Place, "host": w.Node} {
		for _, vip := range w.vips {
			for _, options := range []string{"", "use-vc"} { // use-vc: over TCP
				out, err := w.getent(from, vip, options)
				if err != nil || !strings.Contains(out, dnsAnswer) {
					t.Errorf("%s, glibc at %v %s: %q, %v", name, vip, options, out, err)
				}
			}
		}
	}
}

// Servers end in three ways, one after another, while every resolver looks up without a pause. What can be lost is what was on
// its way to a server when that ended, and what was sent there before Kubernetes had said that it is no endpoint any more.
//
//	replaced  it leaves the Service and ends afterwards   nothing is lost
//	hangs     it answers nobody, then leaves the Service  of each resolver the look-up that hangs; a connected socket is ended
//	                                                      with it, so resolvers that try twice, as Go's does, lose none
//	killed    it refuses, then leaves the Service         as above, and Go's loses what is refused twice before it has left
//
// In all three a look-up that began when the server had left the kernel's maps is answered.
func TestNoLookUpIsLostBeyondThoseInFlight(t *testing.T) {
	w := newDNSWorld(t, 2)
	loads := w.everyResolver()
	w.more(50, loads...)
	known := map[*dnsLoad]int{} // losses that have been looked at
	for _, way := range []string{"replaced", "hangs", "killed", "hangs"} {
		old := w.pods[0]
		server := w.servers[old.PodSpec.Name]
		w.pods = append(w.pods, w.dnsServer())
		w.publish()
		w.eventually("the new server in the kernel", func() error { return w.serves(w.pods[len(w.pods)-1], true) })
		switch way {
		case "hangs":
			server.Signal(unix.SIGSTOP)
		case "killed":
			server.Kill()
		}
		w.pods = w.pods[1:]
		w.publish()
		w.eventually("the old server out of the kernel", func() error { return w.serves(old, false) })
		gone := time.Now()
		w.more(20, loads...)
		server.Kill()
		w.more(20, loads...)
		for _, l := range loads {
			r := w.report(l)
			lost := r.Lost[known[l]:]
			known[l] = len(r.Lost)
			if len(lost) > 0 {
				t.Logf("%s: %s to %v (mapped %v) lost %d", way, l.Kind, l.Server, l.Mapped, len(lost))
			}
			for _, x := range lost {
				if !x.Began.Before(gone) {
					t.Errorf("%s: %s to %v: a look-up began %v after the server had left, and was lost: %s", way, l.Kind, l.Server, x.Began.Sub(gone), x.Error)
				}
			}
			most := 1 // the one in flight
			switch {
			case way == "replaced", way == "hangs" && l.Kind == "go":
				most = 0
			case way == "killed" && l.Kind == "go":
				most = len(lost) // refused at once, so it goes on asking
			}
			if len(lost) > most {
				t.Errorf("%s: %s to %v lost %d look-ups, want %d at most; the last: %s", way, l.Kind, l.Server, len(lost), most, lost[len(lost)-1].Error)
			}
		}
	}
}

// serves tells whether the kernel's maps name a server, for either family and protocol, as wanted.
func (w *dnsWorld) serves(p *lab.Pod, want bool) error {
	view, err := datapath.OpenView(w.BPFFS())
	if err != nil {
		return err
	}
	defer view.Close()
	lines, err := view.Contents()
	if err != nil {
		return err
	}
	text := strings.Join(lines, "\n")
	for _, a := range p.Addrs {
		if addr := netip.AddrPortFrom(a, 53).String(); strings.Contains(text, addr) != want {
			return fmt.Errorf("%s in the maps: %v", addr, !want)
		}
	}
	return nil
}

// The agent is killed, DNS goes on without it; it comes back, and nothing is lost over that either.
func TestDNSOutlivesTheAgent(t *testing.T) {
	w := newDNSWorld(t, 2)
	loads := w.everyResolver()
	w.more(30, loads...)
	w.agent.Kill()
	w.more(50, loads...)
	loads = append(loads, w.everyResolver()...) // sockets that are made without an agent
	w.more(30, loads...)
	w.start()
	w.more(50, loads...)
	w.must(w.agent.Stop(40 * time.Second))
	w.more(30, loads...)
	for _, l := range loads {
		if r := w.report(l); len(r.Lost) > 0 {
			t.Errorf("%s to %v lost %d look-ups: %s", l.Kind, l.Server, len(r.Lost), r.Lost[0].Error)
		}
	}
}
