// Package healthcheck answers load balancers that ask whether to send this node connections, in the way of kube-proxy, whose
// answers they were made for: per Service with externalTrafficPolicy Local on its healthCheckNodePort (services.go), and
// for the node as a whole where the policy is Cluster (node.go; KEP-3458, KEP-3836).
//
// Everybody who can reach the node can ask, so each server bounds its connections, its requests and their time.
package healthcheck

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// retryAfter is how often a port that is somebody else's is tried again. maxSockets bounds the listening sockets: a node
// with more load balancers than that has other troubles, and descriptors are the proxy's too.
const (
	retryAfter = 5 * time.Second
	maxSockets = 4096
)

// Services serves the health-check ports of all Services.
type Services struct {
	cfg  ServicesConfig
	kick chan struct{}

	mu     sync.RWMutex
	http   *http.Server                          // guarded by mu; another one after each Reopen
	checks map[service.Name]*service.HealthCheck // guarded by mu: what is wanted
	open   map[netip.AddrPort]*socket            // guarded by mu
	errs   map[service.Name]string               // guarded by mu: why a Service's port is not open everywhere
	closed bool                                  // guarded by mu
}

type socket struct {
	listener net.Listener
	service  service.Name
}

// ServicesConfig is what Services needs.
type ServicesConfig struct {
	// Healthy tells whether the data plane serves Services at all; where it doesn't every answer is no.
	Healthy func() bool
	// Failed is called with all Services whose port can't be opened, and why, whenever that has changed.
	Failed func(map[service.Name]string)
	Logger *slog.Logger
}

// NewServices opens nothing before Run.
func NewServices(cfg ServicesConfig) *Services {
	s := &Services{
		cfg: cfg, kick: make(chan struct{}, 1), checks: map[service.Name]*service.HealthCheck{}, open: map[netip.AddrPort]*socket{},
	}
	s.http = newServer(http.HandlerFunc(s.answer), cfg.Logger)
	return s
}

// Set says what a Service's check is now; nil: it has none. The value must not change afterwards.
func (s *Services) Set(name service.Name, check *service.HealthCheck) {
	s.mu.Lock()
	before := s.checks[name]
	if check == nil {
		delete(s.checks, name)
	} else {
		s.checks[name] = check
	}
	s.mu.Unlock()
	same := before == nil && check == nil || before != nil && check != nil && before.Port == check.Port && slices.Equal(before.Addresses, check.Addresses)
	if same {
		return // counts alone are read when somebody asks
	}
	s.wake()
}

// Run opens and closes sockets as Services come and go, until ctx ends; between Close and Reopen there are none.
func (s *Services) Run(ctx context.Context) error {
	defer s.Close()
	retry := time.NewTicker(retryAfter)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.kick:
		case <-retry.C:
			s.mu.RLock()
			fine := len(s.errs) == 0
			s.mu.RUnlock()
			if fine {
				continue
			}
		}
		s.reconcile()
	}
}

// Reopen takes Close back: for an agent whose successor has died. Run must still be running.
func (s *Services) Reopen() {
	s.mu.Lock()
	if s.closed {
		s.closed, s.open = false, map[netip.AddrPort]*socket{}
		s.http = newServer(http.HandlerFunc(s.answer), s.cfg.Logger)
	}
	s.mu.Unlock()
	s.wake()
}

func (s *Services) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// Close ends the server: who is being answered gets the answer, for a second at most. Reopen begins anew.
func (s *Services) Close() {
	s.mu.Lock()
	s.closed = true
	server := s.http
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		_ = server.Close()
	}
}

// Open lists what a Service's check listens on, and why it doesn't everywhere.
func (s *Services) Open(name service.Name) (addrs []netip.AddrPort, problem string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for addr, socket := range s.open {
		if socket.service == name {
			addrs = append(addrs, addr)
		}
	}
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	return addrs, s.errs[name]
}

// reconcile closes first and opens then, because a port may move from one Service to another.
func (s *Services) reconcile() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	wanted, errs := s.wanted()
	for addr, socket := range s.open {
		if name, still := wanted[addr]; !still || name != socket.service {
			_ = socket.listener.Close()
			delete(s.open, addr)
		}
	}
	for addr, name := range wanted {
		if s.open[addr] != nil {
			continue
		}
		if err := s.listen(addr, name); err != nil {
			errs[name] = err.Error()
		}
	}
	changed := len(errs) != len(s.errs)
	for name, problem := range errs {
		changed = changed || s.errs[name] != problem
	}
	s.errs = errs
	s.mu.Unlock()
	if changed {
		s.cfg.Failed(errs)
	}
}

// wanted are the sockets that there should be. Of two Services with one port the first by name has it. Caller holds mu.
func (s *Services) wanted() (map[netip.AddrPort]service.Name, map[service.Name]string) {
	names := make([]service.Name, 0, len(s.checks))
	for name := range s.checks {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b service.Name) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	wanted, errs := map[netip.AddrPort]service.Name{}, map[service.Name]string{}
	for _, name := range names {
		check := s.checks[name]
		for _, ip := range check.Addresses {
			addr := netip.AddrPortFrom(ip, check.Port)
			first, taken := wanted[addr]
			switch {
			case taken:
				errs[name] = fmt.Sprintf("port %d is the health-check port of Service %s too: give one of the two another healthCheckNodePort", check.Port, first)
			case len(wanted) == maxSockets:
				errs[name] = fmt.Sprintf("port %d is not served: there are %d health-check sockets already, which is the limit; "+
					"serve node ports on fewer addresses (--nodeport-addresses)", check.Port, maxSockets)
			default:
				wanted[addr] = name
			}
		}
	}
	return wanted, errs
}

// listen opens a socket. Caller holds mu.
func (s *Services) listen(addr netip.AddrPort, name service.Name) error {
	ln, err := listen(addr.String())
	if err != nil {
		return fmt.Errorf("health-check port %d can't be served on %s: %w: end what uses it, or give the Service another healthCheckNodePort", addr.Port(), addr.Addr(), err)
	}
	s.open[addr] = &socket{ln, name}
	server := s.http
	go func() {
		err := server.Serve(limit(ln))
		if err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.cfg.Logger.Warn("a health-check port ended", "service", name, "address", addr, "error", err)
		}
	}()
	return nil
}

// answer is kube-proxy's: the count, as JSON and as a weight, is of the family that the question came by.
func (s *Services) answer(w http.ResponseWriter, r *http.Request) {
	name, count, ok := s.asked(r)
	if !ok { // its port is being closed
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	healthy := s.cfg.Healthy()
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(count))
	status := http.StatusServiceUnavailable
	if count > 0 && healthy {
		status = http.StatusOK
	}
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, "{\n\t\"service\": {\n\t\t\"namespace\": %q,\n\t\t\"name\": %q\n\t},\n\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": %v\n}",
		name.Namespace, name.Name, count, healthy)
}

// asked finds the Service whose port a request came to.
func (s *Services) asked(r *http.Request) (service.Name, int, bool) {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if local == nil {
		return service.Name{}, 0, false
	}
	addr := local.AddrPort()
	addr = netip.AddrPortFrom(addr.Addr().Unmap().WithZone(""), addr.Port())
	s.mu.RLock()
	defer s.mu.RUnlock()
	socket := s.open[addr]
	if socket == nil || s.checks[socket.service] == nil {
		return service.Name{}, 0, false
	}
	check := s.checks[socket.service]
	if addr.Addr().Is4() {
		return socket.service, check.LocalReady4, true
	}
	return socket.service, check.LocalReady6, true
}
