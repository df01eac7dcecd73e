package xds

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Config is what a Client needs.
type Config struct {
	// Bootstrap says where the configuration comes from; see LoadBootstrap and BootstrapForServer.
	Bootstrap *Bootstrap
	// NodeID and Version fill the node message where the bootstrap has none.
	NodeID, Version string
	// StateDir is where the last good configuration is kept across restarts; empty: nowhere.
	StateDir string
	// OnSnapshot gets every snapshot, in order, from one goroutine. The first one comes when the first answers
	// are in (or from disk).
	OnSnapshot func(*mesh.Snapshot)
	// Resolver looks up names of STRICT_DNS and LOGICAL_DNS clusters; nil: the system's.
	Resolver Resolver
	Logger   *slog.Logger

	// BackoffBase and BackoffMax bound the pause before a stream is opened again (default 500 ms and 30 s).
	BackoffBase, BackoffMax time.Duration
}

// Client is one data plane's view of its control planes.
type Client struct {
	cfg     Config
	log     *slog.Logger
	node    *corev3.Node
	ctx     context.Context
	cancel  context.CancelFunc
	group   sync.WaitGroup
	publish chan struct{} // capacity 1: something changed
	names   *nameWatcher

	// mu guards all below, and the Builder.
	mu        sync.Mutex
	builder   *mesh.Builder
	snapshot  *mesh.Snapshot
	resources [kinds]map[string]*resource
	wanted    [kinds]map[string]want // on-demand names and where from
	sources   map[string]*source
	streams   map[string]*stream
	// awaited holds the wildcard subscriptions that have not been answered; until it is empty nothing is
	// published, so that the first snapshot is a whole one. Configuration from disk empties it.
	awaited map[awaitKey]*await
	dirty   bool // the state file is behind
	running bool
}

// resource is what is known of one name.
type resource struct {
	name, version string
	// source is the stream that it came from; "static" and "path:…" too.
	source string
	any    *anypb.Any // last accepted version; nil if none was ever
	// rejected is why the latest version was refused; empty once a good one came.
	rejected string
	refused  *anypb.Any // that version
	warnings []mesh.Warning
	needs    []need // on-demand resources that the accepted version asks for
}

// need is an on-demand resource that a cluster or listener asks for.
type need struct {
	kind Kind
	name string
	want
}

// want says where a resource is to come from.
type want struct {
	source  *source
	timeout time.Duration
	timer   *time.Timer
}

// defaultFetchTimeout is Envoy's initial_fetch_timeout.
const defaultFetchTimeout = 15 * time.Second

const (
	defaultBackoffBase = 500 * time.Millisecond
	defaultBackoffMax  = 30 * time.Second
)

const staticSource = "static"

