// Package proxytest runs the HTTP proxy of one loop on loopback, out of an Envoy bootstrap in YAML, for tests:
// real sockets, real configuration, and a record of each request.
package proxytest

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	phttp "github.com/sockmesh/sockmesh/pkg/proxy/http"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop/looptest"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
	_ "github.com/sockmesh/sockmesh/pkg/xds/envoyapi" // every type that an Any may hold
)

// Snapshot compiles the static resources of a bootstrap.
func Snapshot(t testing.TB, bootstrap string) *mesh.Snapshot {
	t.Helper()
	s, err := Compile(bootstrap)
	if err != nil {
		t.Fatalf("%v\nin\n%s", err, bootstrap)
	}
	return s
}

// Compile is Snapshot with an error.
func Compile(bootstrap string) (*mesh.Snapshot, error) {
	js, err := yaml.YAMLToJSON([]byte(bootstrap))
	if err != nil {
		return nil, err
	}
	var b bootstrapv3.Bootstrap
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(js, &b); err != nil {
		return nil, err
	}
	builder := mesh.NewBuilder()
	for _, c := range b.GetStaticResources().GetClusters() {
		compiled, _, err := mesh.CompileCluster(c, "1")
		if err != nil {
			return nil, fmt.Errorf("cluster %s: %w", c.GetName(), err)
		}
		builder.SetCluster(compiled)
	}
	for _, l := range b.GetStaticResources().GetListeners() {
		compiled, _, err := mesh.CompileListener(l, "1")
		if err != nil {
			return nil, fmt.Errorf("listener %s: %w", l.GetName(), err)
		}
		builder.SetListener(compiled)
	}
	now := time.Now()
	builder.Build(now)
	// A listener that names a cluster which does not exist comes into force when the grace for that is over.
	s, _, _ := builder.Build(now.Add(time.Hour))
	if len(s.Listeners) != len(b.GetStaticResources().GetListeners()) {
		return nil, fmt.Errorf("not warm: %v", builder.Warming())
	}
	return s, nil
}

// Record is what is kept of a telemetry.Record.
type Record struct {
	Status                   int
	Flags, Details           string
	Cluster, Route, Upstream string
	Attempts                 uint32
	Received, Sent           uint64
	Path                     string
}

// Proxy is a running proxy.
type Proxy struct {
	// Addr of the first listener.
	Addr string
	Loop *loop.Loop
	// Server may be used within Do only.
	Server  *phttp.Server
	Records chan Record
	// SourceOf tells pods apart by the client's address; nil: one source for all. Set it before the first
	// connection.
	SourceOf func(peer netip.AddrPort) *stream.Source

	snap      atomic.Pointer[mesh.Snapshot]
	upstreams *upstream.Manager
	shard     *telemetry.Shard
	stop      sync.Once
	source    *stream.Source
}

// Start runs the bootstrap's listeners, each on a free port of 127.0.0.1 whatever its address says, until the
// test ends.
func Start(t testing.TB, bootstrap string) *Proxy {
	t.Helper()
	return StartSnapshot(t, Snapshot(t, bootstrap))
}

