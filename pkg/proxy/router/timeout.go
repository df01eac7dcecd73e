package router

import (
	"net/http"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// A request has up to nine deadlines, and nearly always none of them passes. So they are plain numbers, and
// one timer stands for all: it is started only if a deadline comes before the one it is set to, is never
// stopped, and looks for the earliest that is left when it fires. As requests are reused, a busy connection
// starts a timer every few seconds, not several per request.

// deadlines are points on the loop's clock; 0: none.
type deadlines struct {
	headers  int64 // request_headers_timeout
	request  int64 // request_timeout: the whole request has come
	duration int64 // max_stream_duration
	response int64 // route timeout
	try      int64 // per_try_timeout
	backoff  int64 // the next attempt is to begin
	aside    int64 // a tunnel's bytes may skip the proxy
}

// earliest returns the first deadline; 0 if there is none. Idle deadlines follow from the last activity.
func (r *Request) earliest() int64 {
	d := &r.due
	first := int64(0)
	for _, t := range [...]int64{d.headers, d.request, d.duration, d.response, d.try, d.backoff, d.aside, r.idleDue(), r.tryIdleDue()} {
		if t != 0 && (first == 0 || t < first) {
			first = t
		}
	}
	return first
}

func (r *Request) idleDue() int64 {
	if r.idleLimit == 0 {
		return 0
	}
	return r.active + int64(r.idleLimit)
}

func (r *Request) tryIdleDue() int64 {
	if r.tryIdleLimit == 0 || r.try.phase == idle {
		return 0
	}
	return r.try.active + int64(r.tryIdleLimit)
}

// arm makes the timer fire at the deadline or earlier.
func (r *Request) arm(deadline int64) {
	if r.armed != 0 && r.armed <= deadline {
		return
	}
	r.armed = deadline
	r.rt.loop.StartTimer(&r.timer, time.Duration(deadline-r.rt.loop.Now()))
}

// onTimer looks at every deadline. A handler may end the request, so at most one is called per firing.
func (r *Request) onTimer() {
	r.armed = 0
	if r.down == nil {
		return // in the pool
	}
	now := r.rt.loop.Now()
	r.noteAside()
	passed := func(t int64) bool { return t != 0 && t <= now }
	d := &r.due
	serial := r.serial
	switch {
	case passed(d.backoff):
		d.backoff = 0
		r.startAttempt()
	case passed(d.aside):
		d.aside = 0
		r.stepAside()
	case passed(d.headers):
		d.headers = 0
		r.timedOut(http.StatusRequestTimeout, "request header timeout", 0, "request_header_timeout")
	case passed(d.request):
		d.request = 0
		r.timedOut(http.StatusRequestTimeout, "request timeout", 0, "request_overall_timeout")
	case passed(d.response):
		d.response = 0
		r.rt.deps.Shard.Stats.Timeouts++
		if r.try.phase != idle {
			r.try.abandon()
		}
		r.timedOutRouted("response_timeout")
	case passed(d.try):
		d.try = 0
		r.tryTimedOut("upstream_per_try_timeout")
	case passed(d.duration):
		d.duration = 0
		r.timedOut(r.timeoutStatus(), "downstream duration timeout", 0, "max_duration_timeout")
	case passed(r.tryIdleDue()):
		r.tryTimedOut("upstream_per_try_idle_timeout")
	case passed(r.idleDue()):
		r.timedOut(r.timeoutStatus(), "stream timeout", telemetry.SI, "stream_idle_timeout")
	}
	if r.down == nil || r.serial != serial {
		return
	}
	if t := r.earliest(); t != 0 {
		r.arm(t)
	}
}

// timeoutStatus blames the client while its request is incomplete, the upstream afterwards.
func (r *Request) timeoutStatus() int {
	if r.reqEnded {
		return http.StatusGatewayTimeout
	}
	return http.StatusRequestTimeout
}

// timedOut answers if nothing was answered yet, else cuts the response short.
func (r *Request) timedOut(code int, body string, flag telemetry.Flags, details string) {
	r.rec.Flags |= flag
	if r.respStarted {
		r.cut(stream.LocalReset, details)
		return
	}
	r.reply(code, body, details)
}

// tryTimedOut ends one attempt for being late.
func (r *Request) tryTimedOut(details string) {
	t := &r.try
	if t.phase == idle {
		return
	}
	r.rt.deps.Shard.Stats.Timeouts++
	if r.respStarted {
		// Only the idle limit gets here: the per-try timeout ends with the response's head.
		r.rec.Flags |= telemetry.UT
		t.abandon()
		r.cut(stream.LocalReset, details)
		return
	}
	t.abandon()
	if r.retryAfterReset(stream.LocalReset, true) {
		return
	}
	r.timedOutRouted(details)
}

// timedOutRouted is timedOut for the upstream being late.
func (r *Request) timedOutRouted(details string) {
	r.rec.Flags |= telemetry.UT
	if r.respStarted {
		r.cut(stream.LocalReset, details)
		return
	}
	r.replyRouted(r.timeoutCode, "upstream request timeout", details)
}