// New checks the bootstrap's static resources and sources and loads what the state directory has. Resources
// that are refused do not make it fail: they are in Status. Nothing is connected before Run.
func New(cfg Config) (*Client, error) {
	if cfg.Bootstrap == nil {
		return nil, errors.New("xds: no bootstrap: give --bootstrap FILE or --xds ADDR")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.OnSnapshot == nil {
		cfg.OnSnapshot = func(*mesh.Snapshot) {}
	}
	if cfg.BackoffBase == 0 {
		cfg.BackoffBase = defaultBackoffBase
	}
	if cfg.BackoffMax == 0 {
		cfg.BackoffMax = defaultBackoffMax
	}
	c := &Client{
		cfg: cfg, log: cfg.Logger, publish: make(chan struct{}, 1), builder: mesh.NewBuilder(),
		sources: map[string]*source{}, streams: map[string]*stream{}, awaited: map[awaitKey]*await{},
	}
	for k := range kinds {
		c.resources[k], c.wanted[k] = map[string]*resource{}, map[string]want{}
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.names = newNameWatcher(c.ctx, cfg.Resolver, c.onAddresses)
	c.node = cfg.Bootstrap.node(cfg.NodeID, cfg.Version)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.loadStatic()
	if err := c.subscribeRoots(); err != nil {
		c.cancel()
		return nil, err
	}
	c.loadState()
	c.refreshSubscriptions()
	return c, nil
}

// Run connects and keeps the configuration up to date until ctx ends. It may be called once.
func (c *Client) Run(ctx context.Context) error {
	defer c.cancel()
	c.mu.Lock()
	c.running = true
	for _, s := range c.streams {
		c.start(s)
	}
	for key, a := range c.awaited {
		if a.timeout > 0 {
			a.timer = time.AfterFunc(a.timeout, func() { c.gaveUp(key) })
		}
	}
	for k := range kinds {
		for name, w := range c.wanted[k] {
			c.wanted[k][name] = c.startFetchTimer(k, name, w)
		}
	}
	c.names.set(c.builder.WantedNames())
	c.mu.Unlock()
	c.changed()
	published := make(chan struct{})
	go func() {
		defer close(published)
		c.publisher()
	}()
	<-ctx.Done()
	c.cancel()
	c.group.Wait()
	<-published
	c.names.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range c.awaited {
		c.answered(key)
	}
	for k := range kinds {
		for _, w := range c.wanted[k] {
			if w.timer != nil {
				w.timer.Stop()
			}
		}
	}
	for _, s := range c.sources {
		s.close()
	}
	c.saveState()
	return ctx.Err()
}

// discard releases a client that was never run.
func (c *Client) discard() {
	c.cancel()
	c.names.close()
	for _, s := range c.sources {
		s.close()
	}
}

// Snapshot returns the last published snapshot; nil before the first one.
func (c *Client) Snapshot() *mesh.Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.snapshot
}

// Synced says whether every subscription to all listeners or clusters was answered (or timed out), so that
// absence means something.
func (c *Client) Synced() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running && len(c.awaited) == 0 && c.snapshot != nil
}

// changed tells the publisher; any number of changes before it gets to work become one snapshot.
func (c *Client) changed() {
	select {
	case c.publish <- struct{}{}:
	default:
	}
}

// saveDelay collects a burst of updates into one write of the state file.
const saveDelay = time.Second

func (c *Client) publisher() {
	again := time.NewTimer(time.Hour)
	again.Stop()
	defer again.Stop()
	save := time.NewTimer(saveDelay)
	defer save.Stop()
	saving := true
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-c.publish:
		case <-again.C:
		case <-save.C:
			c.mu.Lock()
			c.saveState()
			c.mu.Unlock()
			saving = false
			continue
		}
		c.mu.Lock()
		if len(c.awaited) > 0 {
			c.mu.Unlock()
			continue
		}
		snapshot, isNew, next := c.builder.Build(time.Now())
		c.snapshot = snapshot
		if c.dirty && !saving { // never put off: a stream of changes must not keep the file old
			save.Reset(saveDelay)
			saving = true
		}
		c.mu.Unlock()
		if isNew {
			c.cfg.OnSnapshot(snapshot)
		}
		again.Stop()
		if !next.IsZero() {
			again.Reset(max(time.Until(next), time.Millisecond))
		}
	}
}

// awaitKey is one subscription to everything of a kind.
type awaitKey struct {
	stream string
	kind   Kind
}

type await struct {
	timeout time.Duration // 0: wait for ever
	timer   *time.Timer   // nil before Run
}

// answered ends the wait for a wildcard subscription's first response. c.mu is held.
func (c *Client) answered(key awaitKey) {
	a := c.awaited[key]
	if a == nil {
		return
	}
	if a.timer != nil {
		a.timer.Stop()
	}
	delete(c.awaited, key)
	c.changed()
}

// gaveUp is answered after initial_fetch_timeout.
func (c *Client) gaveUp(key awaitKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.awaited[key] != nil {
		c.log.Warn("xDS server did not answer within initial_fetch_timeout", "type", key.kind.String(), "server", key.stream)
	}
	c.answered(key)
}
