package router

import (
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// Header mutations exist on four levels: weighted cluster, route, virtual host, route configuration. They are
// applied in that order, so that the outer levels have the last word, or the other way about where the route
// configuration says most_specific_header_mutations_wins.

// pendingAdd is an addition whose value is known, a piece of the scratch buffer.
type pendingAdd struct {
	add      *mesh.HeaderAdd
	from, to int
}

// mutateRequest applies the request's mutations.
func (r *Request) mutateRequest() {
	if r.route.MutatesRequest || r.split != nil && !r.split.RequestHeaders.Empty() {
		r.eachLevel(func(m levelSet) *mesh.HeaderMutations { return m.request }, &r.head)
	}
}

// mutateResponse applies the response's mutations; also to answers that the proxy makes for the route.
func (r *Request) mutateResponse() {
	if r.route.MutatesResponse || r.split != nil && !r.split.ResponseHeaders.Empty() {
		r.eachLevel(func(m levelSet) *mesh.HeaderMutations { return m.response }, &r.resp)
	}
}

// levelSet is one level's mutations in both directions.
type levelSet struct{ request, response *mesh.HeaderMutations }

func (r *Request) eachLevel(side func(levelSet) *mesh.HeaderMutations, h *header.Block) {
	var levels [4]levelSet
	n := 0
	if s := r.split; s != nil {
		levels[n] = levelSet{&s.RequestHeaders, &s.ResponseHeaders}
		n++
	}
	levels[n] = levelSet{&r.route.RequestHeaders, &r.route.ResponseHeaders}
	n++
	if v := r.route.Host; v != nil {
		levels[n] = levelSet{&v.RequestHeaders, &v.ResponseHeaders}
		n++
	}
	reversed := false
	if c := r.route.Config; c != nil {
		levels[n] = levelSet{&c.RequestHeaders, &c.ResponseHeaders}
		n++
		reversed = c.MostSpecificWins
	}
	for i := range n {
		l := levels[i]
		if reversed {
			l = levels[n-1-i]
		}
		if m := side(l); !m.Empty() {
			r.mutate(m, h)
		}
	}
}

// mutate applies one level: removals, then overwrites, then additions. All values are computed before the
// first is set, so that none sees another.
func (r *Request) mutate(m *mesh.HeaderMutations, h *header.Block) {
	for _, name := range m.Remove {
		h.RemoveName(name)
	}
	r.pending = r.pending[:0]
	r.scratch = r.scratch[:0]
	for i := range m.Add {
		a := &m.Add[i]
		from := len(r.scratch)
		if a.Literal {
			r.scratch = append(r.scratch, a.Value...)
		} else {
			// As it is: escaping is for log lines. What is not known is left out, where a log would print "-".
			r.scratch = r.rt.format(a, r.snap.Generation).Append(r.scratch, &r.rec)
		}
		if len(r.scratch) == from && !a.KeepEmpty {
			continue
		}
		switch a.Action {
		case mesh.AddIfAbsent:
			if _, ok := h.GetName(a.Name); ok {
				continue
			}
		case mesh.Overwrite:
			if _, ok := h.GetName(a.Name); !ok {
				continue
			}
		}
		r.pending = append(r.pending, pendingAdd{a, from, len(r.scratch)})
	}
	for _, p := range r.pending {
		if p.add.Action == mesh.OverwriteOrAdd || p.add.Action == mesh.Overwrite {
			h.SetName(p.add.Name, unsafeString(r.scratch[p.from:p.to]))
		}
	}
	for _, p := range r.pending {
		if p.add.Action == mesh.AppendOrAdd || p.add.Action == mesh.AddIfAbsent {
			h.AddName(p.add.Name, unsafeString(r.scratch[p.from:p.to]))
		}
	}
}
