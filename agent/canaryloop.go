package agent

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/sockmesh/sockmesh/agent/api"
)

// How often the canary flies: often until it has arrived once, and again soon after it failed.
const (
	canaryEvery = 30 * time.Second
	canarySoon  = 250 * time.Millisecond
	canaryRetry = 2 * time.Second
)

// canaryLoop repeats the canary connection and keeps its result.
type canaryLoop struct {
	check func(context.Context) (time.Duration, error)
	log   *slog.Logger

	mu   sync.Mutex
	last api.Canary // guarded by mu
}

func newCanaryLoop(check func(context.Context) (time.Duration, error), log *slog.Logger) *canaryLoop {
	return &canaryLoop{check: check, log: log, last: api.Canary{Error: "no canary connection has been made yet"}}
}

// run checks until ctx ends, but not while rest says so.
func (c *canaryLoop) run(ctx context.Context, rest func() bool) {
	for ctx.Err() == nil {
		wait := canarySoon
		if !rest() {
			took, err := c.check(ctx)
			if ctx.Err() != nil {
				return
			}
			// One that failed because another agent has taken over in between says nothing.
			if err == nil || !rest() {
				c.note(took, err)
			}
			switch {
			case err == nil:
				wait = canaryEvery
			case c.status().Successes > 0:
				wait = canaryRetry
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// note keeps a result; a change is logged, a repetition is not.
func (c *canaryLoop) note(took time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.last
	c.last.At, c.last.Micros = time.Now().UTC().Format(time.RFC3339), took.Microseconds()
	c.last.OK, c.last.Error = err == nil, ""
	if err == nil {
		c.last.Successes++
		if !was.OK {
			c.log.Info("canary connections go through the hooks and the proxy", "took", took)
		}
		return
	}
	c.last.Failures++
	c.last.Error = err.Error()
	if was.OK || was.Error != c.last.Error {
		c.log.Warn("a canary connection failed", "error", err)
	}
}

func (c *canaryLoop) status() api.Canary {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}
