package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/agent/describe"
	"github.com/sockmesh/sockmesh/pkg/hostports"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// The host's sockets are looked at when Services' ports have changed, a moment later because such changes come together, and
// every now and then because sockets come and go by themselves.
const (
	portsSettle = time.Second
	portsEvery  = 30 * time.Second
)

// watchPorts tells of node ports that a socket of the host holds. The Service wins; the process behind the socket waits
// for clients that don't come, and nobody would know why.
func (a *Agent) watchPorts(ctx context.Context) error {
	broken := false
	wait := time.NewTimer(portsSettle)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.objects.portsChanged:
			wait.Reset(portsSettle)
			continue
		case <-wait.C:
		}
		wait.Reset(portsEvery)
		wanted := a.objects.hostAddresses()
		if len(wanted) == 0 {
			a.notices.set("ports", nil)
			continue
		}
		held, err := hostports.List()
		if err != nil {
			if !broken {
				a.log.Warn("the host's sockets can't be listed: collisions with node ports go unnoticed", "error", err)
			}
			broken = true
			continue
		}
		broken = false
		a.notices.set("ports", collisions(wanted, held, hostports.Owners))
	}
}

// hostAddress is a Service's address that the host may have a socket on.
type hostAddress struct {
	service  service.Name
	kind     service.Kind
	addr     netip.AddrPort
	protocol service.Protocol
}

// hostAddresses are those of Services' addresses that the node itself has: all node ports, and what else is on a device.
func (o *objects) hostAddresses() []hostAddress {
	o.mu.RLock()
	defer o.mu.RUnlock()
	var out []hostAddress
	for _, svc := range o.services {
		for _, list := range [][]service.Frontend{svc.Frontends, svc.Loopback} {
			for i := range list {
				f := &list[i]
				if f.Kind == service.NodePort || f.Kind != service.ClusterIP && slices.Contains(o.devices, f.Addr.Addr()) {
					out = append(out, hostAddress{svc.Name, f.Kind, f.Addr, f.Protocol})
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b hostAddress) int {
		if c := compareNames(a.service, b.service); c != 0 {
			return c
		}
		return a.addr.Compare(b.addr)
	})
	return out
}

// collisions says who is in the way. One socket may hold a port on many addresses: that is one problem.
func collisions(wanted []hostAddress, held []hostports.Socket, owners func(...uint32) map[uint32]string) map[service.Name][]notice {
	type hit struct {
		hostAddress
		inode uint32
	}
	var hits []hit
	var inodes []uint32
	for _, w := range wanted {
		for _, s := range held {
			if !s.Holds(w.addr, w.protocol) {
				continue
			}
			known := slices.ContainsFunc(hits, func(h hit) bool {
				return h.service == w.service && h.addr.Port() == w.addr.Port() && h.protocol == w.protocol && h.inode == s.Inode
			})
			if !known {
				hits, inodes = append(hits, hit{w, s.Inode}), append(inodes, s.Inode)
			}
		}
	}
	if len(hits) == 0 {
		return nil
	}
	names, out := owners(inodes...), map[service.Name][]notice{}
	for _, h := range hits {
		who := names[h.inode]
		if who == "" {
			who = "a process of this node"
		}
		cure := "end it, or give the Service another port"
		if h.kind == service.NodePort {
			cure = "end it, or give the Service another nodePort"
		}
		x := notice{reasonPortInUse, fmt.Sprintf("%s port %d (%s) is held by a socket of %s: clients reach the Service, not it: %s",
			h.protocol, h.addr.Port(), describe.Kind(h.kind), strings.TrimSpace(who), cure)}
		if !slices.Contains(out[h.service], x) {
			out[h.service] = append(out[h.service], x)
		}
	}
	return out
}
