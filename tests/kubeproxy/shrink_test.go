package kubeproxy

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// shrink makes a failing history as small as it gets while it still fails: first fewer changes, then fewer fields and
// items in their objects, over again until nothing more can go.
func shrink(changes []*change, f *fault) []*change {
	fails := func(c []*change) (failed bool) {
		defer func() {
			if recover() != nil {
				failed = false // kube-proxy can't take what an API server would not have stored.
			}
		}()
		if f != nil {
			if d, _, _ := compare(c, nil); d != "" {
				return false // Not the fault's doing.
			}
		}
		d, _, _ := compare(c, f)
		return d != ""
	}
	for again := true; again; {
		again = false
		for size := len(changes); size >= 1; size /= 2 {
			for from := 0; from+size <= len(changes); {
				less := slices.Delete(slices.Clone(changes), from, from+size)
				if fails(less) {
					changes, again = less, true
				} else {
					from++
				}
			}
		}
		for i := range changes {
			for n := 0; ; {
				simpler, left := simplify(changes[i], n)
				if !left {
					break
				}
				less := slices.Clone(changes)
				less[i] = simpler
				if simpler != nil && fails(less) {
					changes, again = less, true
				} else {
					n++
				}
			}
		}
	}
	return changes
}

// simplify takes the nth removable part out of a change's object; nil: what is left is no object; not left: there
// is no such part.
func simplify(c *change, n int) (*change, bool) {
	text, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	var tree map[string]any
	if err := json.Unmarshal(text, &tree); err != nil {
		panic(err)
	}
	delete(tree, "status") // of Go's zero values
	if !removeNth(tree, &n) {
		return nil, false
	}
	if text, err = json.Marshal(tree); err != nil {
		panic(err)
	}
	out := &change{}
	if json.Unmarshal(text, out) != nil || !out.whole() || same(c, out) {
		return nil, true
	}
	return out, true
}

// removeNth removes the nth member or item, counted depth first with the greater parts before their own parts.
func removeNth(value any, n *int) bool {
	switch v := value.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			if *n == 0 {
				delete(v, k)
				return true
			}
			*n--
			if items, ok := v[k].([]any); ok {
				for i := range items {
					if *n == 0 {
						v[k] = slices.Delete(items, i, i+1)
						return true
					}
					*n--
				}
			}
			if removeNth(v[k], n) {
				return true
			}
		}
	case []any:
		for _, item := range v {
			if removeNth(item, n) {
				return true
			}
		}
	}
	return false
}

func same(a, b *change) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return string(x) == string(y)
}

// whole tells whether a change is one that an API server could tell.
func (c *change) whole() bool {
	kinds := 0
	for _, there := range []bool{c.Service != nil, c.DeleteService != "", c.Slice != nil, c.DeleteSlice != "", c.Node != nil} {
		if there {
			kinds++
		}
	}
	if kinds != 1 {
		return false
	}
	if s := c.Service; s != nil {
		if s.Name == "" || s.Namespace == "" || s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP && (s.Spec.SessionAffinityConfig == nil ||
			s.Spec.SessionAffinityConfig.ClientIP == nil || s.Spec.SessionAffinityConfig.ClientIP.TimeoutSeconds == nil) {
			return false
		}
		ips, families := len(s.Spec.ClusterIPs), len(s.Spec.IPFamilies)
		if ips > 0 && s.Spec.ClusterIP != s.Spec.ClusterIPs[0] || families > 0 && families != ips || families == 0 && ips > 1 {
			return false
		}
		for _, p := range s.Spec.Ports {
			if p.Protocol == "" || p.Port == 0 {
				return false
			}
		}
	}
	if s := c.Slice; s != nil {
		if s.Name == "" || s.Namespace == "" || s.AddressType == "" {
			return false
		}
		for _, p := range s.Ports {
			if p.Name == nil || p.Protocol == nil {
				return false
			}
		}
		for _, e := range s.Endpoints {
			if len(e.Addresses) == 0 {
				return false
			}
		}
	}
	return c.Node == nil || c.Node.Name == thisNode
}

// render writes changes as YAML.
func render(changes []*change) string {
	var b strings.Builder
	for i, c := range changes {
		out, err := yaml.Marshal(c)
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(&b, "--- # %d\n%s", i+1, strings.ReplaceAll(string(out), "  status:\n    loadBalancer: {}\n", ""))
	}
	return b.String()
}
