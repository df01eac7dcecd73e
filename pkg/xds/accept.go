package xds

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// incoming is one resource of a response.
type incoming struct {
	name    string // empty if it has to be found in the resource
	version string
	any     *anypb.Any
}

// apply takes in the resources of one response. Each good one comes into force even if others are bad (gRFC
// A46); the error names every bad one and becomes the NACK. complete means that what is absent is gone.
func (c *Client) apply(s *stream, kind Kind, list []incoming, complete bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	present := map[string]int{}
	named := true
	type decoded struct {
		incoming
		message proto.Message
	}
	var good []decoded
	for i, in := range list {
		in.any = unwrap(&in)
		message, err := kind.decode(in.any)
		if err != nil {
			errs = append(errs, fmt.Errorf("resource %d %q: %w", i, in.name, err))
			named = named && in.name != ""
			present[in.name]++
			continue
		}
		if name := resourceName(message); in.name == "" {
			in.name = name
		} else if name != in.name && name != "" {
			errs = append(errs, fmt.Errorf("%s %q: is called %q inside", kind, in.name, name))
			present[in.name]++
			continue
		}
		present[in.name]++
		good = append(good, decoded{in, message})
	}
	for _, d := range good {
		switch {
		case present[d.name] > 1:
			if !slices.ContainsFunc(errs, func(e error) bool { return errors.Is(e, duplicateError(d.name)) }) {
				errs = append(errs, fmt.Errorf("%s: %w", kind, duplicateError(d.name)))
			}
		case !s.asked(kind, d.name):
		default:
			if err := c.accept(s.source, s.key, kind, d.incoming, d.message); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if complete && named {
		for name, r := range c.resources[kind] {
			if present[name] == 0 && r.source == s.key {
				c.remove(kind, name)
			}
		}
	}
	c.answered(awaitKey{s.key, kind})
	c.refreshSubscriptions()
	c.changed()
	return errors.Join(errs...)
}

type duplicateError string

func (e duplicateError) Error() string {
	return fmt.Sprintf("%q: is in the response more than once", string(e))
}

// unwrap takes a resource out of the Resource message that a state-of-the-world server may put around it.
func unwrap(in *incoming) *anypb.Any {
	if in.any.GetTypeUrl() != typePrefix+"envoy.service.discovery.v3.Resource" {
		return in.any
	}
	var wrapper discoveryv3.Resource
	if proto.Unmarshal(in.any.GetValue(), &wrapper) != nil || wrapper.GetResource() == nil {
		return in.any
	}
	in.name = wrapper.GetName()
	if wrapper.GetVersion() != "" {
		in.version = wrapper.GetVersion()
	}
	return wrapper.GetResource()
}

// accept compiles one resource and, if it is good, hands it to the builder.
func (c *Client) accept(src *source, origin string, kind Kind, in incoming, message proto.Message) error {
	r := c.resources[kind][in.name]
	if r == nil {
		r = &resource{name: in.name}
		c.resources[kind][in.name] = r
	}
	if r.source == staticSource && origin != staticSource {
		return nil // Envoy too: what the bootstrap defines stays
	}
	if r.any != nil && bytes.Equal(r.any.GetValue(), in.any.GetValue()) {
		// Sent again, perhaps under a new version: nothing to compile, and its pointer stays the same.
		c.dirty = c.dirty || r.version != in.version
		r.version, r.source, r.rejected, r.refused = in.version, origin, "", nil
		return nil
	}
	value, warnings, err := compile(message, in.version)
	var needs []need
	if err == nil {
		needs, err = c.needsOf(src, message)
	}
	if err != nil {
		if r.rejected != err.Error() {
			c.log.Warn("xDS resource refused", "type", kind.String(), "name", in.name, "version", in.version, "from", origin, "error", err)
		}
		r.rejected, r.refused = err.Error(), in.any
		if r.source == "" {
			r.source = origin
		}
		c.fetched(kind, in.name, false)
		return err
	}
	if len(warnings) > 0 && !slices.Equal(warnings, r.warnings) {
		c.log.Info("xDS fields ignored", "type", kind.String(), "name", in.name, "fields", fieldList(warnings))
	}
	*r = resource{name: in.name, version: in.version, source: origin, any: in.any, warnings: warnings, needs: needs}
	c.dirty = true
	switch v := value.(type) {
	case *mesh.Cluster:
		c.builder.SetCluster(v)
	case *mesh.Endpoints:
		c.builder.SetEndpoints(v)
	case *mesh.Listener:
		c.builder.SetListener(v)
	case *mesh.RouteConfig:
		c.builder.SetRoutes(v)
	}
	c.fetched(kind, in.name, true)
	return nil
}

func fieldList(warnings []mesh.Warning) string {
	fields := make([]string, len(warnings))
	for i, w := range warnings {
		fields[i] = w.Field
	}
	return strings.Join(fields, ", ")
}

// remove forgets a resource that the control plane took back. Endpoints and routes stay in force while something
// still uses them, as in Envoy: the cluster or listener decides.
func (c *Client) remove(kind Kind, name string) {
	r := c.resources[kind][name]
	if r == nil || r.source == staticSource {
		return
	}
	delete(c.resources[kind], name)
	c.dirty = true
	switch kind {
	case Clusters:
		c.builder.DeleteCluster(name, time.Now())
	case Listeners:
		c.builder.DeleteListener(name)
	}
}

// applyRemoved takes in a delta response's removed_resources. For a name that never had a resource this is the
// answer "there is none", which ends the wait for it.
func (c *Client) applyRemoved(s *stream, kind Kind, names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range names {
		if !s.asked(kind, name) {
			continue
		}
		if r := c.resources[kind][name]; r != nil && r.source == s.key {
			c.remove(kind, name)
		}
		c.fetched(kind, name, false)
	}
	c.refreshSubscriptions()
	c.changed()
}

// fetched ends the initial fetch of an on-demand name. Without a good resource whoever waits for it goes on
// with nothing, as if the time-out had struck.
func (c *Client) fetched(kind Kind, name string, good bool) {
	if w, ok := c.wanted[kind][name]; ok && w.timer != nil {
		w.timer.Stop()
		w.timer = nil
		c.wanted[kind][name] = w
	}
	if good {
		return
	}
	switch kind {
	case Endpoints:
		c.builder.EndpointsTimedOut(name)
	case Routes:
		c.builder.RoutesTimedOut(name)
	}
}

// needsOf finds which endpoints or routes a resource asks for, and from where.
func (c *Client) needsOf(src *source, message proto.Message) ([]need, error) {
	switch m := message.(type) {
	case *clusterv3.Cluster:
		eds := m.GetEdsClusterConfig()
		if eds == nil || m.GetClusterType() == nil && m.GetType() != clusterv3.Cluster_EDS {
			return nil, nil
		}
		from, err := c.source(eds.GetEdsConfig(), src)
		if err != nil {
			return nil, fmt.Errorf("cluster %q: eds_cluster_config.eds_config: %w", m.GetName(), err)
		}
		name := eds.GetServiceName()
		if name == "" {
			name = m.GetName()
		}
		return []need{{Endpoints, name, want{source: from, timeout: fetchTimeout(eds.GetEdsConfig())}}}, nil
	case *listenerv3.Listener:
		return c.routesOf(src, m)
	}
	return nil, nil
}

func (c *Client) routesOf(src *source, m *listenerv3.Listener) ([]need, error) {
	var needs []need
	chains := m.GetFilterChains()
	if m.GetDefaultFilterChain() != nil {
		chains = append(slices.Clip(chains), m.GetDefaultFilterChain())
	}
	for _, chain := range chains {
		for _, filter := range chain.GetFilters() {
			manager := &hcmv3.HttpConnectionManager{}
			if !filter.GetTypedConfig().MessageIs(manager) || filter.GetTypedConfig().UnmarshalTo(manager) != nil || manager.GetRds() == nil {
				continue
			}
			from, err := c.source(manager.GetRds().GetConfigSource(), src)
			if err != nil {
				return nil, fmt.Errorf("listener %q: rds.config_source: %w", m.GetName(), err)
			}
			needs = append(needs, need{Routes, manager.GetRds().GetRouteConfigName(), want{source: from, timeout: fetchTimeout(manager.GetRds().GetConfigSource())}})
		}
	}
	return needs, nil
}
