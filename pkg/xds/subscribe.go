package xds

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
)

// source is one place that resources come from.
type source struct {
	key    string
	ads    bool
	delta  bool
	server *server // nil for files
	path   string
}

func (s *source) close() {
	if s.server != nil {
		s.server.close()
	}
}

// streamKey names the stream that carries a kind: one for all with ADS, else one each.
func (s *source) streamKey(kind Kind) string {
	if s.ads {
		return s.key
	}
	return s.key + "|" + kind.String()
}

func fetchTimeout(cs *corev3.ConfigSource) time.Duration {
	if t := cs.GetInitialFetchTimeout(); t != nil {
		return t.AsDuration()
	}
	return defaultFetchTimeout
}

// source finds or makes the source that a ConfigSource names; parent is where the resource that holds the
// ConfigSource came from.
func (c *Client) source(cs *corev3.ConfigSource, parent *source) (*source, error) {
	switch spec := cs.GetConfigSourceSpecifier().(type) {
	case *corev3.ConfigSource_Ads:
		ads := c.cfg.Bootstrap.adsConfig()
		if ads == nil {
			return nil, errors.New("ads: the bootstrap has no dynamic_resources.ads_config")
		}
		return c.grpcSource("ads", ads, true)
	case *corev3.ConfigSource_Self:
		if parent == nil {
			return nil, errors.New("self: the resource is not from a server")
		}
		return parent, nil
	case *corev3.ConfigSource_ApiConfigSource:
		encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(spec.ApiConfigSource)
		if err != nil {
			return nil, err
		}
		return c.grpcSource("grpc:"+string(encoded), spec.ApiConfigSource, false)
	case *corev3.ConfigSource_PathConfigSource:
		return c.pathSource(spec.PathConfigSource.GetPath()), nil
	case *corev3.ConfigSource_Path:
		return c.pathSource(spec.Path), nil
	}
	return nil, errors.New("ads, self, api_config_source or path_config_source is needed")
}

func (c *Client) pathSource(path string) *source {
	key := "path:" + path
	if c.sources[key] == nil {
		c.sources[key] = &source{key: key, path: path}
	}
	return c.sources[key]
}

func (c *Client) grpcSource(key string, api *corev3.ApiConfigSource, ads bool) (*source, error) {
	if s := c.sources[key]; s != nil {
		return s, nil
	}
	s := &source{key: key, ads: ads}
	switch api.GetApiType() {
	case corev3.ApiConfigSource_GRPC, corev3.ApiConfigSource_AGGREGATED_GRPC:
	case corev3.ApiConfigSource_DELTA_GRPC, corev3.ApiConfigSource_AGGREGATED_DELTA_GRPC:
		s.delta = true
	default:
		return nil, fmt.Errorf("api_type: %s is not supported, only GRPC and DELTA_GRPC", api.GetApiType())
	}
	if len(api.GetGrpcServices()) == 0 {
		return nil, errors.New("grpc_services: empty")
	}
	server, err := c.cfg.Bootstrap.dial(api.GetGrpcServices()[0])
	if err != nil {
		return nil, fmt.Errorf("grpc_services[0]: %w", err)
	}
	s.server = server
	if !ads {
		s.key = "grpc:" + server.name + deltaSuffix(s.delta)
		if old := c.sources[s.key]; old != nil { // the same server, described in other words
			server.close()
			c.sources[key] = old
			return old, nil
		}
		c.sources[s.key] = s
	}
	c.sources[key] = s
	return s, nil
}

func deltaSuffix(delta bool) string {
	if delta {
		return ":delta"
	}
	return ""
}

// subscribeRoots subscribes to all listeners and all clusters where the bootstrap says.
func (c *Client) subscribeRoots() error {
	dynamic := c.cfg.Bootstrap.proto.GetDynamicResources()
	for _, root := range []struct {
		kind  Kind
		field string
		cs    *corev3.ConfigSource
	}{{Clusters, "cds_config", dynamic.GetCdsConfig()}, {Listeners, "lds_config", dynamic.GetLdsConfig()}} {
		if root.cs == nil {
			continue
		}
		src, err := c.source(root.cs, nil)
		if err != nil {
			return fmt.Errorf("%s: dynamic_resources.%s: %w", c.cfg.Bootstrap.name, root.field, err)
		}
		s := c.stream(src, root.kind)
		s.subscription(root.kind).wildcard = true
		c.awaited[awaitKey{s.key, root.kind}] = &await{timeout: fetchTimeout(root.cs)}
	}
	return nil
}

// stream finds or makes the stream that carries a kind from a source, and starts it if the client runs.
func (c *Client) stream(src *source, kind Kind) *stream {
	key := src.streamKey(kind)
	s := c.streams[key]
	if s == nil {
		s = newStream(c, src, key, kind)
		c.streams[key] = s
		if c.running {
			c.start(s)
		}
	}
	return s
}

func (c *Client) start(s *stream) {
	ctx, cancel := context.WithCancel(c.ctx)
	s.cancel = cancel
	c.group.Go(func() {
		if s.source.path != "" {
			s.watchPath(ctx)
		} else {
			s.run(ctx)
		}
	})
}

// refreshSubscriptions brings the on-demand subscriptions in line with what clusters and listeners ask for.
func (c *Client) refreshSubscriptions() {
	var needed [kinds]map[string]want
	for k := range kinds {
		needed[k] = map[string]want{}
	}
	for _, parent := range []Kind{Clusters, Listeners} {
		for _, r := range c.resources[parent] {
			for _, n := range r.needs {
				needed[n.kind][n.name] = n.want
			}
		}
	}
	c.refreshKind(Endpoints, needed[Endpoints])
	c.refreshKind(Routes, needed[Routes])
	if c.running {
		c.names.set(c.builder.WantedNames())
	}
	// A stream of its own is closed with its last subscription; the shared one stays.
	for key, s := range c.streams {
		if !s.source.ads && s.idle() {
			if s.cancel != nil {
				s.cancel()
			}
			delete(c.streams, key)
		}
	}
}

// refreshKind subscribes to what is newly needed and unsubscribes from what no longer is. The builder keeps what
// it still uses.
func (c *Client) refreshKind(kind Kind, needed map[string]want) {
	for name, w := range c.wanted[kind] {
		if n, still := needed[name]; still && n.source == w.source {
			continue
		}
		if w.timer != nil {
			w.timer.Stop()
		}
		delete(c.wanted[kind], name)
		if s := c.streams[w.source.streamKey(kind)]; s != nil {
			s.unsubscribe(kind, name)
		}
	}
	for name, n := range needed {
		if _, known := c.wanted[kind][name]; known {
			continue
		}
		c.stream(n.source, kind).subscribe(kind, name)
		c.wanted[kind][name] = c.startFetchTimer(kind, name, n)
	}
	for name, r := range c.resources[kind] {
		if _, ok := needed[name]; !ok && r.source != staticSource {
			delete(c.resources[kind], name)
			c.dirty = true
		}
	}
}

// startFetchTimer bounds the wait for a name's first answer; zero waits for ever (Envoy's meaning of 0).
func (c *Client) startFetchTimer(kind Kind, name string, w want) want {
	if w.timeout == 0 || !c.running || c.resources[kind][name] != nil || w.timer != nil {
		return w
	}
	w.timer = time.AfterFunc(w.timeout, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.resources[kind][name] == nil {
			c.log.Warn("xDS server did not answer within initial_fetch_timeout", "type", kind.String(), "name", name, "timeout", w.timeout)
			c.fetched(kind, name, false)
			c.changed()
		}
	})
	return w
}
