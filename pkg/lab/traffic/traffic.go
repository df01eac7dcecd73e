// Package traffic is a small HTTP load generator that can account for every single request: what answered it, or
// exactly when and how it failed and how old its connection was. Generators for benchmarks only count; here the
// question is whether a change broke anybody.
//
// It runs as a process of its own inside a pod (Main), because only a pod's processes are seen by the hooks, and
// reports on its standard output; pkg/lab reads that.
package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

// Config of one generator.
type Config struct {
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
	// Failures in the order in which they happened, up to maxFailures; Failed counts all.
	Failed   uint64
	Failures []Failure
}

// Failure is one request that was not answered with 200.
type Failure struct {
	At time.Time
	// Connected is when its connection was made; zero if that was what failed.
	Connected time.Time
	Error     string
}

const (
	maxFailures = 2000
	maxAnswers  = 64
	interval    = 50 * time.Millisecond
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
	g := newGenerator(cfg)
	out := json.NewEncoder(w)
	var wg sync.WaitGroup
	for range cfg.Connections {
		wg.Go(func() { g.client(ctx) })
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			wg.Wait()
			return out.Encode(g.report())
		case <-tick.C:
			if err := out.Encode(g.report()); err != nil {
				return err // nobody reads any more
			}
		}
	}
}

type generator struct {
	cfg     Config
	request []byte

	mu   sync.Mutex // guards seen
	seen Report
	sent int // failures that were reported already
}

func newGenerator(cfg Config) *generator {
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.Path == "" {
		cfg.Path = "/"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "GET %s HTTP/1.1\r\nHost: %s\r\n", cfg.Path, cfg.Host)
	for k, v := range cfg.Headers {
		fmt.Fprintf(&b, "%s: %s\r\n", k, v)
	}
	if cfg.NewConnection {
		b.WriteString("Connection: close\r\n")
	}
	b.WriteString("\r\n")
	return &generator{cfg: cfg, request: []byte(b.String()), seen: Report{Answers: map[string]uint64{}}}
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

// client sends request after request, on one connection as long as that lasts.
func (g *generator) client(ctx context.Context) {
	for ctx.Err() == nil {
		conn, err := net.DialTimeout("tcp", g.cfg.Addr, g.cfg.Timeout)
		if err != nil {
			g.failed(Failure{At: time.Now(), Error: err.Error()})
			sleep(ctx, max(g.cfg.Pause, 10*time.Millisecond))
			continue
		}
		g.connected()
		g.converse(ctx, conn)
		conn.Close()
	}
}

func (g *generator) converse(ctx context.Context, conn net.Conn) {
	made, reader := time.Now(), bufio.NewReader(conn)
	for ctx.Err() == nil {
		again, err := g.exchange(conn, reader)
		if err != nil {
			g.failed(Failure{At: time.Now(), Connected: made, Error: err.Error()})
			sleep(ctx, 10*time.Millisecond)
			return
		}
		sleep(ctx, g.cfg.Pause)
		if !again {
			return
		}
	}
}

// exchange is one request and its answer; again says whether the connection may carry another.
func (g *generator) exchange(conn net.Conn, reader *bufio.Reader) (again bool, err error) {
	if err := conn.SetDeadline(time.Now().Add(g.cfg.Timeout)); err != nil {
		return false, err
	}
	if _, err := conn.Write(g.request); err != nil {
		return false, fmt.Errorf("send the request: %w", err)
	}
	resp, err := http.ReadResponse(reader, nil)
	if err != nil {
		return false, fmt.Errorf("read the answer: %w", err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		return false, fmt.Errorf("read the body: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return false, fmt.Errorf("status %d: %.200s", resp.StatusCode, body)
	}
	g.answered(string(body))
	return !resp.Close && !g.cfg.NewConnection, nil
}

func (g *generator) connected() { g.mu.Lock(); g.seen.Connected++; g.mu.Unlock() }

func (g *generator) answered(body string) {
	word := "-"
	if f := strings.Fields(body); len(f) > 0 {
		word = f[0]
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen.Requests++
	g.seen.OK++
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
