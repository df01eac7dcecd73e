package canary

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

func newCanary(t *testing.T) *Canary {
	t.Helper()
	c, err := New(15001, func(int) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, fd := range c.Listeners {
			_ = unix.Close(fd)
		}
		_ = c.Close()
	})
	return c
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestTheCanaryHasANamespaceOfItsOwnWithListeners(t *testing.T) {
	a, b := newCanary(t), newCanary(t)
	if a.Cookie == 0 || a.Cookie == b.Cookie {
		t.Errorf("cookies %d and %d", a.Cookie, b.Cookie)
	}
	var want []string
	for _, fd := range a.Listeners {
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			want = append(want, netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String())
		case *unix.SockaddrInet6:
			want = append(want, netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)).String())
		}
	}
	if !slices.Contains(want, "127.0.0.1:15001") || len(a.IPs) != len(a.Listeners) {
		t.Errorf("listeners %v, addresses %v", want, a.IPs)
	}
}

func TestWithoutHooksTheConnectionGoesNowhereAndSaysSo(t *testing.T) {
	c := newCanary(t)
	_, err := c.Check(t.Context())
	if err == nil || !strings.Contains(err.Error(), "not redirected") || !strings.Contains(err.Error(), "--cgroup-root") {
		t.Fatalf("got %v", err)
	}
	before := openFiles(t)
	for range 100 {
		_, _ = c.Check(t.Context())
	}
	// The thread that was in the namespace closes its last descriptor just after it has answered.
	after := openFiles(t)
	for end := time.Now().Add(10 * time.Second); after > before && time.Now().Before(end); after = openFiles(t) {
		time.Sleep(time.Millisecond)
	}
	if after > before {
		t.Errorf("%d descriptors became %d", before, after)
	}
}

func TestTheListenerAnswersNobodyElse(t *testing.T) {
	c := newCanary(t)
	s := mesh.NewSnapshot(1, []*mesh.Listener{c.Listener}, nil)
	if n := len(s.Claims()); n != 2 {
		t.Errorf("%d claims, expected one of each family", n)
	}
	for _, claim := range s.Claims() {
		if claim.Offload != nil {
			t.Error("the canary must go through the proxy")
		}
	}
	for src, allowed := range map[string]bool{"192.0.2.20:1": true, "10.0.0.1:1": false, "192.0.2.21:1": false} {
		from := netip.MustParseAddrPort(src)
		chain := c.Listener.Chain(&mesh.ChainInput{Dst: target4, Src: from, DirectSrc: from.Addr(), Transport: "raw_buffer"})
		if (chain != nil) != allowed {
			t.Errorf("%s: chain %v", src, chain)
		}
	}
	if chain := c.Listener.Chain(&mesh.ChainInput{Dst: target6, Src: netip.MustParseAddrPort("[fd00::1]:1"), Transport: "raw_buffer"}); chain != nil {
		t.Error("another pod is answered over IPv6")
	}
}
