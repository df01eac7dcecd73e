package tcp

import (
	"time"

	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// record begins the session's telemetry.
func (ses *session) record(now int64) {
	r, info := &ses.rec, ses.info
	r.StartTime = time.Now().UnixNano()
	r.Begin = now
	r.Listener, r.FilterChain = info.Listener.Name, info.Chain.Name
	r.ConnectionID = info.ID
	r.DownstreamRemote, r.DownstreamDirect, r.DownstreamLocal = info.Peer, info.Peer, info.Orig
	r.Source = info.Source.Workload
}

// arm starts the timer for whichever comes first, the idle time-out or the connection's age.
func (ses *session) arm() {
	now := ses.s.deps.Loop.Now()
	due := ses.expires
	if d := ses.proxy.IdleTimeout; d > 0 {
		if idle := ses.active + int64(d); due == 0 || idle < due {
			due = idle
		}
	}
	if due > 0 {
		ses.s.deps.Loop.StartTimer(&ses.timer, time.Duration(max(due-now, 0)))
	}
}

// onTimer ends a session that is idle or too old. The idle clock isn't restarted for every byte; when it
// fires, it looks when the last one came, and whether pending output has moved since it last looked.
func (ses *session) onTimer() {
	now := ses.s.deps.Loop.Now()
	if ses.expires > 0 && now >= ses.expires {
		ses.rec.Flags |= telemetry.DT
		ses.rec.TerminationDetails = "max_connection_duration_reached"
		ses.end()
		return
	}
	carried := ses.down.conn.BytesWritten()
	if ses.up.conn != nil {
		carried += ses.up.conn.BytesWritten()
	}
	if carried != ses.carried && ses.pending() > 0 {
		ses.active = now
	}
	ses.carried = carried
	ses.active = max(ses.active, ses.aside.Active(ses.s.deps.Loop))
	if d := ses.proxy.IdleTimeout; d > 0 && now-ses.active >= int64(d) {
		ses.rec.Flags |= telemetry.SI
		ses.rec.TerminationDetails = "idle_timeout"
		ses.s.idleTimeouts++
		ses.end()
		return
	}
	ses.arm()
}

func (ses *session) pending() int {
	n := ses.down.conn.Buffered()
	if ses.up.conn != nil {
		n += ses.up.conn.Buffered()
	}
	return n
}

// end closes both sides on the proxy's own account. Where bytes would be lost by it the peer is reset.
func (ses *session) end() {
	for _, d := range []*side{&ses.down, &ses.up} {
		switch {
		case d.over || d.conn == nil:
		case d.conn.Buffered() > 0 || d.conn.ReadPaused() || !ses.up.opened:
			d.conn.Abort()
		default:
			d.conn.Close()
		}
	}
}

func (ses *session) reportBytes() {
	st := ses.s.deps.Shard
	if st == nil || !ses.up.opened {
		return
	}
	sent, rx := ses.sent(), ses.received()
	if sent != ses.toldSent || rx != ses.toldRx {
		st.TCPBytes(&ses.handle, &ses.rec, sent-ses.toldSent, rx-ses.toldRx)
		ses.toldSent, ses.toldRx = sent, rx
	}
}

// finish writes down what happened, once both sides are over.
func (ses *session) finish() {
	if ses.ended {
		return
	}
	ses.ended = true
	ses.timer.Stop()
	ses.next.prev, ses.prev.next = ses.prev, ses.next
	ses.s.count--
	r := &ses.rec
	now := ses.s.deps.Loop.Now()
	r.End, r.DownstreamEnd = now, now
	r.BytesReceived, r.BytesSent = ses.received(), ses.sent()
	ses.reportBytes()
	if st := ses.s.deps.Shard; st != nil && ses.up.opened {
		st.TCPClosed(&ses.handle, r)
	}
	ses.s.log(ses.proxy.AccessLog, r, ses.random)
	ses.s.log(ses.info.Listener.AccessLog, r, ses.random)
	if ses.s.onEnd != nil {
		ses.s.onEnd(r)
	}
}
