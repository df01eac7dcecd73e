package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/agent/canary"
)

// webServer serves /metrics, /healthz and /readyz.
type webServer struct {
	http *http.Server
	addr net.Addr
	done chan struct{}
}

// bindWeb makes the socket. It has SO_REUSEPORT: at an upgrade the new agent starts beside the old one.
func bindWeb(addr string) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); e != nil {
			return e
		}
		return err
	}}
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	return ln, nil
}

// serveWeb starts to serve at ln until close.
func serveWeb(ln net.Listener, reg *prometheus.Registry, notReady, unhealthy func() []string, log *slog.Logger) *webServer {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(withoutCanary{reg}, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError,
		MaxRequestsInFlight: 4, Timeout: 10 * time.Second, Registry: reg,
	}))
	// Healthy is an agent that answers and whose loops all do: whatever else may be wrong with it, a restart would cut
	// connections and not help.
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { probe(w, unhealthy()) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { probe(w, notReady()) })
	s := &webServer{addr: ln.Addr(), done: make(chan struct{}), http: &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the metrics server ended", "error", err)
		}
	}()
	return s
}

// withoutCanary leaves the canary's own requests out of the request metrics: nobody wants to see them in a dashboard of
// the mesh, and sockmesh_canary_connections_total counts them.
type withoutCanary struct{ prometheus.Gatherer }

// Gather implements prometheus.Gatherer.
func (g withoutCanary) Gather() ([]*dto.MetricFamily, error) {
	families, err := g.Gatherer.Gather()
	kept := families[:0]
	for _, f := range families {
		f.Metric = slices.DeleteFunc(f.Metric, func(m *dto.Metric) bool {
			return slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetValue() == canary.Name })
		})
		if len(f.Metric) > 0 {
			kept = append(kept, f)
		}
	}
	return kept, err
}

// probe answers as Kubernetes' own components do: ok, or 503 and one reason a line.
func probe(w http.ResponseWriter, reasons []string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if len(reasons) == 0 {
		_, _ = fmt.Fprintln(w, "ok")
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = fmt.Fprintln(w, strings.Join(reasons, "\n"))
}

// close ends it, without waiting for scrapes.
func (s *webServer) close() {
	_ = s.http.Close()
	<-s.done
}
