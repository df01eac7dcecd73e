package agent

import (
	"encoding/json"
	"fmt"

	"github.com/sockmesh/sockmesh/pkg/xds"
)

// dumpShape says how Envoy's ConfigDump holds resources of one type: https://www.envoyproxy.io/docs/envoy/latest/api-v3/admin/v3/config_dump.proto.
// Tools that read Envoy's /config_dump read this one.
type dumpShape struct {
	kind            string // pkg/xds' name of the type
	dump            string // message in envoy.admin.v3
	static, dynamic string // its fields
	field           string // in an entry
	resource        string // the resource's type
	nested          bool   // dynamic entries have name and active_state
}

var dumpShapes = []dumpShape{
	{"cluster", "ClustersConfigDump", "static_clusters", "dynamic_active_clusters", "cluster", "envoy.config.cluster.v3.Cluster", false},
	{"listener", "ListenersConfigDump", "static_listeners", "dynamic_listeners", "listener", "envoy.config.listener.v3.Listener", true},
	{"route", "RoutesConfigDump", "static_route_configs", "dynamic_route_configs", "route_config", "envoy.config.route.v3.RouteConfiguration", false},
	{"endpoint", "EndpointsConfigDump", "static_endpoint_configs", "dynamic_endpoint_configs", "endpoint_config", "envoy.config.endpoint.v3.ClusterLoadAssignment", false},
}

const typeURL = "type.googleapis.com/"

// ConfigDump implements admin.Source. pkg/xds has redacted secrets already.
func (a *Agent) ConfigDump() (json.RawMessage, error) {
	var resources []xds.DumpedResource
	if a.xds != nil {
		resources = a.xds.Dump()
	}
	return configDump(resources)
}

func configDump(resources []xds.DumpedResource) (json.RawMessage, error) {
	configs := make([]map[string]any, 0, len(dumpShapes))
	for _, shape := range dumpShapes {
		dump := map[string]any{"@type": typeURL + "envoy.admin.v3." + shape.dump}
		var static, dynamic []any
		for i := range resources {
			r := &resources[i]
			if r.Type != shape.kind {
				continue
			}
			entry, err := shape.entry(r)
			if err != nil {
				return nil, err
			}
			if r.Source == "static" {
				static = append(static, entry)
			} else {
				dynamic = append(dynamic, entry)
			}
		}
		if static != nil {
			dump[shape.static] = static
		}
		if dynamic != nil {
			dump[shape.dynamic] = dynamic
		}
		configs = append(configs, dump)
	}
	return json.Marshal(map[string]any{"configs": configs})
}

func (s *dumpShape) entry(r *xds.DumpedResource) (map[string]any, error) {
	state := map[string]any{}
	if r.Version != "" {
		state["version_info"] = r.Version
	}
	if r.Resource != nil {
		var fields map[string]any
		if err := json.Unmarshal(r.Resource, &fields); err != nil {
			return nil, fmt.Errorf("%s %q: %w", r.Type, r.Name, err)
		}
		fields["@type"] = typeURL + s.resource
		state[s.field] = fields
	}
	entry := state
	if s.nested && r.Source != "static" {
		entry = map[string]any{"name": r.Name}
		if r.Resource != nil {
			entry["active_state"] = state
		}
	}
	if r.Rejected != "" {
		entry["error_state"] = map[string]any{"details": r.Rejected}
	}
	return entry, nil
}
