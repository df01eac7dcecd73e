package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	extensionservice "github.com/envoyproxy/go-control-plane/envoy/service/extension/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	runtimeservice "github.com/envoyproxy/go-control-plane/envoy/service/runtime/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
)

// Config is what a Server needs.
type Config struct {
	// Dir is the folder of resources.
	Dir string
	// TLSCert and TLSKey switch TLS on; TLSClientCA in addition asks clients for a certificate of that authority.
	TLSCert, TLSKey, TLSClientCA string
	Logger                       *slog.Logger
}

// Server serves a folder.
type Server struct {
	cfg   Config
	log   *slog.Logger
	cache cache.SnapshotCache
	grpc  *grpc.Server
	http  *http.Server

	mu      sync.Mutex
	set     *Set
	errs    []error
	loaded  time.Time
	streams map[streamID]*streamStatus
}

// everyone is the one node group: all data planes get the same set.
type everyone struct{}

const group = "all"

// ID implements cache.NodeHash.
func (everyone) ID(*corev3.Node) string { return group }

// stopTimeout bounds how long Serve waits for its streams at the end.
const stopTimeout = 3 * time.Second

// New reads the folder. A folder with errors is served empty until they are mended; a folder that is not there
// is an error.
func New(cfg Config) (*Server, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	info, err := os.Stat(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("--dir: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("--dir: %s is not a folder", cfg.Dir)
	}
	s := &Server{cfg: cfg, log: cfg.Logger, streams: map[streamID]*streamStatus{}}
	s.cache = cache.NewSnapshotCache(false, everyone{}, quietLogger{})
	tlsConfig, err := cfg.tls()
	if err != nil {
		return nil, err
	}
	s.grpc = grpc.NewServer()
	s.http = &http.Server{ReadHeaderTimeout: 10 * time.Second, TLSConfig: tlsConfig, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
	s.http.Protocols = &http.Protocols{}
	s.http.Protocols.SetHTTP1(true)
	s.http.Protocols.SetHTTP2(true)
	s.http.Protocols.SetUnencryptedHTTP2(true)
	s.Reload()
	if s.set == nil {
		s.publish(&Set{snapshot: &cache.Snapshot{}, Counts: map[string]int{}})
	}
	return s, nil
}

func (cfg *Config) tls() (*tls.Config, error) {
	switch {
	case cfg.TLSCert == "" && cfg.TLSKey == "" && cfg.TLSClientCA == "":
		return nil, nil
	case cfg.TLSCert == "" || cfg.TLSKey == "":
		return nil, errors.New("--tls-cert and --tls-key are needed together")
	}
	pair, err := tls.LoadX509KeyPair(cfg.TLSCert, cfg.TLSKey)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert, --tls-key: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	if cfg.TLSClientCA != "" {
		pem, err := os.ReadFile(cfg.TLSClientCA)
		if err != nil {
			return nil, fmt.Errorf("--tls-client-ca: %w", err)
		}
		config.ClientCAs, config.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
		if !config.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--tls-client-ca: no PEM certificate in %s", cfg.TLSClientCA)
		}
	}
	return config, nil
}

// Reload reads the folder again. If anything is wrong the last good set stays.
func (s *Server) Reload() {
	set, errs := LoadDir(s.cfg.Dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errs, s.loaded = errs, time.Now()
	for _, err := range errs {
		s.log.Error("resource file refused; the last good set stays", "error", err)
	}
	if set == nil || s.set != nil && set.Version == s.set.Version {
		return
	}
	s.publish(set)
	s.log.Info("serving", "version", set.Version, "resources", set.Counts)
}

// publish hands a set to the cache. Its error is about a client that went away in the middle, which is no news.
func (s *Server) publish(set *Set) {
	s.set = set
	if err := s.cache.SetSnapshot(context.Background(), group, set.snapshot); err != nil {
		s.log.Debug("a stream missed an update", "error", err)
	}
}

// Serve answers on the listener, and watches the folder, until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	xdsServer := server.NewServer(ctx, s.cache, s.callbacks())
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s.grpc, xdsServer)
	listenerservice.RegisterListenerDiscoveryServiceServer(s.grpc, xdsServer)
	routeservice.RegisterRouteDiscoveryServiceServer(s.grpc, xdsServer)
	routeservice.RegisterScopedRoutesDiscoveryServiceServer(s.grpc, xdsServer)
	clusterservice.RegisterClusterDiscoveryServiceServer(s.grpc, xdsServer)
	endpointservice.RegisterEndpointDiscoveryServiceServer(s.grpc, xdsServer)
	secretservice.RegisterSecretDiscoveryServiceServer(s.grpc, xdsServer)
	runtimeservice.RegisterRuntimeDiscoveryServiceServer(s.grpc, xdsServer)
	extensionservice.RegisterExtensionConfigDiscoveryServiceServer(s.grpc, xdsServer)
	s.http.Handler = s.handler(&server.HTTPGateway{Server: xdsServer})
	s.http.BaseContext = func(net.Listener) context.Context { return ctx }

	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.watch(ctx)
	}()
	failed := make(chan error, 1)
	go func() {
		if s.http.TLSConfig != nil {
			failed <- s.http.ServeTLS(l, "", "")
		} else {
			failed <- s.http.Serve(l)
		}
	}()
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	cancel()
	stopping, done := context.WithTimeout(context.Background(), stopTimeout)
	defer done()
	if s.http.Shutdown(stopping) != nil {
		_ = s.http.Close()
	}
	s.grpc.Stop()
	<-watched
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return err
}

// handler splits gRPC, REST and the status page, which share one port.
func (s *Server) handler(gateway *server.HTTPGateway) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc"):
			s.grpc.ServeHTTP(w, r)
		case strings.HasPrefix(r.URL.Path, "/v3/discovery:"):
			s.rest(w, r, gateway)
		case r.URL.Path == "/status" && (r.Method == http.MethodGet || r.Method == http.MethodHead):
			w.Header().Set("Content-Type", "application/json")
			encoder := json.NewEncoder(w)
			encoder.SetIndent("", "  ")
			_ = encoder.Encode(s.Status())
		default:
			http.Error(w, "not found; there are gRPC, POST /v3/discovery:TYPE and GET /status", http.StatusNotFound)
		}
	})
}

// maxRESTBody bounds a REST request; its largest part is a list of resource names.
const maxRESTBody = 4 << 20

func (s *Server) rest(w http.ResponseWriter, r *http.Request, gateway *server.HTTPGateway) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "use POST with a DiscoveryRequest as JSON", http.StatusMethodNotAllowed)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxRESTBody)
	body, code, err := gateway.ServeHTTP(r)
	if err != nil {
		http.Error(w, err.Error(), code)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(body)
}

// quietLogger drops the cache's running commentary; what matters is logged by the callbacks.
type quietLogger struct{}

func (quietLogger) Debugf(string, ...any) {}
func (quietLogger) Infof(string, ...any)  {}
func (quietLogger) Warnf(string, ...any)  {}
func (quietLogger) Errorf(string, ...any) {}
