package xds

import (
	"cmp"
	"maps"
	"slices"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Status is what `sockmesh status` shows under "xds".
type Status struct {
	Servers   []ServerStatus    `json:"servers"`
	Resources map[string]int    `json:"resources"` // accepted ones, by type
	Rejected  []Rejection       `json:"rejected"`
	Ignored   []mesh.Warning    `json:"ignored"`
	Warming   map[string]string `json:"warming,omitempty"` // what is not in force yet: what it waits for
	Synced    bool              `json:"synced"`
}

// ServerStatus is one control plane, or file, and one stream of it.
type ServerStatus struct {
	Name      string `json:"name"`
	Stream    string `json:"stream"` // "ads", or the type
	Delta     bool   `json:"delta"`
	Connected bool   `json:"connected"`
	LastError string `json:"last_error"`
}

// Rejection is a resource whose latest version was refused. InForce says that an older version still serves.
type Rejection struct {
	Type    string `json:"type"`
	Name    string `json:"name"`
	Error   string `json:"error"`
	InForce bool   `json:"in_force"`
}

// Status says how things stand.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := Status{
		Servers: []ServerStatus{}, Rejected: []Rejection{}, Resources: map[string]int{"secret": 0},
		Ignored: append([]mesh.Warning{}, c.cfg.Bootstrap.Ignored...),
		Warming: c.builder.Warming(), Synced: c.running && len(c.awaited) == 0,
	}
	for _, key := range slices.Sorted(maps.Keys(c.streams)) {
		s := c.streams[key]
		row := ServerStatus{Name: s.source.path, Stream: s.title(), Delta: s.source.delta, Connected: s.connected, LastError: s.lastError}
		if s.source.server != nil {
			row.Name = s.source.server.name
			if reason := s.source.server.dialError(); reason != "" && !s.connected {
				row.LastError = reason
			}
		}
		st.Servers = append(st.Servers, row)
	}
	for kind := range kinds {
		st.Resources[kind.String()] = 0
		for name, r := range c.resources[kind] {
			if r.any != nil {
				st.Resources[kind.String()]++
			}
			if r.rejected != "" {
				st.Rejected = append(st.Rejected, Rejection{kind.String(), name, r.rejected, r.any != nil})
			}
			st.Ignored = append(st.Ignored, r.warnings...)
		}
	}
	slices.SortFunc(st.Rejected, func(a, b Rejection) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name))
	})
	slices.SortFunc(st.Ignored, func(a, b mesh.Warning) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Field, b.Field))
	})
	return st
}