// StartSnapshot is Start for a compiled configuration.
func StartSnapshot(t testing.TB, s *mesh.Snapshot) *Proxy {
	t.Helper()
	p, err := Run(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// Run starts a proxy; Stop ends it.
func Run(s *mesh.Snapshot) (*Proxy, error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	l, err := loop.New(loop.Config{IO: looptest.IO, Logger: log})
	if err != nil {
		return nil, err
	}
	p := &Proxy{Loop: l, Records: make(chan Record, 10000), source: &stream.Source{}}
	p.snap.Store(s)
	p.upstreams = upstream.NewManager(l, upstream.Config{Snapshot: p.snap.Load, Logger: log, Seed: 1})
	p.shard = telemetry.NewMetrics().NewShard(func(f func()) { l.Post(f) })
	p.Server = phttp.NewServer(phttp.Deps{
		Loop: l, Upstreams: p.upstreams, Snapshot: p.snap.Load, Shard: p.shard, Logs: telemetry.NewLogs(), Logger: log,
		Observe: p.observe,
	})
	addr, fd, err := listen()
	if err != nil {
		return nil, err
	}
	p.Addr = addr
	go func() { _ = l.Run() }()
	var id uint64
	p.Do(func() {
		_, err = l.Listen(fd, func(fd int, peer netip.AddrPort) {
			id++
			now := p.snap.Load()
			c := l.Adopt(fd, peer, nobody{}, loop.Options{})
			source := p.source
			if p.SourceOf != nil {
				source = p.SourceOf(peer)
			}
			p.Server.ServeConn(c, &stream.ConnInfo{
				Source: source, Listener: now.Listeners[0], Chain: chainOf(now.Listeners[0]),
				Orig: netip.MustParseAddrPort(addr), Peer: peer, ID: id,
			})
		})
	})
	return p, err
}

func chainOf(l *mesh.Listener) *mesh.FilterChain {
	if len(l.Chains) > 0 {
		return l.Chains[0]
	}
	return l.Default
}

// listen opens a socket on a free port and gives it up to the caller.
func listen() (addr string, fd int, err error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", 0, err
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	fd, err = dup(int(f.Fd()))
	return ln.Addr().String(), fd, err
}

// Stop ends the proxy.
func (p *Proxy) Stop() {
	p.stop.Do(func() {
		p.Loop.Stop()
		p.Loop.Wait()
	})
}

// Do runs fn on the loop and waits for it.
func (p *Proxy) Do(fn func()) {
	done := make(chan struct{})
	if p.Loop.Post(func() { fn(); close(done) }) {
		<-done
	}
}

// Update publishes another configuration.
func (p *Proxy) Update(s *mesh.Snapshot) {
	p.snap.Store(s)
	p.Do(p.upstreams.Update)
}

// Stats are the server's.
func (p *Proxy) Stats() (st phttp.Stats) {
	p.Do(func() { st = p.Server.Stats() })
	return st
}

func (p *Proxy) observe(r *telemetry.Record) {
	if len(p.Records) == cap(p.Records) {
		return // a benchmark: nobody looks
	}
	rec := Record{
		Status: r.Status, Flags: r.Flags.String(), Details: r.Details, Cluster: r.UpstreamCluster, Route: r.RouteName,
		Attempts: r.Attempts, Received: r.BytesReceived, Sent: r.BytesSent,
	}
	if r.UpstreamHost.IsValid() {
		rec.Upstream = r.UpstreamHost.String()
	}
	if r.Request != nil {
		rec.Path = string(r.Request.Path())
	}
	p.Records <- rec
}

// Settled waits until nothing is in progress: no request, no downstream connection, and says what is left.
func (p *Proxy) Settled(t testing.TB) phttp.Stats {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		st := p.Stats()
		if st.Connections == 0 && st.Requests == 0 && st.PoolWaiting == 0 && st.PoolConnecting == 0 {
			return st
		}
		if time.Now().After(deadline) {
			t.Fatalf("still in progress: %+v", st)
		}
	}
}

// Record waits for the record of the request that finishes next.
func (p *Proxy) Record(t testing.TB) Record {
	t.Helper()
	select {
	case r := <-p.Records:
		return r
	case <-time.After(20 * time.Second):
		t.Fatal("no request was recorded")
		return Record{}
	}
}

// nobody handles a connection for the moment between its adoption and ServeConn.
type nobody struct{}

func (nobody) OnConnect(*loop.Conn, error)   {}
func (nobody) OnData(*loop.Conn, []byte) int { return 0 }
func (nobody) OnEOF(*loop.Conn)              {}
func (nobody) OnDrained(*loop.Conn)          {}
func (nobody) OnClose(*loop.Conn, error)     {}
