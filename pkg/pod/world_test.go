package pod

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The main goroutine keeps the process's first thread, so that makeNetns, which throws threads away, never gets it.
func init() { runtime.LockOSThread() }

// world is a node for tests: a netns folder, and a namespace for the node's ends of the pods' veth pairs. A pair dies
// with either of its namespaces, so a pod's end in the node tells whether the kernel has really freed the pod's.
type world struct {
	t    *testing.T
	dir  string
	node *os.File
}

// newWorld fails the test where there is no privilege to make namespaces.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	w.node = makeNetns(t, func() error { return nil })
	t.Cleanup(func() { _ = w.node.Close() })
	return w
}

// makeNetns makes a namespace, runs setup inside, and gives a descriptor.
func makeNetns(t *testing.T, setup func() error) *os.File {
	t.Helper()
	type result struct {
		file *os.File
		err  error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // Never unlocked: the thread ends with this goroutine.
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{nil, fmt.Errorf("unshare network namespace (these tests need root): %w", err)}
			return
		}
		err := setup()
		file, openErr := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			err = openErr
		}
		made <- result{file, err}
	}()
	r := <-made
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.file
}

// podNet says what a pod's namespace is made of.
type podNet struct {
	addrs  []string // on eth0
	loDown bool
	noIPv6 bool
	veth   string // the node's end; empty: eth0 is a bridge, which needs none
}

// make makes a namespace that is in no folder yet.
func (w *world) make(p podNet) *os.File {
	w.t.Helper()
	return makeNetns(w.t, func() error {
		if p.noIPv6 {
			for _, dev := range []string{"all", "default", "lo"} {
				if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+dev+"/disable_ipv6", []byte("1"), 0o644); err != nil {
					return err
				}
			}
		}
		if !p.loDown {
			if err := linkUp("lo"); err != nil {
				return err
			}
		}
		if len(p.addrs) == 0 {
			return nil
		}
		var device netlink.Link = &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}}
		if p.veth != "" {
			device = &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: p.veth, PeerNamespace: netlink.NsFd(w.node.Fd())}
		}
		if err := netlink.LinkAdd(device); err != nil {
			return fmt.Errorf("add eth0: %w", err)
		}
		for _, a := range p.addrs {
			if err := addAddr(a); err != nil {
				return err
			}
		}
		return linkUp("eth0")
	})
}

// pod makes a namespace and puts it into the folder as `ip netns add` does: the file first, then the mount.
func (w *world) pod(name string, p podNet) {
	w.t.Helper()
	ns := w.make(p)
	defer ns.Close()
	w.touch(name)
	w.mount(name, ns)
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) touch(name string) {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), nil, 0o444); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) mount(name string, ns *os.File) {
	w.t.Helper()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), w.path(name), "none", unix.MS_BIND, ""); err != nil {
		w.t.Fatal(err)
	}
	path := w.path(name)
	w.t.Cleanup(func() {
		_ = unix.Unmount(path, unix.MNT_DETACH)
		_ = os.Remove(path)
	})
}

// remove takes a namespace out of the folder as `ip netns del` does.
func (w *world) remove(name string) {
	w.t.Helper()
	if err := unix.Unmount(w.path(name), unix.MNT_DETACH); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Remove(w.path(name)); err != nil {
		w.t.Fatal(err)
	}
}

// in runs f inside a namespace of the folder.
func (w *world) in(name string, f func() error) {
	w.t.Helper()
	ns, err := os.Open(w.path(name))
	if err != nil {
		w.t.Fatal(err)
	}
	defer ns.Close()
	if err := OpenInNetns(ns, f); err != nil {
		w.t.Fatal(err)
	}
}

// veths counts the pods' ends in the node.
func (w *world) veths() int {
	w.t.Helper()
	h, err := netlink.NewHandleAt(netns.NsHandle(int(w.node.Fd())), unix.NETLINK_ROUTE)
	if err != nil {
		w.t.Fatal(err)
	}
	defer h.Close()
	links, err := h.LinkList()
	for tries := 0; errors.Is(err, netlink.ErrDumpInterrupted) && tries < 100; tries++ { // links come and go meanwhile
		links, err = h.LinkList()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	n := 0
	for _, l := range links {
		if l.Type() == "veth" {
			n++
		}
	}
	return n
}

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func addAddr(addr string) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	ip, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	if nl.GetIPFamily(ip.IP) == unix.AF_INET6 {
		ip.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(link, ip)
}

// witness is a Handler that keeps the contract: it closes what it was given when the pod is gone.
type witness struct {
	t    *testing.T
	mu   sync.Mutex
	pods map[string]*seen
	log  []string
	owns map[uint64]string // namespace cookie -> UID: never two pods in one
}

type seen struct {
	Pod
	files     []*os.File
	listeners []int
}

func newWitness(t *testing.T) *witness {
	return &witness{t: t, pods: map[string]*seen{}, owns: map[uint64]string{}}
}

func (w *witness) PodReady(p Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, "ready "+p.UID)
	if (p.Netns != nil) != (len(p.Listeners) > 0) {
		w.t.Errorf("pod %s: Netns and Listeners must come together: %v, %v", p.UID, p.Netns, p.Listeners)
	}
	if other := w.owns[p.Cookie]; other != "" && other != p.UID {
		w.t.Errorf("pods %s and %s in one namespace at a time", other, p.UID)
	}
	s := w.pods[p.UID]
	if s == nil {
		s = &seen{}
		w.pods[p.UID] = s
	} else if s.Cookie != p.Cookie {
		w.t.Errorf("pod %s moved between namespaces without PodGone", p.UID)
	}
	w.owns[p.Cookie] = p.UID
	s.Pod = p
	if p.Netns != nil && len(s.files) > 0 {
		w.t.Errorf("pod %s was given its listeners twice", p.UID)
	}
	if p.Netns != nil {
		s.files = append(s.files, p.Netns)
	}
	s.listeners = append(s.listeners, p.Listeners...)
}

func (w *witness) PodGone(uid string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, "gone "+uid)
	s := w.pods[uid]
	if s == nil {
		w.t.Errorf("PodGone(%s) without PodReady", uid)
		return
	}
	delete(w.pods, uid)
	delete(w.owns, s.Cookie)
	s.close()
}

func (s *seen) close() {
	for _, f := range s.files {
		_ = f.Close()
	}
	for _, fd := range s.listeners {
		_ = unix.Close(fd)
	}
}

// get gives a pod as it was announced last.
func (w *witness) get(uid string) (seen, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.pods[uid]
	if s == nil {
		return seen{}, false
	}
	return *s, true
}

func (w *witness) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.pods)
}

func (w *witness) closeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.pods {
		s.close()
	}
}

// eventually waits for what must become true; the deadline is there for a test that hangs, it measures nothing.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not seen: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func spec(uid string, ips ...string) Spec {
	s := Spec{UID: uid, Namespace: "default", Name: uid, ServiceAccount: "default", Enrolled: true}
	for _, ip := range ips {
		s.IPs = append(s.IPs, netip.MustParseAddr(ip))
	}
	return s
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }
