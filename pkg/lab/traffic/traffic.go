// Package traffic is a small load generator that can account for every single exchange: what answered it, or exactly
// when and how it failed, how old its connection was, and whether the bytes that came were those that were sent.
// Generators for benchmarks only count; here the question is whether a change broke anybody.
//
// It runs as a process of its own inside a pod (Main), because only a pod's processes are seen by the hooks, and
// reports on its standard output; pkg/lab reads that. kinds.go has the kinds of exchanges, serve.go the server that
// answers all of them.
package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime/pprof"
	"strings"
	"sync"
	"time"
)

// Config of one generator.
type Config struct {
	// Kind of the exchanges; HTTP if empty.
	Kind Kind
	// Size of the payload of an exchange in bytes, for every kind but HTTP; 1 KiB if zero.
	Size int
	// PerConnection is how many exchanges a connection carries before it is closed in the kind's own way; as many as
	// it can if zero.
	PerConnection int
	// Every is the time between reports; 50 ms if zero.
	Every time.Duration
	// Addr is the address to connect to, IP:port; Host and Path go into the request.
	Addr, Host, Path string
	// Headers are added to every request.
	Headers map[string]string
	// Connections that send at the same time, one request after the other.
	Connections int
	// Pause after each answer, so that a generator need not eat the machine.
	Pause time.Duration
	// NewConnection asks for a connection per request.
	NewConnection bool
	// Timeout of one request, after which it has failed; 10 s if zero.
	Timeout time.Duration
}

// Report is the state of a generator at one moment; counters only grow.
type Report struct {
	At       time.Time
	Requests uint64 // finished, either way
	OK       uint64 // answered with 200
	// Answers counts OK answers by the first word of the body.
	Answers map[string]uint64
	// Connected counts connections that were made.
	Connected uint64
	// Bytes of payload that came back and were what had been sent.
	Bytes uint64
	// Failures in the order in which they happened, up to maxFailures; Failed counts all.
	Failed   uint64
	Failures []Failure
}

// Failure is one request that was not answered with 200.
type Failure struct {
	// Began is when the exchange began, or the connect; At when it failed.
	Began, At time.Time
	// Connected is when its connection was made; zero if that was what failed.
	Connected time.Time
	Error     string
	// Corrupt: an answer came, and its bytes were not those that were expected. Nothing excuses that.
	Corrupt bool
}

const (
	maxFailures = 2000
	maxAnswers  = 64
	interval    = 50 * time.Millisecond
	size        = 1 << 10
	// stuckAfter is how long the last exchanges may take before it is written to standard error where they hang.
	stuckAfter = 3 * time.Second
)

// Main is the process: the configuration as JSON in args[0], a Report as a line of JSON on w every interval, and a
// last one when ctx ends.
func Main(ctx context.Context, args []string, w io.Writer) error {
	var cfg Config
	if len(args) != 1 {
		return errors.New("traffic: expected one argument, its configuration as JSON")
	}
	if err := json.Unmarshal([]byte(args[0]), &cfg); err != nil {
		return fmt.Errorf("traffic: configuration: %w", err)
	}
	if cfg.Kind == Serve {
		return serve(ctx, cfg)
	}
	g, err := newGenerator(cfg)
	if err != nil {
		return err
	}
	out := json.NewEncoder(w)
	var wg sync.WaitGroup
	for range cfg.Connections {
		wg.Go(func() { g.client(ctx) })
	}
	tick := time.NewTicker(g.cfg.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			stuck := time.AfterFunc(stuckAfter, func() { _ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1) })
			wg.Wait()
			stuck.Stop()
			return out.Encode(g.report())
		case <-tick.C:
			if err := out.Encode(g.report()); err != nil {
				return err // nobody reads any more
			}
		}
	}
}

type generator struct {
	cfg  Config
	kind kind

	mu   sync.Mutex // guards seen
	seen Report
	sent int // failures that were reported already
}

func newGenerator(cfg Config) (*generator, error) {
	if cfg.Kind == "" {
		cfg.Kind = HTTP
	}
	k, ok := kinds[cfg.Kind]
	if !ok {
		return nil, fmt.Errorf("traffic: there is no kind %q", cfg.Kind)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.Size == 0 {
		cfg.Size = size
	}
	if cfg.Every == 0 {
		cfg.Every = interval
	}
	if cfg.Path == "" {
		cfg.Path = "/"
	}
	return &generator{cfg: cfg, kind: k, seen: Report{Answers: map[string]uint64{}}}, nil
}

// report copies the state; failures are sent once.
func (g *generator) report() Report {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.seen
	r.At = time.Now()
	r.Answers = make(map[string]uint64, len(g.seen.Answers))
	for k, v := range g.seen.Answers {
		r.Answers[k] = v
	}
	r.Failures = append([]Failure(nil), g.seen.Failures[g.sent:]...)
	g.sent = len(g.seen.Failures)
	return r
}

// client has exchange after exchange, on one connection as long as that lasts.
func (g *generator) client(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		conn, err := g.open(ctx)
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil {
			g.failed(Failure{Began: began, At: time.Now(), Error: err.Error()})
			sleep(ctx, max(g.cfg.Pause, 10*time.Millisecond))
			continue
		}
		g.connected()
		g.converse(ctx, conn)
		conn.Close()
	}
}

func (g *generator) open(ctx context.Context) (net.Conn, error) {
	if g.kind.network == "udp" {
		return openDatagrams(g.cfg.Addr)
	}
	dialer := net.Dialer{Timeout: g.cfg.Timeout}
	return dialer.DialContext(ctx, g.kind.network, g.cfg.Addr)
}

func (g *generator) converse(ctx context.Context, conn net.Conn) {
	c := &conversation{cfg: &g.cfg, conn: conn, reader: bufio.NewReader(conn), seed: rand.Uint64()}
	made := time.Now()
	began := made
	fail := func(err error) {
		g.failed(Failure{Began: began, At: time.Now(), Connected: made, Error: err.Error(), Corrupt: errors.Is(err, errCorrupt)})
		sleep(ctx, 10*time.Millisecond)
	}
	for n := 1; ctx.Err() == nil; n++ {
		began = time.Now()
		if err := conn.SetDeadline(began.Add(g.cfg.Timeout)); err != nil {
			fail(err)
			return
		}
		a, err := g.kind.exchange(c)
		if err != nil {
			fail(err)
			return
		}
		g.answered(a)
		sleep(ctx, g.cfg.Pause)
		if a.last || g.cfg.NewConnection {
			return
		}
		if n == g.cfg.PerConnection {
			break
		}
	}
	if g.kind.end != nil {
		_ = conn.SetDeadline(time.Now().Add(g.cfg.Timeout))
		if err := g.kind.end(c); err != nil {
			fail(err)
		}
	}
}

func (g *generator) connected() { g.mu.Lock(); g.seen.Connected++; g.mu.Unlock() }

func (g *generator) answered(a answer) {
	word := "-"
	if f := strings.Fields(a.who); len(f) > 0 {
		word = f[0]
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen.Requests++
	g.seen.OK++
	g.seen.Bytes += a.bytes
	if _, known := g.seen.Answers[word]; !known && len(g.seen.Answers) >= maxAnswers {
		word = "other"
	}
	g.seen.Answers[word]++
}

func (g *generator) failed(f Failure) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen.Requests++
	g.seen.Failed++
	if len(g.seen.Failures) < maxFailures {
		g.seen.Failures = append(g.seen.Failures, f)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// MainIfAsked turns this process into a generator if its first argument is word, for executables that start
// themselves as one (a test binary in TestMain).
func MainIfAsked(ctx context.Context, word string) {
	if len(os.Args) < 2 || os.Args[1] != word {
		return
	}
	if err := Main(ctx, os.Args[2:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}
