package explain

import (
	"fmt"

	"github.com/sockmesh/sockmesh/agent/describe"
	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// clusters lists the weighted clusters and the share of each of their endpoints.
func (e *explainer) clusters(list []mesh.WeightedCluster, total uint64) {
	for i := range list {
		w := &list[i]
		share := describe.Share(w, total)
		if len(list) == 1 {
			share = 100
		}
		result := w.Name
		rule := "the only cluster"
		if len(list) > 1 {
			result = describe.Percent(share) + " " + w.Name
			rule = fmt.Sprintf("weight %d of %d", w.Weight, total)
		}
		c := e.w.Snapshot.Clusters[w.Name]
		switch {
		case c == nil:
			e.step("cluster", result+": unknown", rule+"; the control plane has not sent it (NC)")
		case c.Discovery == mesh.OriginalDst:
			e.step("cluster", result, rule+"; type ORIGINAL_DST: on to where the connection was going")
			e.destination(w.Name, e.t.addr, share, "")
		default:
			e.members(c, result, rule, share)
		}
	}
}

// members spreads a cluster's share over the endpoints that take traffic.
func (e *explainer) members(c *mesh.Cluster, result, rule string, share float64) {
	set, why := candidates(c)
	if len(set) == 0 {
		e.step("cluster", result+": no endpoints", rule+"; 503 (UH)")
		return
	}
	var rejected []string
	chosen := map[int]bool{}
	for _, m := range set {
		chosen[m.index] = true
	}
	for i, ep := range c.Endpoints {
		if !chosen[i] {
			rejected = append(rejected, fmt.Sprintf("%s: %s", ep.Addr, notChosen(c, i)))
		}
	}
	e.step("cluster", fmt.Sprintf("%s: one of %d endpoints", result, len(set)), rule+why, rejected...)
	for _, m := range set {
		ep := &c.Endpoints[m.index]
		e.destination(c.Name, ep.Addr, share*m.part, describe.Health(ep.Health))
	}
}

// member is an endpoint and its part of the cluster's traffic, 0 to 1.
type member struct {
	index int
	part  float64
}

// candidates are the endpoints of the most preferred priority that has usable ones. Between priorities Envoy
// spills over gradually (overprovisioning factor); shown is where traffic goes while that priority is healthy
// enough, with a note where it is not.
func candidates(c *mesh.Cluster) (set []member, note string) {
	levels := map[uint32][]*mesh.Locality{}
	var highest uint32
	for i := range c.Localities {
		l := &c.Localities[i]
		levels[l.Priority] = append(levels[l.Priority], l)
		highest = max(highest, l.Priority)
	}
	for p := uint32(0); p <= highest; p++ {
		usable, all := count(c, levels[p])
		if usable == 0 {
			continue
		}
		if float64(usable)*100 < float64(all)*c.PanicThreshold && highest == 0 {
			return spread(c, levels[p], true), fmt.Sprintf("; panic: only %d of %d endpoints are healthy, so all of them take traffic", usable, all)
		}
		if p > 0 {
			note = fmt.Sprintf("; priority %d, because no endpoint of a lower number is healthy", p)
		} else if highest > 0 && float64(usable)*float64(c.Overprovisioning) < float64(all)*100 {
			note = "; part of it spills over to the next priority"
		}
		return spread(c, levels[p], false), note
	}
	if len(c.Endpoints) > 0 && c.PanicThreshold > 0 {
		return spread(c, levels[0], true), "; panic: no endpoint is healthy, so all of them take traffic"
	}
	return nil, ""
}

func count(c *mesh.Cluster, ls []*mesh.Locality) (usable, all int) {
	for _, l := range ls {
		for _, ep := range c.Endpoints[l.First : l.First+l.N] {
			all++
			if ep.Health.Usable() {
				usable++
			}
		}
	}
	return usable, all
}

// spread divides the traffic by weight: over localities first where they are weighted.
func spread(c *mesh.Cluster, ls []*mesh.Locality, panic bool) []member {
	type group struct {
		weight  float64
		members []member
		sum     float64
	}
	var groups []group
	var total float64
	for _, l := range ls {
		g := group{}
		for i := l.First; i < l.First+l.N; i++ {
			ep := &c.Endpoints[i]
			if panic || ep.Health.Usable() {
				g.members = append(g.members, member{i, float64(ep.Weight)})
				g.sum += float64(ep.Weight)
			}
		}
		g.weight = g.sum
		if c.LocalityWeighted {
			g.weight = float64(l.Weight)
		}
		if g.sum > 0 && g.weight > 0 {
			groups = append(groups, g)
			total += g.weight
		}
	}
	var out []member
	for _, g := range groups {
		for _, m := range g.members {
			out = append(out, member{m.index, m.part / g.sum * g.weight / total})
		}
	}
	return out
}

func notChosen(c *mesh.Cluster, index int) string {
	ep := &c.Endpoints[index]
	if !ep.Health.Usable() {
		return "health_status " + describe.Health(ep.Health)
	}
	for i := range c.Localities {
		l := &c.Localities[i]
		if index >= l.First && index < l.First+l.N {
			if l.Priority > 0 {
				return fmt.Sprintf("priority %d, used when lower numbers are unhealthy", l.Priority)
			}
			if c.LocalityWeighted && l.Weight == 0 {
				return "its locality has no load_balancing_weight"
			}
		}
	}
	return "not in the set in use"
}
