// Package explain answers "what would happen to this connection, and why": every decision on the way from a pod's
// connect() to an endpoint, each with the rule that made it.
//
// It makes the same decisions as the datapath and the proxy do, from the same tables and with the same matchers
// (mesh.Snapshot, mesh.Listener.Chain, mesh.RouteConfig), so that it can't drift from them; what it adds is the
// reasons. It is pure: a World in, an explanation out.
package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/describe"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// Outcomes of an explanation.
const (
	Proxied   = "proxied"
	Offloaded = "offloaded"
	Service   = "service"
	Passed    = "passed"
	Refused   = "refused"
	Dropped   = "dropped"
	Failed    = "failed"
	Unknown   = "unsupported"
)

// World is everything that decides.
type World struct {
	Snapshot *mesh.Snapshot // may be nil
	Services []*service.Service
	Pods     []Pod

	ServicesOn bool
	// UDP: the programs translate datagrams; Outside: clients outside the node are served.
	UDP, Outside   bool
	FailClosed     bool
	AcceleratePods bool
	// Acceleration says whether sockets are redirected, AccelerationReason why not.
	Acceleration       bool
	AccelerationReason string
}

// Pod is one pod of this node.
type Pod struct {
	Namespace, Name string
	IPs             []netip.Addr
	Enrolled        bool
	// HostNetwork: its sockets are those of the host's own network namespace.
	HostNetwork bool
	// Rule is what decided on enrolment.
	Rule string
	// Listening: the proxy's listeners are open in its network namespace. NotListening says why not.
	Listening    bool
	NotListening string
	// AccelerateBlocking is the pod's opt-in.
	AccelerateBlocking bool
}

// explainer builds one explanation.
type explainer struct {
	w      *World
	pod    *Pod
	client netip.Addr // of a client outside, where it was given
	t      *target
	out    api.Explanation
}

// Explain follows one connection, or one request. Its errors are wrong questions.
func Explain(w *World, req api.ExplainRequest) (api.Explanation, error) {
	e := &explainer{w: w}
	t, err := parseTarget(req)
	if err != nil {
		return e.out, err
	}
	e.t = t
	e.out.From, e.out.Target = req.From, req.URL
	outside, err := e.from(req.From)
	if err != nil {
		return e.out, err
	}
	if err := e.resolve(); err != nil {
		return e.out, err
	}
	if outside {
		e.outside()
	} else {
		e.connection()
	}
	return e.out, nil
}

func podRule(p *Pod) string {
	if len(p.IPs) == 0 {
		return "it has no address yet"
	}
	ips := make([]string, len(p.IPs))
	for i, ip := range p.IPs {
		ips[i] = ip.String()
	}
	return "its addresses: " + strings.Join(ips, ", ")
}

// pod finds namespace/name; a name alone is looked for in namespace default.
func (w *World) pod(from string) (*Pod, error) {
	namespace, name, ok := strings.Cut(from, "/")
	if !ok {
		namespace, name = "default", from
	}
	if name == "" || namespace == "" {
		return nil, fmt.Errorf("from %q: expected the pod that connects, as NAMESPACE/POD", from)
	}
	var here []string
	for i := range w.Pods {
		p := &w.Pods[i]
		if p.Namespace == namespace && p.Name == name {
			return p, nil
		}
		if p.Namespace == namespace {
			here = append(here, p.Name)
		}
	}
	if len(here) == 0 {
		return nil, fmt.Errorf("no pod %s/%s on this node (nor any other in namespace %s): explain asks the agent of the pod's own node", namespace, name, namespace)
	}
	slices.Sort(here)
	if len(here) > 8 {
		here = append(here[:8], "…")
	}
	return nil, fmt.Errorf("no pod %s/%s on this node; in that namespace there are %s", namespace, name, strings.Join(here, ", "))
}

func (e *explainer) step(stage, result, rule string, rejected ...string) {
	e.out.Steps = append(e.out.Steps, api.Step{Stage: stage, Result: result, Rule: rule, Rejected: rejected})
}

func (e *explainer) end(outcome, format string, args ...any) {
	e.out.Outcome, e.out.Verdict = outcome, fmt.Sprintf(format, args...)
}

// connection is what connect() decides, in the order of bpf/'s connect programs.
func (e *explainer) connection() {
	if e.t.proto == service.UDP {
		e.service() // listeners claim TCP only
		return
	}
	if e.pod.Enrolled {
		e.step("enrolment", "enrolled", e.pod.Rule)
		if claim := e.claim(); claim != nil {
			if e.claimed(claim) {
				return
			}
		}
	} else {
		e.step("enrolment", "not enrolled: no listener may claim its connections", e.pod.Rule)
	}
	e.service()
}

// claim finds the claim that connect() finds: exact address, then the port on every address, then the catch-all.
func (e *explainer) claim() *mesh.Claim {
	if e.w.Snapshot == nil {
		e.step("claim", "none", "there is no xDS configuration")
		return nil
	}
	any := netip.IPv6Unspecified()
	if e.t.addr.Addr().Is4() {
		any = netip.IPv4Unspecified()
	}
	keys := []struct {
		addr netip.AddrPort
		kind string
	}{
		{e.t.addr, "exact address"},
		{netip.AddrPortFrom(any, e.t.addr.Port()), "wildcard port"},
		{netip.AddrPortFrom(any, 0), "catch-all (use_original_dst)"},
	}
	var missed []string
	claims := e.w.Snapshot.Claims()
	for _, k := range keys {
		for i := range claims {
			if claims[i].Addr == k.addr {
				e.step("claim", "listener "+claims[i].Listener, fmt.Sprintf("%s %s", k.kind, k.addr), missed...)
				return &claims[i]
			}
		}
		missed = append(missed, fmt.Sprintf("no listener claims the %s %s", k.kind, k.addr))
	}
	if l := e.w.Snapshot.Outbound(e.t.addr); l != nil {
		e.step("claim", "none", fmt.Sprintf("listener %s would only pass it through to its original destination, so it stays in the kernel", l.Name), missed...)
		return nil
	}
	e.step("claim", "none", "", missed...)
	return nil
}

// claimed follows a claim; false: it falls through to what there would be without it.
func (e *explainer) claimed(claim *mesh.Claim) bool {
	if claim.Offload != nil {
		e.offloaded(claim)
		return true
	}
	reason := claim.Reason
	if reason == "" {
		reason = "the listener needs the proxy"
	}
	e.step("offload", "no: the proxy handles it", reason)
	if !e.pod.Listening {
		why := e.pod.NotListening
		if why == "" {
			why = "no listener is open in the pod's network namespace"
		}
		if e.w.FailClosed {
			e.step("proxy", "away: refused", why+"; --fail-mode=closed")
			e.end(Refused, "connection refused: the proxy is not listening in the pod, and --fail-mode is closed")
			return true
		}
		e.step("proxy", "away: the connection goes on without it", why+"; --fail-mode=open")
		return false
	}
	e.step("proxy", "connect() is rewritten to the proxy's listener in the pod, "+e.listener(), "the listener exists in the pod's network namespace")
	listener := e.w.Snapshot.Outbound(e.t.addr)
	if listener == nil {
		e.end(Failed, "the proxy closes the connection: listener %s went away (NR)", claim.Listener)
		return true
	}
	e.proxied(listener)
	return true
}

func (e *explainer) listener() string {
	if e.t.addr.Addr().Is4() {
		return "127.0.0.1:15001"
	}
	return "[::1]:15001"
}

// offloaded is the kernel's own draw.
func (e *explainer) offloaded(claim *mesh.Claim) {
	e.step("offload", "yes: chosen at connect(), no proxy in the path", "the listener is only tcp_proxy over clusters that the kernel can balance")
	var total uint64
	for _, c := range claim.Offload.Clusters {
		total += uint64(c.Weight)
	}
	for _, c := range claim.Offload.Clusters {
		share := float64(c.Weight) * 100 / float64(max(total, 1))
		e.step("cluster", describe.Percent(share)+" "+c.Name, fmt.Sprintf("weight %d of %d, %d endpoints", c.Weight, total, len(c.Endpoints)))
		var sum uint64
		for _, ep := range c.Endpoints {
			sum += uint64(ep.Weight)
		}
		for _, ep := range c.Endpoints {
			e.destination(c.Name, ep.Addr, share*float64(ep.Weight)/float64(max(sum, 1)), "")
		}
	}
	e.kernelDirect()
	e.end(Offloaded, "the kernel connects straight to an endpoint of %s; getpeername() still shows %s", claim.Listener, e.t.addr)
}

// podAt is the pod of this node that has an address.
func (w *World) podAt(addr netip.Addr) *Pod {
	for i := range w.Pods {
		if slices.Contains(w.Pods[i].IPs, addr) {
			return &w.Pods[i]
		}
	}
	return nil
}

func (e *explainer) destination(cluster string, addr netip.AddrPort, percent float64, health string) {
	if percent == 0 {
		return // a cluster of weight 0, named by its step
	}
	d := api.Destination{Cluster: cluster, Address: addr.String(), Percent: percent, Health: health}
	if p := e.w.podAt(addr.Addr()); p != nil {
		d.Pod, d.Local = p.Namespace+"/"+p.Name, true
	}
	e.out.Destinations = append(e.out.Destinations, d)
}

// kernelDirect says what happens to the bytes of a connection without a proxy.
func (e *explainer) kernelDirect() {
	switch {
	case !e.w.AcceleratePods:
		e.step("kernel", "plain TCP between the two", "no proxy in the path, and --accelerate-pods is off")
	case !e.w.Acceleration:
		e.step("kernel", "plain TCP between the two", "acceleration is not active: "+e.w.AccelerationReason)
	case !e.pod.Enrolled:
		e.step("kernel", "plain TCP between the two", "--accelerate-pods needs both pods enrolled")
	default:
		e.step("kernel", "socket to socket where the endpoint is an enrolled pod of this node, else plain TCP", "--accelerate-pods=on")
	}
}

// kernelProxied says what happens to the bytes of the two legs of a proxied connection.
func (e *explainer) kernelProxied() {
	if !e.w.Acceleration {
		e.step("kernel", "plain TCP on both legs", "acceleration is not active: "+e.w.AccelerationReason)
		return
	}
	first := "pod to proxy: socket to socket, if the application's socket is non-blocking when it connects"
	rule := "blocking sockets stay on TCP unless the pod carries sockmesh.io/accelerate-blocking=true"
	if e.pod.AccelerateBlocking {
		first, rule = "pod to proxy: socket to socket", "sockmesh.io/accelerate-blocking=true on the pod"
	}
	local := 0
	for _, d := range e.out.Destinations {
		if d.Local {
			local++
		}
	}
	second := fmt.Sprintf("proxy to endpoint: socket to socket for the %d of %d endpoints that are pods of this node, else TCP", local, len(e.out.Destinations))
	if len(e.out.Destinations) == 0 {
		second = "the proxy answers itself"
	}
	e.step("kernel", first+"; "+second, rule)
}
