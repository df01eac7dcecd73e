package healthcheck

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Node is kube-proxy's own health endpoint. Cloud load balancers ask it where externalTrafficPolicy is Cluster: /healthz is
// 200 while the data plane works and the node stays, 503 once the node is being deleted or the autoscaler has marked it, so
// that connections drain before it goes (KEP-3836). /livez leaves the node out of it.
type Node struct {
	cfg  NodeConfig
	mux  *http.ServeMux
	kick chan struct{}

	mu       sync.Mutex
	http     *http.Server // guarded by mu; another one after each Reopen
	listener net.Listener // guarded by mu
	problem  string       // guarded by mu: why it is not served
	closed   bool         // guarded by mu
}

// NodeConfig is what Node needs.
type NodeConfig struct {
	// Address is host:port; without host every address of both families.
	Address string
	// Healthy tells whether the data plane serves Services, and when it last wrote any.
	Healthy func() (bool, time.Time)
	// Eligible tells whether the node may be sent new connections: it is known, and is not about to go.
	Eligible func() bool
	Logger   *slog.Logger
}

// NewNode opens nothing before Run.
func NewNode(cfg NodeConfig) *Node {
	n := &Node{cfg: cfg, kick: make(chan struct{}, 1)}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { n.answer(w, true) })
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) { n.answer(w, false) })
	n.mux, n.http = mux, newServer(mux, cfg.Logger)
	return n
}

// Reopen takes Close back: for an agent whose successor has died. Run must still be running.
func (n *Node) Reopen() {
	n.mu.Lock()
	if n.closed {
		n.closed, n.http = false, newServer(n.mux, n.cfg.Logger)
	}
	n.mu.Unlock()
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// Run serves until ctx ends, but for the time between Close and Reopen. While a kube-proxy still has the port, it is tried
// again: the port changes hands by itself when that one ends.
func (n *Node) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, n.Close)()
	for ctx.Err() == nil {
		n.try(ctx)
		select {
		case <-ctx.Done():
		case <-n.kick:
		case <-time.After(retryAfter):
		}
	}
	return nil
}

// try serves if the port can be had and nobody has called Close.
func (n *Node) try(ctx context.Context) {
	n.mu.Lock()
	closed := n.closed
	n.mu.Unlock()
	if closed {
		return
	}
	ln, err := listen(n.cfg.Address)
	if err != nil {
		n.fails(err)
		return
	}
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		_ = ln.Close()
		return
	}
	n.listener, n.problem = ln, ""
	server := n.http
	n.mu.Unlock()
	err = server.Serve(limit(ln))
	n.mu.Lock()
	n.listener = nil
	n.mu.Unlock()
	if err != nil && !errors.Is(err, http.ErrServerClosed) && ctx.Err() == nil {
		n.fails(err)
	}
}

func (n *Node) fails(err error) {
	n.mu.Lock()
	known := n.problem != ""
	n.problem = err.Error()
	n.mu.Unlock()
	if !known {
		n.cfg.Logger.Warn("kube-proxy's health endpoint is not served yet; a kube-proxy that still runs has the port; retrying",
			"address", n.cfg.Address, "error", err)
	}
}

// Addr is where it listens, nil: nowhere, and the problem says why.
func (n *Node) Addr() (addr net.Addr, problem string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listener != nil {
		addr = n.listener.Addr()
	}
	return addr, n.problem
}

// Close ends the server. Reopen begins anew.
func (n *Node) Close() {
	n.mu.Lock()
	n.closed = true
	server := n.http
	n.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		_ = server.Close()
	}
}

// nodeHealth is the answer, with kube-proxy's names. The families share one data plane here.
type nodeHealth struct {
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"`
	Healthy      bool                    `json:"healthy"`
	Status       map[string]familyHealth `json:"status,omitempty"`
}

type familyHealth struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

func (n *Node) answer(w http.ResponseWriter, withNode bool) {
	healthy, updated := n.cfg.Healthy()
	now := time.Now()
	family := familyHealth{updated, healthy}
	out := nodeHealth{LastUpdated: updated, CurrentTime: now, Healthy: healthy, Status: map[string]familyHealth{"IPv4": family, "IPv6": family}}
	ok := healthy
	if withNode {
		eligible := n.cfg.Eligible()
		out.NodeEligible = &eligible
		ok = ok && eligible
	}
	if ok {
		out.LastUpdated = now // as kube-proxy has it: recent while all is well
	}
	body, err := json.Marshal(out)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = w.Write(body)
}
