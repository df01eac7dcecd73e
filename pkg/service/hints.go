package service

import (
	"cmp"
	"iter"
	"strings"
	"unique"
)

// Hints say for which nodes and zones an endpoint is meant: what the EndpointSlice controller made of
// trafficDistribution or of topology-aware routing. The zero value is no hints. Most endpoints of a cluster share a few
// sets, so a value is one pointer to an interned set.
type Hints struct {
	set unique.Handle[hintSet]
}

// hintSet has names joined by commas, which neither zones (label values) nor nodes can contain.
type hintSet struct{ zones, nodes string }

// MakeHints gives the hints for zones and nodes.
func MakeHints(zones, nodes []string) Hints {
	set := hintSet{strings.Join(zones, ","), strings.Join(nodes, ",")}
	if set == (hintSet{}) {
		return Hints{}
	}
	return Hints{unique.Make(set)}
}

func (h Hints) get() hintSet {
	if h == (Hints{}) {
		return hintSet{}
	}
	return h.set.Value()
}

// compare orders hints.
func (h Hints) compare(other Hints) int {
	if h == other {
		return 0
	}
	a, b := h.get(), other.get()
	return cmp.Or(cmp.Compare(a.zones, b.zones), cmp.Compare(a.nodes, b.nodes))
}

// Zones are the names of zones.
func (h Hints) Zones() iter.Seq[string] { return names(h.get().zones) }

// Nodes are the names of nodes.
func (h Hints) Nodes() iter.Seq[string] { return names(h.get().nodes) }

func names(joined string) iter.Seq[string] {
	if joined == "" {
		return func(func(string) bool) {}
	}
	return strings.SplitSeq(joined, ",")
}

// contains tells whether a name is among joined ones.
func contains(joined, name string) bool {
	if joined == name {
		return name != ""
	}
	for n := range names(joined) {
		if n == name {
			return name != ""
		}
	}
	return false
}
