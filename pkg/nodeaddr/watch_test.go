package nodeaddr

import (
	"context"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNewNamespace runs a test on a thread of its own network namespace. The thread ends with the test: nobody else may get
// it.
func inNewNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func device(t *testing.T, name string) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "peer-" + name}))
	l, err := netlink.LinkByName(name)
	must(t, err)
	must(t, netlink.LinkSetUp(l))
	return l
}

func address(t *testing.T, text string) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(text)
	must(t, err)
	a.Flags = unix.IFA_F_NODAD
	return a
}

func TestAddressesAreFollowedAsTheyComeAndGo(t *testing.T) {
	inNewNamespace(t)
	eth := device(t, "eth0")
	must(t, netlink.AddrAdd(eth, address(t, "192.0.2.1/24")))

	// The watch runs on this thread, because its namespace is this thread's; the changes are made through a handle.
	handle, err := netlink.NewHandle()
	must(t, err)
	defer handle.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	steps := []struct {
		change func() error
		want   []string // beside link-local ones, which the kernel gives in its own time
	}{
		{func() error { return handle.AddrAdd(eth, address(t, "2001:db8::1/64")) }, []string{"192.0.2.1"}},
		{func() error { return handle.AddrAdd(eth, address(t, "192.0.2.7/32")) }, []string{"192.0.2.1", "2001:db8::1"}},
		{func() error { return handle.AddrDel(eth, address(t, "192.0.2.1/24")) }, []string{"192.0.2.1", "192.0.2.7", "2001:db8::1"}},
		{func() error { return handle.LinkDel(eth) }, []string{"192.0.2.7", "2001:db8::1"}},
		{func() error { cancel(); return nil }, nil},
	}
	at := 0
	must(t, Watch(ctx, slog.New(slog.DiscardHandler), func(list []netip.Addr) {
		var got []string
		for _, ip := range list {
			if !ip.IsLinkLocalUnicast() && !ip.IsLoopback() {
				got = append(got, ip.String())
			}
		}
		if at < len(steps) && slices.Equal(got, steps[at].want) {
			at++
			if err := steps[at-1].change(); err != nil {
				t.Error(err)
			}
		}
	}))
	if at != len(steps) {
		t.Fatalf("after step %d its addresses %v were not seen", at, steps[at].want)
	}
}

func TestAddressesOfIPVSAreNotTheNodes(t *testing.T) {
	inNewNamespace(t)
	must(t, netlink.AddrAdd(device(t, "eth0"), address(t, "192.0.2.1/24")))
	must(t, netlink.AddrAdd(device(t, ipvsDevice), address(t, "10.96.0.1/32")))
	list, err := List()
	must(t, err)
	if !slices.Contains(list, netip.MustParseAddr("192.0.2.1")) || slices.Contains(list, netip.MustParseAddr("10.96.0.1")) {
		t.Errorf("the node's addresses are %v", list)
	}
}
