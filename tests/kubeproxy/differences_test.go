package kubeproxy

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/kubernetes/pkg/proxy"
	netutils "k8s.io/utils/net"
)

// difference is something that sockmesh does otherwise than kube-proxy on purpose.
type difference struct {
	name              string
	theirs, ours, why string
	// beyond: it shows in what is made of the maps (kube-proxy's rules), which this test does not reach.
	beyond bool
	seen   int
}

// noted counts a difference that was met.
func noted(d *difference) { d.seen++ }

var (
	differenceSCTP = &difference{
		name:   "SCTP",
		theirs: "ports of protocol SCTP are served",
		ours:   "they are not; an Event on the Service says so",
		why:    "connect-time translation and pairing know TCP and UDP; the issue asks for these",
	}
	differenceRelabelled = &difference{
		name:   "a slice that goes to another Service",
		theirs: "its endpoints stay with the first Service until the proxy restarts, beside the new one",
		ours:   "they leave the first Service",
		why:    "a stale endpoint is never right; controllers don't relabel slices, people do",
	}
	differenceTwice = &difference{
		name:   "one address twice in the same condition",
		theirs: "which observation counts is left to the order of a Go map (upstream calls it undefined)",
		ours:   "the one that is fittest to serve: not terminating, ready, serving; then by slice name",
		why:    "all nodes and all restarts decide alike",
	}
	// differences is all of them; those that no run meets are a mistake in this list.
	differences = []*difference{differenceSCTP, differenceRelabelled, differenceTwice, {
		name:   "a Service with the label service.kubernetes.io/headless",
		theirs: "its addresses refuse, because its slices get the label and are skipped",
		ours:   "it is none of ours: its addresses are left alone",
		why:    "the label says that proxies have no business with it",
		beyond: true, // Worlds have the label on slices only.
	}, {
		name:   "internalTrafficPolicy Local without local endpoints",
		theirs: "packets to the cluster IP are dropped, so clients wait until they time out",
		ours:   "connections are refused at once",
		why:    "nobody else serves a cluster IP for this client: waiting can't help",
		beyond: true,
	}, {
		name:   "loadBalancerSourceRanges and clients inside",
		theirs: "pods and nodes whose addresses are in no range are dropped at the load balancer's address",
		ours:   "they are let through",
		why:    "the API says what the load balancer should do with its clients; the short cut stands for a cluster's own traffic",
		beyond: true,
	}, {
		name:   "an external IP or node port that another Service's cluster IP is",
		theirs: "which one has it depends on the order of rules",
		ours:   "the lower service.Kind has it, then the first by name; the other one gets an error",
		why:    "nobody takes a cluster IP's traffic by writing it into externalIPs",
		beyond: true, // Worlds give no address to two Services.
	}}
)

// relabelled tells whether a slice belongs to another Service than before.
func relabelled(was, now *discoveryv1.EndpointSlice) bool {
	if was.Labels[discoveryv1.LabelServiceName] == now.Labels[discoveryv1.LabelServiceName] {
		return false
	}
	noted(differenceRelabelled)
	return true
}

func withoutSCTP(eps proxy.EndpointsMap) proxy.EndpointsMap {
	out := make(proxy.EndpointsMap, len(eps))
	for name, list := range eps {
		if name.Protocol != corev1.ProtocolSCTP {
			out[name] = list
		}
	}
	return out
}

// observation is what one entry of a slice says of an address.
type observation struct {
	ready, serving, terminating, local bool
	zones, nodes                       string
}

// ambiguous lists the Services of which differenceTwice makes kube-proxy's answer a matter of luck: where of one address
// and port there are several observations that don't terminate and differ, or only terminating ones that differ.
func ambiguous(all map[string]*discoveryv1.EndpointSlice) map[string]bool {
	type place struct {
		service, ip, port string
		protocol          corev1.Protocol
		number            int32
		terminating       bool
	}
	seen := map[place]observation{}
	differ := map[place]bool{}
	for _, s := range all {
		service := s.Labels[discoveryv1.LabelServiceName]
		if service == "" || s.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		for _, p := range s.Ports {
			if p.Port == nil {
				continue
			}
			for i := range s.Endpoints {
				e := &s.Endpoints[i]
				o := observe(e)
				k := place{service, netutils.ParseIPSloppy(e.Addresses[0]).String(), *p.Name, *p.Protocol, *p.Port, o.terminating}
				if before, twice := seen[k]; twice && before != o {
					differ[k] = true
				}
				seen[k] = o
			}
		}
	}
	out := map[string]bool{}
	for k := range differ {
		living := k
		living.terminating = false
		if _, alive := seen[living]; !k.terminating || !alive {
			out[k.service] = true
		}
	}
	return out
}

func observe(e *discoveryv1.Endpoint) observation {
	c := e.Conditions
	o := observation{
		ready: c.Ready == nil || *c.Ready, serving: c.Serving == nil || *c.Serving, terminating: c.Terminating != nil && *c.Terminating,
		local: e.NodeName != nil && *e.NodeName == thisNode,
	}
	if e.Hints != nil {
		o.zones, o.nodes = fmt.Sprint(e.Hints.ForZones), fmt.Sprint(e.Hints.ForNodes)
	}
	return o
}
