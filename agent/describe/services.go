package describe

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// NodeFacts is what only the node knows of its Services.
type NodeFacts struct {
	// Notes are what this node can't serve, and why.
	Notes func(service.Name) []string
	// HealthCheck is where a Service's check is open, and why not everywhere.
	HealthCheck func(service.Name) ([]netip.AddrPort, string)
}

// Services are the rows of GET /services, by namespace and name.
func Services(list []*service.Service, s *mesh.Snapshot, facts NodeFacts) []api.Service {
	claimed := map[netip.AddrPort]string{}
	if s != nil {
		for _, c := range s.Claims() {
			claimed[c.Addr] = c.Listener
		}
	}
	out := make([]api.Service, 0, len(list))
	for _, svc := range list {
		row := api.Service{
			Namespace: svc.Name.Namespace, Name: svc.Name.Name, InternalTrafficPolicy: trafficPolicy(svc.InternalLocal),
			Frontends: []api.Frontend{}, Endpoints: endpoints(svc), HealthCheck: healthCheck(svc, facts),
		}
		for i := range svc.Frontends {
			row.Frontends = append(row.Frontends, frontend(&svc.Frontends[i], claimed))
		}
		for i := range svc.Loopback {
			f := frontend(&svc.Loopback[i], nil)
			f.Loopback, f.External = true, nil
			row.Frontends = append(row.Frontends, f)
		}
		if slices.ContainsFunc(row.Frontends, func(f api.Frontend) bool { return f.Kind != Kind(service.ClusterIP) }) {
			row.ExternalTrafficPolicy = trafficPolicy(svc.ExternalLocal)
		}
		for _, e := range svc.Excluded {
			row.Excluded = append(row.Excluded, api.Excluded{Address: e.Addr.String(), Reason: e.Reason})
		}
		for _, p := range svc.Problems {
			text := p.Field + ": " + p.Detail
			if p.Cure != "" {
				text += ": " + p.Cure
			}
			row.Problems = append(row.Problems, text)
		}
		if facts.Notes != nil {
			row.Problems = append(row.Problems, facts.Notes(svc.Name)...)
		}
		out = append(out, row)
	}
	slices.SortFunc(out, func(a, b api.Service) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return out
}

func trafficPolicy(local bool) string {
	if local {
		return "Local"
	}
	return "Cluster"
}

func frontend(f *service.Frontend, claimed map[netip.AddrPort]string) api.Frontend {
	front := api.Frontend{
		Address: f.Addr.String(), Protocol: f.Protocol.String(), Kind: Kind(f.Kind), Port: f.PortName,
		AffinitySeconds: int64(f.Affinity.Seconds()), Backends: []api.Backend{},
	}
	if f.Protocol == service.TCP {
		front.Listener = claimed[f.Addr]
	}
	for _, b := range f.Backends {
		front.Backends = append(front.Backends, api.Backend{
			Address: b.Addr.String(), Pod: b.Pod, Node: b.Node, Zone: b.Zone, Local: b.Local, Terminating: b.Terminating,
		})
	}
	if x := f.External; x != nil {
		front.External = &api.External{Policy: trafficPolicy(x.Local), Backends: []string{}, Without: "refused"}
		if x.Silent {
			front.External.Without = "no answer"
		}
		for _, b := range x.Backends {
			front.External.Backends = append(front.External.Backends, b.Addr.String())
		}
		for _, p := range x.Sources {
			front.External.Sources = append(front.External.Sources, p.String())
		}
	}
	return front
}

// endpoints says of each endpoint where it stands. One that some address uses and another doesn't, because their policies
// differ, is used and has the reason of the other.
func endpoints(svc *service.Service) []api.ServiceEndpoint {
	all := map[netip.AddrPort]*api.ServiceEndpoint{}
	use := func(list []service.Backend) {
		for _, b := range list {
			if all[b.Addr] != nil {
				continue
			}
			e := &api.ServiceEndpoint{Address: b.Addr.String(), State: "ready", Used: true, Local: b.Local, Pod: b.Pod, Node: b.Node, Zone: b.Zone}
			if b.Terminating {
				e.State, e.Reason = "terminating", "there is no ready one"
			}
			all[b.Addr] = e
		}
	}
	for _, fronts := range [][]service.Frontend{svc.Frontends, svc.Loopback} {
		for i := range fronts {
			use(fronts[i].Backends)
			if fronts[i].External != nil {
				use(fronts[i].External.Backends)
			}
		}
	}
	for _, x := range svc.Excluded {
		if e := all[x.Addr]; e != nil {
			if !e.Used {
				e.Reason += "; " + x.Reason
			}
			continue
		}
		e := &api.ServiceEndpoint{Address: x.Addr.String(), State: "not ready", Reason: x.Reason}
		if from := x.Endpoint; from != nil {
			e.Node, e.Zone = from.Node, from.Zone
			if from.Pod != "" {
				e.Pod = svc.Name.Namespace + "/" + from.Pod
			}
			switch {
			case from.Terminating && from.Serving:
				e.State = "draining"
			case from.Terminating:
				e.State = "terminating"
			case from.Ready:
				e.State = "ready"
			}
		}
		all[x.Addr] = e
	}
	addrs := make([]netip.AddrPort, 0, len(all))
	for addr := range all {
		addrs = append(addrs, addr)
	}
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	var out []api.ServiceEndpoint
	for _, addr := range addrs {
		out = append(out, *all[addr])
	}
	return out
}

func healthCheck(svc *service.Service, facts NodeFacts) *api.HealthCheck {
	if svc.HealthCheck == nil {
		return nil
	}
	h := &api.HealthCheck{Port: svc.HealthCheck.Port, LocalReady4: svc.HealthCheck.LocalReady4, LocalReady6: svc.HealthCheck.LocalReady6, Addresses: []string{}}
	if facts.HealthCheck != nil {
		open, problem := facts.HealthCheck(svc.Name)
		for _, a := range open {
			h.Addresses = append(h.Addresses, a.String())
		}
		h.Error = problem
	}
	return h
}

// Kind is Kubernetes' word for a kind of frontend.
func Kind(k service.Kind) string {
	names := [...]string{"ClusterIP", "NodePort", "LoadBalancer", "ExternalIP"}
	if int(k) < len(names) {
		return names[k]
	}
	return "?"
}
