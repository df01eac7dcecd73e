package agent

import (
	"net/netip"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/explain"
	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/pod"
)

// States of a pod.
const (
	podReady   = "ready"
	podWaiting = "waiting"
	podSkipped = "skipped"
)

// enrolmentRule says what decided whether a pod is enrolled.
func enrolmentRule(policy string, p *kube.Pod) string {
	said := func(c kube.Choice) string {
		if c == kube.Yes {
			return kube.EnrollLabel + "=true"
		}
		return kube.EnrollLabel + "=false"
	}
	switch {
	case p.HostNetwork:
		return "host network: such pods are never enrolled"
	case p.Label != kube.Unset:
		return "the pod's label " + said(p.Label)
	case p.NamespaceLabel != kube.Unset:
		return "the namespace's label " + said(p.NamespaceLabel)
	}
	return "--enroll=" + policy + ", and neither pod nor namespace has the label " + kube.EnrollLabel
}

// podRows joins what Kubernetes says of pods with what pkg/pod found of them.
func podRows(policy string, pods []*kube.Pod, found []pod.Status, started bool) []api.Pod {
	byUID := make(map[string]*pod.Status, len(found))
	for i := range found {
		byUID[found[i].UID] = &found[i]
	}
	out := make([]api.Pod, 0, len(pods))
	for _, p := range pods {
		row := api.Pod{Namespace: p.Namespace, Name: p.Name, UID: p.UID, IPs: addrStrings(p.IPs), Enrolled: p.Enrolled, Rule: enrolmentRule(policy, p)}
		if p.AccelerateBlocking {
			row.Accelerates = "blocking sockets too"
		}
		s := byUID[p.UID]
		switch {
		case p.HostNetwork:
			row.State, row.Reason = podSkipped, "host network"
		case p.Terminal:
			row.State, row.Reason = podSkipped, "it has ended"
		case !started:
			row.State, row.Reason = podWaiting, "the first xDS configuration has not come yet"
		case s == nil:
			row.State = podWaiting
		case s.Ready:
			row.State, row.Reason = podReady, s.Reason
		default:
			row.State, row.Reason = podWaiting, s.Reason
		}
		if s != nil {
			row.Netns, row.Cookie = s.NetnsName, s.Cookie
		}
		out = append(out, row)
	}
	return out
}

func addrStrings(list []netip.Addr) []string {
	out := make([]string, len(list))
	for i, a := range list {
		out[i] = a.String()
	}
	return out
}

// explainPods are the same rows as explain wants them.
func explainPods(pods []*kube.Pod, rows []api.Pod) []explain.Pod {
	out := make([]explain.Pod, 0, len(pods))
	for i, p := range pods {
		out = append(out, explain.Pod{
			Namespace: p.Namespace, Name: p.Name, IPs: p.IPs, Enrolled: p.Enrolled, Rule: rows[i].Rule,
			HostNetwork: p.HostNetwork, Listening: p.Enrolled && rows[i].State == podReady, NotListening: rows[i].Reason, AccelerateBlocking: p.AccelerateBlocking,
		})
	}
	return out
}

// podNames finds a pod of this node by its address or by its network namespace's cookie.
type podNames struct {
	byAddr   map[netip.Addr]string
	byCookie map[uint64]string
}

func newPodNames(placed map[string]pod.Pod) podNames {
	n := podNames{map[netip.Addr]string{}, map[uint64]string{}}
	for _, p := range placed {
		name := p.Namespace + "/" + p.Name
		n.byCookie[p.Cookie] = name
		for _, ip := range p.IPs {
			n.byAddr[ip] = name
		}
	}
	return n
}
