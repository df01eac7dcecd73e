// Package proxy is the data plane: it accepts the connections that the datapath redirects into it, finds out
// where they wanted to go and what the configuration says about that, and gives each to the HTTP or the TCP
// server of a loop.
//
// Follow one connection: a listening socket inside the pod's network namespace (pods.go), or one on the node
// (ingress.go), belongs to a loop, which accepts; limits are checked and the least loaded loop takes it
// (accept.go); there its original destination is looked up, a listener and a filter chain are chosen from the
// loop's snapshot, and the chain's server takes over (worker.go).
//
// Configuration arrives as immutable snapshots. Each loop switches to a new one at one point between events:
// connections, routes and clusters change together, and a connection that stays open learns its listener's new
// routes at that moment too. What a change doesn't mention isn't touched.
//
// The package knows nothing of Kubernetes or of BPF maps: pods, listening sockets, the way to an original
// destination and that past the proxy are handed in.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

const (
	defaultMaxConnsPerPod = 20_000
	defaultPodDrain       = 5 * time.Second
	// spareFiles are left for everything that isn't a proxied connection: BPF maps, logs, the API server.
	spareFiles = 512
	// switchPatience is how long a call waits for the loops, which need microseconds.
	switchPatience = 5 * time.Second
	// leaveTime lies between the moment from which no new connection is sent to a listener and its end: one that was sent
	// there just before is on its way, in the hands of a thread that may have lost its core.
	leaveTime = 200 * time.Millisecond
)

// NoHeir is what Config.Leave returns where nobody else listens.
const NoHeir = -1

// ErrClosed is returned once the engine has been closed.
var ErrClosed = errors.New("the proxy engine is closed")

// Origin is where a redirected connection wanted to go.
type Origin struct {
	Addr netip.AddrPort
	// Accelerated: the datapath carries its bytes from socket to socket.
	Accelerated bool
}

// HTTPServer serves the HTTP connections of one loop, only on that loop.
type HTTPServer interface {
	ServeConn(c *loop.Conn, in *stream.ConnInfo)
	// Drain ends every connection as soon as HTTP allows; DrainListener those that the function names.
	Drain()
	DrainListener(which func(*stream.ConnInfo) bool)
	// RemoveSource closes everything of a pod that is gone.
	RemoveSource(key uint64)
}

// Config of an Engine.
type Config struct {
	// Concurrency is the number of loops; 0 means one for each core.
	Concurrency int
	// IO is how the loops talk to the kernel: a value of loop.Config.IO; "" means loop.IOAuto.
	IO string
	// Own tells the datapath that a socket is the proxy's, before it connects: such sockets are exempt from listener claims.
	// Called on the loops, must not block. nil: nobody needs to know.
	Own func(fd int) error
	// Leave tells the datapath that a pod's listener is about to close. If another agent listens on its port, too, it returns
	// the place of that one's listener among the two, 0 or 1; else no new connection may be sent there from now on, and it
	// returns NoHeir. Called on the loops, must not block. nil: nobody sends any.
	Leave func(fd int) (heir int, err error)
	// OriginalDst looks up where an accepted connection wanted to go. Called on the loops, must not block.
	OriginalDst func(fd int) (Origin, error)
	// StepAside lets the bytes of a connection skip the proxy, where that has nothing more to look at; nil: never.
	// StepAsideAfter is after how many pieces of data it is asked; 0 takes the project's own choice.
	StepAside      aside.Func
	StepAsideAfter int
	// PairUp does the same for long bodies between an HTTP client's connection and an endpoint's; nil: never.
	PairUp aside.PairFunc
	// NewHTTP makes a loop's HTTP server; nil takes the project's own.
	NewHTTP func(*Worker) HTTPServer

	// MaxConns bounds the accepted connections of all pods; 0 takes what the descriptor limit allows (each
	// may need an upstream socket as well). MaxConnsPerPod: 0 means 20,000.
	MaxConns, MaxConnsPerPod int
	// PodDrain is how long the connections of a removed pod may go on; 0 means 5 s, negative not at all.
	PodDrain time.Duration
	// LocalAddr stands in x-forwarded-for for clients that came by loopback. Optional.
	LocalAddr netip.Addr

	// Metrics and Logs may be nil: nothing is shown, nothing is logged.
	Metrics *telemetry.Metrics
	Logs    *telemetry.Logs
	Logger  *slog.Logger
}

// Engine is the running proxy. All methods may be called from any goroutine.
type Engine struct {
	cfg      Config
	log      *slog.Logger
	workers  []*Worker
	shared   *upstream.Shared
	node     *stream.Source
	snapshot atomic.Pointer[mesh.Snapshot]
	started  sync.WaitGroup
	stop     chan struct{} // closed by Close

	active   atomic.Int64
	nextID   atomic.Uint64
	accepted atomic.Uint64
	refused  [refusals]atomic.Uint64

	mu       sync.Mutex
	pods     map[uint64]*podState        // guarded by mu
	ingress  map[netip.AddrPort]*ingress // guarded by mu
	removing map[*podState]struct{}      // guarded by mu
	nextLoop int                         // guarded by mu: which loop gets the next listening socket
	retry    *time.Timer                 // guarded by mu: of addresses that could not be bound
	running  bool                        // guarded by mu
	draining bool                        // guarded by mu
	closed   bool                        // guarded by mu
}

