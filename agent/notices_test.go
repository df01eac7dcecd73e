package agent

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/hostports"
	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/service"
)

func serviceName(name string) service.Name { return service.Name{Namespace: "shop", Name: name} }

func TestAProblemIsToldOncePerProblemAndAgainWhenItCameBack(t *testing.T) {
	var told []string
	n := &notices{
		log: slog.New(slog.DiscardHandler), uid: func(n service.Name) string { return "uid-" + n.Name },
		warn: func(on kube.Ref, reason, message string) {
			told = append(told, fmt.Sprint(on.Namespace, "/", on.Name, " ", on.UID, " ", reason, ": ", message))
		},
	}
	full := map[service.Name][]notice{serviceName("web"): {{reasonMapFull, "sm_slots is full"}}}
	n.set("maps", full)
	n.set("maps", full)
	n.set("ports", map[service.Name][]notice{serviceName("web"): {{reasonPortInUse, "held"}}})
	if want := []string{"shop/web uid-web MapFull: sm_slots is full", "shop/web uid-web NodePortInUse: held"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	if got := n.of(serviceName("web")); !slices.Equal(got, []string{"sm_slots is full", "held"}) {
		t.Errorf("the Service's notes are %q", got)
	}
	n.set("maps", nil)
	if got := n.of(serviceName("web")); !slices.Equal(got, []string{"held"}) {
		t.Errorf("after room was made its notes are %q", got)
	}
	n.set("maps", full)
	if len(told) != 3 {
		t.Errorf("when the map was full again, told %q", told)
	}
}

func TestAFullMapIsOneProblemOfAServiceHoweverManyAddressesItHas(t *testing.T) {
	full := "sm_frontends is full (3 entries): raise --map-frontends"
	got := mapNotices([]datapath.EntryError{
		{Kind: "frontend", Name: "shop/web", Addr: "TCP 10.96.0.1:80", Error: full, Map: "sm_frontends"},
		{Kind: "frontend", Name: "shop/web", Addr: "TCP 10.96.0.1:443", Error: full, Map: "sm_frontends"},
		{Kind: "outside", Name: "shop/api", Addr: "TCP 10.96.0.2:80", Error: "left out"},
		{Kind: "claim", Name: "listener", Addr: "10.96.0.1:80", Error: full, Map: "sm_claims"},
	})
	if len(got) != 2 || len(got[serviceName("web")]) != 1 || got[serviceName("web")][0].reason != reasonMapFull ||
		!strings.Contains(got[serviceName("web")][0].message, "raise --map-frontends") || got[serviceName("api")][0].reason != reasonNotInForce {
		t.Errorf("%+v", got)
	}
}

func TestACollisionNamesTheProcessAndTheCure(t *testing.T) {
	addr := netip.MustParseAddrPort
	wanted := []hostAddress{
		{serviceName("web"), service.NodePort, addr("192.0.2.1:30080"), service.TCP},
		{serviceName("web"), service.NodePort, addr("[2001:db8::1]:30080"), service.TCP},
		{serviceName("ssh"), service.ExternalIP, addr("192.0.2.1:22"), service.TCP},
		{serviceName("dns"), service.NodePort, addr("192.0.2.1:30053"), service.UDP},
	}
	held := []hostports.Socket{
		{Protocol: service.TCP, Addr: addr("[::]:30080"), Dual: true, Inode: 7},
		{Protocol: service.TCP, Addr: addr("0.0.0.0:22"), Inode: 8},
		{Protocol: service.TCP, Addr: addr("0.0.0.0:30053"), Inode: 9},
	}
	got := collisions(wanted, held, func(inodes ...uint32) map[uint32]string {
		if slices.Sort(inodes); !slices.Equal(inodes, []uint32{7, 8}) {
			t.Errorf("asked for the owners of %v", inodes)
		}
		return map[uint32]string{7: "nginx (pid 812)"}
	})
	want := map[string]string{
		"web": "TCP port 30080 (NodePort) is held by a socket of nginx (pid 812): clients reach the Service, not it: end it, or give the Service another nodePort",
		"ssh": "TCP port 22 (ExternalIP) is held by a socket of a process of this node: clients reach the Service, not it: end it, or give the Service another port",
	}
	if len(got) != len(want) {
		t.Errorf("%+v", got)
	}
	for name, message := range want {
		if list := got[serviceName(name)]; len(list) != 1 || list[0].message != message {
			t.Errorf("%s: %+v", name, list)
		}
	}
}
