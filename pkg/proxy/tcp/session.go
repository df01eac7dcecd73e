package tcp

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/aside"
	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
	"github.com/sockmesh/sockmesh/pkg/proxy/upstream"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// maxTried is how many failed hosts of one connection are remembered to be avoided.
const maxTried = 4

// session is one client's connection and its upstream.
type session struct {
	s     *Server
	info  *stream.ConnInfo
	proxy *mesh.TCPProxy
	snap  *mesh.Snapshot

	random   uint64
	attempts int
	cluster  *upstream.Cluster
	host     *upstream.Host
	tried    [maxTried]*upstream.Host

	down, up side
	pieces   int // of data that came through the proxy
	aside    aside.Pair

	timer   loop.Timer
	active  int64 // when bytes last arrived
	carried uint64
	expires int64 // max duration; 0: never
	ended   bool  // the record is written

	rec              telemetry.Record
	handle           telemetry.Handle
	toldSent, toldRx uint64 // what the metrics know

	next, prev *session
}

// side is one of the session's two connections, and its handler.
type side struct {
	s      *session
	conn   *loop.Conn // nil: not dialled
	up     bool
	opened bool // connected
	eof    bool // the peer has ended its direction
	over   bool // OnClose was called, or there never was a connection
}

func (d *side) peer() *side {
	if d.up {
		return &d.s.down
	}
	return &d.s.up
}

// connect makes the next attempt; each draws cluster and host anew.
func (ses *session) connect() {
	if ses.attempts >= max(ses.proxy.MaxConnectAttempts, 1) {
		ses.refuse(telemetry.URX)
		return
	}
	random := ses.random + uint64(ses.attempts)*0x9e3779b97f4a7c15
	wc := ses.proxy.PickCluster(random)
	if wc == nil {
		ses.refuse(telemetry.NC)
		return
	}
	c := ses.s.deps.Upstreams.Named(ses.snap, wc.Name)
	if c == nil {
		ses.rec.UpstreamCluster = wc.Name
		ses.refuse(telemetry.NC)
		return
	}
	ses.cluster, ses.rec.UpstreamCluster = c, c.Config().StatName
	if c.Config().StatName == "" {
		ses.rec.UpstreamCluster = c.Name()
	}
	pick := upstream.PickContext{Random: random, OriginalDst: ses.info.Orig}
	if n := min(ses.attempts, maxTried); n > 0 {
		pick.Exclude, pick.Attempts = ses.tried[:n], 3
	}
	h, flags := c.Pick(&pick)
	if h == nil {
		ses.refuse(flags)
		return
	}
	if !c.Acquire(upstream.Connections, 0) {
		ses.refuse(telemetry.UO)
		return
	}
	ses.tried[ses.attempts%maxTried] = h
	ses.attempts++
	ses.host = h
	h.Conns++
	h.Requests++
	h.ActiveConns++
	h.ActiveRequests++
	ses.rec.Attempts = uint32(ses.attempts)
	ses.rec.UpstreamHost, ses.rec.UpstreamHostName = h.Addr, h.Hostname
	ses.dial(c.Config(), h)
}

func (ses *session) dial(conf *mesh.Cluster, h *upstream.Host) {
	o := loop.DialOptions{
		Options: loop.Options{BufferLimit: int(conf.BufferLimit), KeepUnread: true},
		Own:     ses.s.deps.Own,
		Timeout: conf.ConnectTimeout,
	}
	if k := conf.Keepalive; k != nil {
		o.Keepalive = &loop.Keepalive{Probes: k.Probes, Time: k.Time, Interval: k.Interval}
	}
	if st := ses.s.deps.Shard; st != nil {
		st.Stats.UpstreamConnects++
	}
	ses.up = side{s: ses, up: true}
	ses.up.conn = ses.s.deps.Loop.Dial(ses.info.Source.Netns, h.Addr, &ses.up, &o)
}

// refuse ends a session that gets no upstream. The client is reset: an orderly end would look like an answer.
func (ses *session) refuse(f telemetry.Flags) {
	ses.rec.Flags |= f
	ses.up.over = true
	if ses.down.over {
		ses.finish()
		return
	}
	ses.down.conn.Abort()
}

// OnConnect implements loop.Handler. A failure is dealt with in OnClose, which follows.
func (d *side) OnConnect(c *loop.Conn, err error) {
	ses := d.s
	if err != nil {
		if ses.down.over {
			return
		}
		ses.rec.Flags |= telemetry.UF
		ses.rec.UpstreamTransportFailure = err.Error()
		ses.host.ConnectFailures++
		ses.s.connectFailures++
		if st := ses.s.deps.Shard; st != nil {
			st.Stats.UpstreamConnectFailures++
		}
		return
	}
	now := ses.s.deps.Loop.Now()
	d.opened = true
	ses.rec.Flags, ses.rec.UpstreamTransportFailure = 0, ""
	ses.rec.UpstreamBegin = now
	ses.active = now
	if st := ses.s.deps.Shard; st != nil {
		st.TCPOpened(&ses.handle, &ses.rec)
	}
	ses.down.conn.ResumeRead()
}

// OnData implements loop.Handler.
func (d *side) OnData(c *loop.Conn, b []byte) int {
	ses := d.s
	ses.active = ses.s.deps.Loop.Now()
	to := d.peer().conn
	to.Write(b)
	if to.AboveHigh() {
		c.PauseRead()
	}
	if ses.pieces++; ses.pieces == ses.s.deps.StepAsideAfter && ses.s.deps.StepAside != nil {
		ses.stepAside()
	}
	return len(b)
}

// stepAside lets the bytes to come skip the proxy, if they can.
func (ses *session) stepAside() {
	down, up := ses.down.conn, ses.up.conn
	if ses.down.over || ses.up.over || down.Closed() || up.Closed() {
		return
	}
	ses.aside.Step(ses.s.deps.StepAside, down, up, aside.Lead{})
}

// received and sent are the bytes from and to the client, however they went.
func (ses *session) received() uint64 {
	return ses.down.conn.BytesRead() + ses.aside.Carried(aside.ToServer)
}

func (ses *session) sent() uint64 {
	return ses.down.conn.BytesWritten() + ses.aside.Carried(aside.ToClient)
}

// OnDrained implements loop.Handler: this side takes bytes again, so the other may be read again.
func (d *side) OnDrained(*loop.Conn) {
	if p := d.peer(); !p.over && p.conn != nil && p.conn.ReadPaused() {
		p.conn.ResumeRead()
	}
}

// OnEOF implements loop.Handler.
func (d *side) OnEOF(c *loop.Conn) {
	ses, p := d.s, d.peer()
	d.eof = true
	now := ses.s.deps.Loop.Now()
	if d.up {
		ses.rec.UpstreamEnd = now
	} else {
		ses.rec.RequestEnd = now
	}
	p.conn.CloseWrite()
	if p.eof { // both directions have ended: what is pending is sent before the sockets close
		p.conn.Close()
		c.Close()
	}
}

// OnClose implements loop.Handler.
func (d *side) OnClose(c *loop.Conn, err error) {
	ses, p := d.s, d.peer()
	d.over = true
	if d.up {
		if ses.upstreamClosed(c, err) {
			return
		}
	} else if err != nil && !errors.Is(err, loop.ErrStopped) && ses.rec.Flags == 0 && !p.over {
		ses.rec.Flags |= telemetry.DC
	}
	switch {
	case p.over:
		ses.finish()
	case p.conn == nil:
		p.over = true
		ses.finish()
	case !p.conn.Closed():
		// A reset, or an end that somebody else imposed: the far side must not take the torso for the whole.
		p.conn.CloseReset()
	}
}

// upstreamClosed settles the accounts of an upstream connection; true if another attempt was begun.
func (ses *session) upstreamClosed(c *loop.Conn, err error) bool {
	h := ses.host
	h.ActiveConns--
	h.ActiveRequests--
	ses.cluster.Release(upstream.Connections, 0)
	ses.rec.UpstreamBytesSent = c.BytesWritten() + ses.aside.Carried(aside.ToServer)
	ses.rec.UpstreamBytesReceived = c.BytesRead() + ses.aside.Carried(aside.ToClient)
	if st := ses.s.deps.Shard; st != nil && ses.up.opened {
		st.Stats.UpstreamClosed++
	}
	if !ses.up.opened && err != nil && !ses.down.over && !errors.Is(err, loop.ErrStopped) {
		ses.connect()
		return true
	}
	if err != nil && ses.up.opened && ses.rec.Flags == 0 && !ses.down.over && !errors.Is(err, loop.ErrStopped) {
		h.Errors++
		ses.rec.Flags |= telemetry.UC
		if errors.Is(err, unix.ECONNRESET) {
			ses.rec.UpstreamTransportFailure = "connection reset by the upstream"
		}
	}
	return false
}