// New makes an engine. Its loops run after Start.
func New(cfg Config) (*Engine, error) {
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = runtime.NumCPU()
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.MaxConnsPerPod <= 0 {
		cfg.MaxConnsPerPod = defaultMaxConnsPerPod
	}
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = connsByFiles()
		// Whatever one pod does, there is room for the others.
		cfg.MaxConnsPerPod = min(cfg.MaxConnsPerPod, max(cfg.MaxConns/2, 1))
	}
	if cfg.PodDrain == 0 {
		cfg.PodDrain = defaultPodDrain
	}
	if cfg.OriginalDst == nil {
		cfg.OriginalDst = func(int) (Origin, error) { return Origin{}, errors.New("no datapath") }
	}
	if cfg.Metrics == nil {
		cfg.Metrics = telemetry.NewMetrics()
	}
	if cfg.NewHTTP == nil {
		cfg.NewHTTP = newHTTP
	}
	e := &Engine{
		cfg: cfg, log: cfg.Logger, shared: upstream.NewShared(),
		node: &stream.Source{}, stop: make(chan struct{}),
		pods: map[uint64]*podState{}, ingress: map[netip.AddrPort]*ingress{}, removing: map[*podState]struct{}{},
	}
	for i := range cfg.Concurrency {
		w, err := newWorker(e, i)
		if err != nil {
			for _, w := range e.workers { // running a stopped loop closes what New opened
				w.loop.Stop()
				go func() { _ = w.loop.Run() }()
				w.loop.Wait()
			}
			return nil, err
		}
		e.workers = append(e.workers, w)
	}
	return e, nil
}

// connsByFiles is how many connections the descriptor limit has room for, two descriptors each.
func connsByFiles() int {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 10_000
	}
	return int(max((int64(min(lim.Cur, 4<<20))-spareFiles)/2, 64))
}

// Start runs the loops. Call it once.
func (e *Engine) Start() {
	e.mu.Lock()
	e.running = true
	e.mu.Unlock()
	for _, w := range e.workers {
		e.started.Add(1)
		go func() {
			defer e.started.Done()
			if err := w.loop.Run(); err != nil {
				e.log.Error("a proxy loop ended", "error", err)
			}
		}()
	}
	e.started.Go(func() { e.watchPulse(e.stop) })
}

// SetSnapshot puts a configuration in force: on every loop, and for listening sockets on the node, of which
// only those that changed are opened or closed. When it returns the loops have switched, so that the datapath
// may then send them connections that only this configuration knows.
func (e *Engine) SetSnapshot(s *mesh.Snapshot) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	e.snapshot.Store(s)
	switched := make(chan struct{}, len(e.workers))
	asked := 0
	for _, w := range e.workers {
		if w.loop.Post(func() { w.update(s); switched <- struct{}{} }) {
			asked++
		}
	}
	e.await(switched, asked, "taken over the configuration")
	if !e.draining {
		e.bind(s)
	}
}

// await waits until loops have answered n times. e.mu is held: loops never take it.
func (e *Engine) await(done <-chan struct{}, n int, what string) {
	if !e.running {
		return
	}
	late := time.NewTimer(switchPatience)
	defer late.Stop()
	for ; n > 0; n-- {
		select {
		case <-done:
		case <-late.C:
			e.log.Error("proxy loops have not "+what+" in time", "loops", n, "after", switchPatience)
			return
		}
	}
}

// Snapshot is the configuration that was set last.
func (e *Engine) Snapshot() *mesh.Snapshot { return e.snapshot.Load() }

// Drain stops accepting and waits until every connection has ended, telling HTTP clients to leave, or until
// ctx is done, whose error it returns then.
func (e *Engine) Drain(ctx context.Context) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return ErrClosed
	}
	e.draining = true
	e.unbind()
	for _, p := range e.pods {
		e.leave(p)
	}
	e.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-time.After(leaveTime):
	}
	e.mu.Lock()
	if !e.closed {
		for _, p := range e.pods {
			e.closeListeners(p)
		}
	}
	e.mu.Unlock()
	for _, w := range e.workers {
		w.loop.Post(w.http.Drain)
	}
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for e.active.Load() > 0 {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d connections are still open: %w", e.active.Load(), ctx.Err())
		case <-poll.C:
		}
	}
	return nil
}

// Close ends everything at once and returns when the loops have ended and every socket is closed.
func (e *Engine) Close() {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return
	}
	e.closed = true
	close(e.stop)
	if e.retry != nil {
		e.retry.Stop()
	}
	e.mu.Unlock()
	for _, w := range e.workers {
		w.loop.Stop()
	}
	e.started.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range e.pods {
		p.close()
	}
	for p := range e.removing {
		p.close()
	}
	for _, w := range e.workers {
		w.close()
	}
}
