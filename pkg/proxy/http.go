package proxy

import "github.com/sockmesh/sockmesh/pkg/proxy/http"

// newHTTP makes the project's own HTTP server for a loop.
func newHTTP(w *Worker) HTTPServer {
	return http.NewServer(http.Deps{
		Loop: w.loop, Upstreams: w.upstreams, Snapshot: w.Snapshot, Shard: w.shard, Logs: w.e.cfg.Logs,
		Logger: w.log, Own: w.e.cfg.Own, StepAside: w.e.cfg.StepAside, PairUp: w.e.cfg.PairUp, LocalAddr: w.e.cfg.LocalAddr,
	})
}
