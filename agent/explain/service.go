package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sockmesh/sockmesh/agent/describe"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// Words that stand for a client that is no pod. A pod of such a name is meant by default/host.
const (
	fromHost    = "host"
	fromOutside = "outside"
)

// from finds out who connects.
func (e *explainer) from(text string) (outside bool, err error) {
	switch word, rest, hasRest := strings.Cut(text, ":"); {
	case text == fromHost:
		e.pod = &Pod{Namespace: "default", Name: fromHost, HostNetwork: true, Rule: "no pod: processes of the host are never enrolled"}
		e.step("client", "a process of this node", "its sockets are in the host's network namespace")
		return false, nil
	case word == fromOutside:
		e.pod = &Pod{Namespace: "default"}
		if hasRest {
			ip, err := netip.ParseAddr(strings.Trim(rest, "[]"))
			if err != nil {
				return false, fmt.Errorf("from %q: expected outside, or outside: and the client's address", text)
			}
			e.client = ip.Unmap()
		}
		e.step("client", "outside this node", "its packets arrive at one of the node's devices")
		return true, nil
	}
	pod, err := e.w.pod(text)
	if err != nil {
		return false, err
	}
	e.pod = pod
	e.out.From = pod.Namespace + "/" + pod.Name
	e.step("pod", e.out.From, podRule(pod))
	return false, nil
}

// service is the in-kernel load balancer for clients of this node, and what is behind it: the address itself.
func (e *explainer) service() {
	proto := e.t.proto
	if !e.w.ServicesOn {
		e.step("service", "not looked at", "--services=off")
		e.passed()
		return
	}
	if proto == service.UDP && !e.w.UDP {
		e.step("service", "not looked at", "the programs that are loaded don't translate datagrams")
		e.end(Unknown, "the datagrams go to %s as it is", e.t.addr)
		return
	}
	f, svc := e.w.frontend(e.t.addr, proto)
	if f == nil {
		e.step("service", "none", fmt.Sprintf("no Service has the %s address %s", proto, e.t.addr))
		e.passed()
		return
	}
	rule := frontendRule(f, svc)
	if e.t.addr.Addr().IsLoopback() {
		if !e.pod.HostNetwork {
			e.step("service", "none", rule+" is on the host's loopback, and a pod's loopback is its own")
			e.passed()
			return
		}
		rule += ", on loopback for the host's own processes (--nodeport-addresses)"
	} else if f.Kind != service.ClusterIP {
		rule += "; for clients inside it is a short cut that goes by no traffic policy and no source range"
	}
	rejected := excluded(svc)
	if len(f.Backends) == 0 {
		e.step("service", svc.Name.String()+": no endpoint takes traffic", rule, rejected...)
		e.end(Refused, "connection refused at once: Service %s has no endpoint that takes traffic", svc.Name)
		return
	}
	e.step("service", fmt.Sprintf("%s: one of %d endpoints", svc.Name, len(f.Backends)), rule, rejected...)
	if f.Affinity > 0 {
		e.step("affinity", fmt.Sprintf("the same endpoint as last time, within %s of the last use", f.Affinity),
			"sessionAffinity: ClientIP; at connect() the client is the network namespace that connects")
	}
	e.spread(f.Backends)
	if proto == service.UDP {
		e.step("stickiness", "a socket stays with its endpoint for as long as that takes traffic; answers show "+e.t.addr.String(),
			"connected sockets choose at connect(), others at the first datagram; when the endpoint is gone they choose again, or are ended")
		e.end(Service, "datagrams go straight to an endpoint of Service %s", svc.Name)
		return
	}
	e.kernelDirect()
	e.end(Service, "the kernel connects straight to an endpoint of Service %s; getpeername() still shows %s", svc.Name, e.t.addr)
}

// outside is what a packet meets that arrives at the node.
func (e *explainer) outside() {
	f, svc := e.w.frontend(e.t.addr, e.t.proto)
	switch {
	case !e.w.ServicesOn:
		e.step("service", "not looked at", "--services=off")
	case f == nil:
		e.step("service", "none", fmt.Sprintf("no Service has the %s address %s", e.t.proto, e.t.addr))
	case f.External == nil || e.t.addr.Addr().IsLoopback():
		e.step("service", "none for clients outside", frontendRule(f, svc)+" is for clients of the cluster's nodes only")
	case !e.w.Outside:
		e.step("service", "not served", frontendRule(f, svc)+"; this agent does not serve clients outside the node")
	default:
		e.arrives(f, svc)
		return
	}
	e.end(Passed, "untouched: the packets go on to %s as they are", e.t.addr)
}

// arrives follows a packet to a Service's address.
func (e *explainer) arrives(f *service.Frontend, svc *service.Service) {
	x := f.External
	e.step("service", svc.Name.String(), frontendRule(f, svc), excluded(svc)...)
	if !e.sourceAllowed(x) {
		return
	}
	policy, rule := "Cluster", "externalTrafficPolicy: Cluster: endpoints are anywhere"
	if x.Local {
		policy, rule = "Local", "externalTrafficPolicy: Local: endpoints of this node only"
	}
	if len(x.Backends) == 0 {
		e.step("policy", policy+": no endpoint takes traffic", rule)
		if x.Silent {
			e.end(Dropped, "no answer: endpoints are on other nodes, and a load balancer is to try those")
			return
		}
		e.end(Refused, "refused at once: Service %s has no endpoint that takes traffic", svc.Name)
		return
	}
	e.step("policy", fmt.Sprintf("%s: one of %d endpoints", policy, len(x.Backends)), rule)
	if f.Affinity > 0 {
		e.step("affinity", fmt.Sprintf("the same endpoint as last time, within %s of the last use", f.Affinity), "sessionAffinity: ClientIP; outside the client is its address")
	}
	if x.Local {
		e.step("source", "kept: the endpoint sees the client's own address", "endpoints are on this node, so answers come through it anyway")
	} else {
		e.step("source", "translated to an address of this node (SNAT)", "the endpoint may be elsewhere, and answers have to come back through this node")
	}
	e.spread(x.Backends)
	e.end(Service, "the packets go to an endpoint of Service %s", svc.Name)
}

// sourceAllowed applies loadBalancerSourceRanges.
func (e *explainer) sourceAllowed(x *service.External) bool {
	if len(x.Sources) == 0 {
		return true
	}
	ranges := make([]string, len(x.Sources))
	for i, p := range x.Sources {
		ranges[i] = p.String()
	}
	rule := "loadBalancerSourceRanges: " + strings.Join(ranges, ", ")
	if !e.client.IsValid() {
		e.step("source ranges", "depends on the client: ask with --from outside:IP", rule)
		return true
	}
	if slices.ContainsFunc(x.Sources, func(p netip.Prefix) bool { return p.Contains(e.client) }) {
		e.step("source ranges", e.client.String()+" may connect", rule)
		return true
	}
	e.step("source ranges", e.client.String()+" may not", rule)
	e.end(Dropped, "no answer: %s is in none of the ranges that may use this load balancer", e.client)
	return false
}

// spread notes where connections may end, each alike.
func (e *explainer) spread(backends []service.Backend) {
	for _, b := range backends {
		e.destination("", b.Addr, 100/float64(len(backends)), "")
	}
}

func frontendRule(f *service.Frontend, svc *service.Service) string {
	rule := fmt.Sprintf("%s of Service %s", describe.Kind(f.Kind), svc.Name)
	if f.PortName != "" {
		rule += ", port " + f.PortName
	}
	return rule
}

func excluded(svc *service.Service) []string {
	var out []string
	for _, x := range svc.Excluded {
		out = append(out, fmt.Sprintf("%s: %s", x.Addr, x.Reason))
	}
	return out
}

func (e *explainer) passed() {
	if e.t.proto == service.UDP {
		e.end(Passed, "untouched: the datagrams go to %s as they are", e.t.addr)
		return
	}
	e.kernelDirect()
	e.end(Passed, "untouched: the connection goes to %s as it is", e.t.addr)
}

// frontend finds a Service's address.
func (w *World) frontend(addr netip.AddrPort, proto service.Protocol) (*service.Frontend, *service.Service) {
	for _, s := range w.Services {
		for _, list := range [][]service.Frontend{s.Frontends, s.Loopback} {
			for i := range list {
				if f := &list[i]; f.Addr == addr && f.Protocol == proto {
					return f, s
				}
			}
		}
	}
	return nil, nil
}
