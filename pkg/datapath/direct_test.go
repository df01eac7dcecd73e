package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// Clients outside that use a backend's own address, from the port of a connection through a frontend: bpf/direct.h.

// from makes a socket use a port that others of its namespace use as well, towards other addresses.
func (n *ns) from(network string, v4 bool, port uint16) dialOption {
	return func(d *net.Dialer) {
		if network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(ap(n.addr(v4), port))
		} else {
			d.LocalAddr = net.TCPAddrFromAddrPort(ap(n.addr(v4), port))
		}
		d.Control = control(option(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	}
}

// TestOnePortToAFrontendAndToTheBackendItself: a client uses one port for a node port and, where pods can be reached from
// outside, for the address of the pod that serves it. Neither connection gets what is the other's, whichever was first.
func TestOnePortToAFrontendAndToTheBackendItself(t *testing.T) {
	o := newOuter(t)
	pods := []*ns{serving(o.pod()), serving(o.routed())}
	d := o.open()
	synced(t, d)
	port := uint16(41000)
	bothFamilies(t, func(t *testing.T, v4 bool) {
		front := choose(v4, node4, node6)
		for _, local := range []bool{false, true} {
			for _, directFirst := range []bool{false, true} {
				for i, pod := range pods {
					offer(t, d, front, service.External{Local: local}, v4, pod)
					t.Run(fmt.Sprintf("TCP, local %v, direct first %v, pod %d", local, directFirst, i), func(t *testing.T) {
						port++
						addrs := []netip.AddrPort{ap(front, 30080), ap(pod.addr(v4), 8080)}
						if directFirst {
							addrs[0], addrs[1] = addrs[1], addrs[0]
						}
						var open []*net.TCPConn
						for _, to := range addrs {
							c, err := o.client.dial(to, o.client.from("tcp", v4, port))
							if err != nil {
								t.Fatal(to, err)
							}
							defer c.Close()
							if _, err := greeting(c); err != nil {
								t.Fatal(to, err)
							}
							open = append(open, c)
							for _, c := range open {
								echo(t, c, 10_000)
							}
						}
						for range 3 {
							for _, c := range open {
								echo(t, c, 1000)
							}
						}
					})
					t.Run(fmt.Sprintf("UDP, local %v, direct first %v, pod %d", local, directFirst, i), func(t *testing.T) {
						port++
						addrs := []netip.AddrPort{ap(front, 30080), ap(pod.addr(v4), 5353)}
						if directFirst {
							addrs[0], addrs[1] = addrs[1], addrs[0]
						}
						var open []*net.UDPConn
						for _, to := range addrs {
							c, err := o.client.dialUDP(to, o.client.from("udp", v4, port))
							must(t, err)
							defer c.Close()
							open = append(open, c)
							for range 3 {
								for _, c := range open {
									c.SetReadDeadline(time.Now().Add(10 * time.Second))
									if _, err := sayHello(c); err != nil {
										t.Fatal(c.RemoteAddr(), err)
									}
								}
							}
						}
					})
				}
			}
		}
	})
	direct := 0
	must(t, eachEntry(d.objs.nat(), func(_ natKey, v natValue) {
		if v.Flags&natDirect != 0 {
			direct++
		}
	}))
	if direct < 32 {
		t.Errorf("%d direct connections have got entries of their own, of 32", direct)
	}
	o.say(d)
}
