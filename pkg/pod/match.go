package pod

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// bound is a wanted pod, and the namespace that it was found in, if any.
type bound struct {
	Spec
	space *space
	seen  time.Time // when it was first wanted with its addresses
	place string    // what is to be said of where it is
	serve serve
}

// reuseAfter is how long a pod waits for a namespace of its own before it is looked for in one that had another pod.
const reuseAfter = 3 * time.Second

// match puts pods into namespaces. It only decides; the Manager acts.
//
// The rules, for what really happens on a node, and so that no pod is ever taken for another:
//   - A pod stays where it is while that namespace lives and owns its address, or nobody else does.
//   - A namespace has one pod. A second pod that claims the same address waits, and this is reported; it never takes
//     a namespace over from a pod that still exists.
//   - Runtimes leave namespaces of dead pods behind for a while, and addresses are used again at once: so a namespace
//     that had no pod yet goes before one that had, and one that had another pod counts only after reuseAfter, when no
//     other has come (a pod of a manifest may be renamed; a pod of an API server never gets another's namespace).
//   - Two such namespaces that own one address are a riddle (a namespace left over from before the agent started, or a
//     pod with NET_ADMIN that gave itself another's address): the pod is in neither, and this is reported.
//   - If several pods wait for one namespace, one that isn't being deleted comes first, then the youngest.
//
// It gives those whose namespace changed, with the namespace they should have (nil: none).
func match(pods map[string]*bound, spaces map[spaceID]*space, dir string, now time.Time) map[*bound]*space {
	owners := map[netip.Addr][]*space{}
	for _, s := range spaces {
		if s.addrs == nil {
			return nil // Its addresses are being listed; without them nothing is certain.
		}
		for a := range s.addrs {
			owners[a] = append(owners[a], s)
		}
	}
	order := make([]*bound, 0, len(pods))
	for _, b := range pods {
		order = append(order, b)
	}
	slices.SortFunc(order, claimOrder)

	taken := map[*space]*bound{}
	for _, b := range order {
		if b.space != nil && !b.Ignored {
			taken[b.space] = b
		}
	}
	moves := map[*bound]*space{}
	for _, b := range order {
		v := b.best(owners, taken, now)
		best := v.space
		b.place = b.reasonOf(v, dir)
		if best != b.space {
			moves[b] = best
			if b.space != nil && taken[b.space] == b {
				delete(taken, b.space)
			}
		}
		if best != nil {
			taken[best] = b
		}
	}
	return moves
}

// claimOrder: who is asked first when several want one namespace.
func claimOrder(a, b *bound) int {
	if a.Deleting != b.Deleting {
		if a.Deleting {
			return 1
		}
		return -1
	}
	return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.UID, b.UID))
}

// verdict is where a pod is, and what stands in its way.
type verdict struct {
	space *space
	rival *bound    // a pod in a namespace that owns this pod's address
	torn  [2]*space // two namespaces that could be the pod's
}

// best decides where a pod is.
func (b *bound) best(owners map[netip.Addr][]*space, taken map[*space]*bound, now time.Time) (v verdict) {
	if b.Ignored {
		return v
	}
	var fresh, used []*space
	for _, ip := range b.IPs {
		for _, s := range owners[ip] {
			switch other := taken[s]; {
			case other != nil && other != b:
				v.rival = other
			case s == b.space || slices.Contains(fresh, s) || slices.Contains(used, s):
			case s.hadPod != "":
				if s.hadPod == b.UID || now.Sub(b.seen) >= reuseAfter {
					used = append(used, s)
				}
			default:
				fresh = append(fresh, s)
			}
		}
	}
	candidates := fresh
	if len(candidates) == 0 {
		candidates = used
	}
	switch {
	case b.space != nil && (b.space.owns(b.IPs) > 0 || len(candidates) == 0):
		v.space = b.space
	case len(candidates) == 1:
		v.space = candidates[0]
	case len(candidates) > 1:
		v.torn = [2]*space{candidates[0], candidates[1]}
	}
	return v
}

func (b *bound) reasonOf(v verdict, dir string) string {
	switch {
	case v.space != nil && v.rival != nil:
		return fmt.Sprintf("the network namespace of pod %s/%s owns its address as well", v.rival.Namespace, v.rival.Name)
	case v.space != nil:
		return ""
	case b.Ignored:
		return "it has no network namespace of its own (host network, or terminated)"
	case len(b.IPs) == 0:
		return "it has no address yet"
	case v.torn[0] != nil:
		return fmt.Sprintf("two network namespaces under %s own its address, %s and %s: remove the one that is stale", dir, v.torn[0].name(), v.torn[1].name())
	case v.rival != nil:
		return fmt.Sprintf("its address belongs to pod %s/%s, which still exists", v.rival.Namespace, v.rival.Name)
	}
	return fmt.Sprintf("no network namespace under %s owns %s", dir, b.IPs[0])
}
