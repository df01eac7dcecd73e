package router

import (
	"unsafe"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/stream"
)

// setServer applies server_header_transformation.
func (r *Request) setServer() {
	h, cfg := &r.resp, r.hcm
	switch cfg.ServerHeader {
	case mesh.ServerHeaderPassThrough:
		return
	case mesh.ServerHeaderAppendIfAbsent:
		if h.Has(header.Server) {
			return
		}
	}
	name := cfg.ServerName
	if name == "" {
		name = "envoy"
	}
	h.Set(header.Server, name)
}

// cut ends a response that cannot be completed, in a way that the client notices.
func (r *Request) cut(reason stream.Reason, details string) {
	r.rec.Details = details
	down := r.down
	r.down = nil
	down.Reset(reason)
	r.finish()
}

// finish writes the request down and gives everything back. The request must not be used afterwards.
func (r *Request) finish() {
	if r.try.phase != idle {
		r.try.abandon()
	}
	r.retry.release(r)
	r.record()
	down := r.down
	r.rt.put(r)
	if down != nil {
		down.Finish()
	}
}

// record fills in what is known only now, and hands the record over.
func (r *Request) record() {
	r.settleBodies()
	r.countAside()
	rec := &r.rec
	rec.End = r.rt.loop.Now()
	rec.Listener = r.info.Listener.Name
	rec.FilterChain = r.info.Chain.Name
	rec.ConnectionID = r.info.ID
	rec.Source = r.info.Source.Workload
	if id, ok := r.head.GetString(header.XRequestID); ok {
		rec.StreamID = id
	}
	shard := r.rt.deps.Shard
	shard.Stats.RequestsEnded++
	shard.Request(r.handle, rec)
	if observe := r.rt.deps.Observe; observe != nil {
		observe(rec)
	}
	r.log(r.hcm.AccessLog)
	if rec.Attempts > 0 {
		r.log(r.hcm.UpstreamLog)
	}
}

func (r *Request) log(list []*mesh.AccessLog) {
	for _, al := range list {
		if l := r.rt.logger(al, r.snap.Generation); l != nil {
			l.Log(&r.rec, r.random)
		}
	}
}

// unsafeBytes are s's bytes, not to be written to.
func unsafeBytes(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }
