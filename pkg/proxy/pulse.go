package proxy

import (
	"fmt"
	"sync/atomic"
	"time"
)

// A loop that is stuck (an endless loop in a codec, a lock that somebody holds, a call that never returns) serves nothing
// any more and says nothing about it: its connections just wait. So each loop is poked once in a while and has to answer.
// That costs two wake-ups a second and nothing per request; a loop that is busy answers between two rounds of events.
//
// Counted are pokes of this package's own clock that found the last one unanswered, not time: a process that was
// stopped as a whole, or a machine that slept, has no stuck loops.

const (
	// pulseEvery is the time between two pokes.
	pulseEvery = 500 * time.Millisecond
	// StuckAfter is how long a loop may not answer before it is called stuck. The longest that a loop is busy between two
	// rounds of events are milliseconds; on a machine that gives it no core, more.
	StuckAfter = 5 * time.Second
)

// pulse is one loop's.
type pulse struct {
	beating atomic.Bool  // asked, and not answered yet
	missed  atomic.Int64 // pokes that found it so
}

// StuckLoop is a loop that doesn't answer.
type StuckLoop struct {
	Index int           `json:"index"`
	For   time.Duration `json:"for"` // at least
}

// String is a reason for a probe.
func (s StuckLoop) String() string {
	return fmt.Sprintf("proxy loop %d has not answered for %s: its connections are stuck; restart the agent, and report the "+
		"goroutines that it writes when it is ended by SIGQUIT", s.Index, s.For)
}

// watchPulse pokes until stop is closed.
func (e *Engine) watchPulse(stop <-chan struct{}) {
	tick := time.NewTicker(pulseEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		for _, w := range e.workers {
			e.poke(w)
		}
	}
}

func (e *Engine) poke(w *Worker) {
	p := &w.pulse
	if p.beating.Load() {
		if n := p.missed.Add(1); n == int64(StuckAfter/pulseEvery) {
			e.log.Error("a proxy loop is stuck", "loop", w.loop.Index(), "for", StuckAfter)
		}
		return
	}
	if missed := p.missed.Swap(0); missed >= int64(StuckAfter/pulseEvery) {
		e.log.Warn("a proxy loop that was stuck goes on", "loop", w.loop.Index(), "after", time.Duration(missed)*pulseEvery)
	}
	p.beating.Store(true)
	if !w.loop.Post(func() { p.beating.Store(false) }) {
		p.beating.Store(false) // it has ended, and no error is told here but by Run
	}
}

// Silent is how long each loop has not answered; 0: it has.
func (e *Engine) Silent() []time.Duration {
	out := make([]time.Duration, len(e.workers))
	for i, w := range e.workers {
		out[i] = time.Duration(w.pulse.missed.Load()) * pulseEvery
	}
	return out
}

// Stuck lists the loops that have not answered for StuckAfter.
func (e *Engine) Stuck() []StuckLoop {
	var out []StuckLoop
	for i, d := range e.Silent() {
		if d >= StuckAfter {
			out = append(out, StuckLoop{i, d})
		}
	}
	return out
}
