package kubeproxy

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// devices are what a node's network devices have.
type devices []netip.Addr

func (d devices) InterfaceAddrs() ([]net.Addr, error) {
	var out []net.Addr
	for _, ip := range d {
		out = append(out, &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())})
	}
	return out, nil
}

// TestNodePortAddressesAgree: --nodeport-addresses chooses as kube-proxy's does. On purpose otherwise: loopback addresses
// only where they are asked for, because they are served to the host alone; no link-local ones, which say nothing without
// their device.
func TestNodePortAddressesAgree(t *testing.T) {
	all := []string{"127.0.0.1", "127.0.0.2", "::1", "192.0.2.1", "192.0.2.200", "10.0.0.1", "169.254.1.1", "fe80::1", "2001:db8::1", "fd00::1"}
	ranges := []string{"0.0.0.0/0", "::/0", "192.0.2.0/25", "10.0.0.0/8", "127.0.0.0/8", "127.0.0.2/32", "fd00::/8", "2001:db8::/32", "::1/128"}
	for seed := range uint64(20_000) {
		r := rand.New(rand.NewPCG(seed, 3))
		r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		r.Shuffle(len(ranges), func(i, j int) { ranges[i], ranges[j] = ranges[j], ranges[i] })
		var have devices
		for _, ip := range all[:r.IntN(len(all)+1)] {
			have = append(have, netip.MustParseAddr(ip))
		}
		setting := ranges[:1+r.IntN(3)]
		a, err := service.ParseNodePortAddresses(strings.Join(setting, ","))
		if err != nil {
			t.Fatal(err)
		}
		var want []netip.Addr
		for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
			ips, err := proxyutil.NewNodePortAddresses(family, setting).GetNodeIPs(have)
			if err != nil {
				t.Fatal(err)
			}
			for _, ip := range ips {
				addr, _ := netip.AddrFromSlice(ip)
				addr = addr.Unmap()
				asked := slices.ContainsFunc(setting, func(s string) bool {
					p := netip.MustParsePrefix(s)
					return p.Addr().IsLoopback() && p.Contains(addr)
				})
				if !addr.IsLinkLocalUnicast() && (!addr.IsLoopback() || asked) {
					want = append(want, addr)
				}
			}
		}
		slices.SortFunc(want, netip.Addr.Compare)
		if got := a.Choose(nil, have); !slices.Equal(got, want) {
			t.Fatalf("seed %d: %v of %v: got %v, want %v", seed, setting, have, got, want)
		}
	}
}
