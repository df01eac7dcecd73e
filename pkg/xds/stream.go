package xds

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
)

// stream carries one kind, or with ADS all of them, from one server. It reopens itself for ever.
type stream struct {
	client *Client
	source *source
	key    string
	kind   Kind // of a stream without ADS

	wake chan struct{} // capacity 1: subscriptions changed

	// Guarded by client.mu.
	subs      [kinds]*subscription
	cancel    context.CancelFunc // nil until started
	connected bool
	lastError string
}

// subscription is what one kind is asked for on one stream.
type subscription struct {
	// Guarded by client.mu: what is wanted.
	wildcard bool
	names    map[string]bool

	// Owned by the stream's goroutine: what was said. sent, requested and nonce begin anew with every
	// connection, version does not.
	requested bool
	sent      map[string]bool
	nonce     string
	version   string // of the last response that was accepted (state of the world)
}

func newStream(c *Client, src *source, key string, kind Kind) *stream {
	return &stream{client: c, source: src, key: key, kind: kind, wake: make(chan struct{}, 1)}
}

// subscription finds or makes a kind's. client.mu is held.
func (s *stream) subscription(kind Kind) *subscription {
	if s.subs[kind] == nil {
		s.subs[kind] = &subscription{names: map[string]bool{}}
	}
	return s.subs[kind]
}

// existing is a kind's subscription, nil if there is none; for the stream's own goroutine.
func (s *stream) existing(kind Kind) *subscription {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.subs[kind]
}

func (s *stream) subscribe(kind Kind, name string) {
	s.subscription(kind).names[name] = true
	s.poke()
}

func (s *stream) unsubscribe(kind Kind, name string) {
	delete(s.subscription(kind).names, name)
	s.poke()
}

// asked says whether a resource was subscribed to; what was not is none of our business. client.mu is held.
func (s *stream) asked(kind Kind, name string) bool {
	sub := s.subs[kind]
	return sub != nil && (sub.wildcard || sub.names[name])
}

// idle says that nothing is wanted from the stream any more. client.mu is held.
func (s *stream) idle() bool {
	for _, sub := range s.subs {
		if sub != nil && (sub.wildcard || len(sub.names) > 0) {
			return false
		}
	}
	return true
}

func (s *stream) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// protocol is one of the two variants, for one connection.
type protocol interface {
	// method is the gRPC method; sync sends what the subscriptions want and was not said yet; receive reads one
	// response, and handle applies and answers it.
	method() string
	sync(kind Kind, sub *subscription, names []string) error
	receive() (any, error)
	handle(response any) error
	attach(grpc.ClientStream)
}

// run keeps the stream open until ctx ends. The pause doubles up to the limit and starts over once the server
// has answered something.
func (s *stream) run(ctx context.Context) {
	pause := s.client.cfg.BackoffBase
	for ctx.Err() == nil {
		answered, err := s.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if answered {
			pause = s.client.cfg.BackoffBase
		}
		s.setState(false, err)
		s.client.log.Warn("xDS stream ended; the last good configuration stays", "server", s.source.server.name, "stream", s.title(), "retry_in", pause, "error", err)
		// Jitter of 20 % either way, so that a thousand nodes do not come back at once.
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(float64(pause) * (0.8 + 0.4*rand.Float64()))):
		}
		pause = min(2*pause, s.client.cfg.BackoffMax)
	}
}

func (s *stream) title() string {
	if s.source.ads {
		return "ads"
	}
	return s.kind.String()
}

func (s *stream) setState(connected bool, err error) {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	s.connected = connected
	if err != nil {
		s.lastError = err.Error()
	} else if connected {
		s.lastError = ""
	}
}

// session runs one connection. answered says that the server sent at least one response.
func (s *stream) session(ctx context.Context) (answered bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var p protocol = &worldProtocol{stream: s}
	if s.source.delta {
		p = &deltaProtocol{stream: s}
	}
	raw, err := s.source.server.open(ctx, p.method())
	if err != nil {
		return false, err
	}
	p.attach(raw)
	s.setState(true, nil)
	s.client.log.Info("xDS stream open", "server", s.source.server.name, "stream", s.title(), "delta", s.source.delta)
	for kind := range kinds {
		if sub := s.existing(kind); sub != nil {
			sub.requested, sub.sent, sub.nonce = false, map[string]bool{}, ""
		}
	}

	// The receiver hands over one response at a time and waits for the taker, which is gRPC's flow control
	// carried through to the server.
	responses := make(chan any)
	failed := make(chan error, 1)
	go func() {
		for {
			response, err := p.receive()
			if err != nil {
				failed <- err
				return
			}
			select {
			case responses <- response:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		if err := s.syncAll(p); err != nil {
			return answered, err
		}
		select {
		case <-ctx.Done():
			return answered, ctx.Err()
		case err := <-failed:
			return answered, err
		case <-s.wake:
		case response := <-responses:
			answered = true
			if err := p.handle(response); err != nil {
				return answered, err
			}
		}
	}
}

// syncAll says what changed in the subscriptions, in the order in which resources have to be applied.
func (s *stream) syncAll(p protocol) error {
	for kind := range kinds {
		s.client.mu.Lock()
		sub := s.subs[kind]
		var names []string
		if sub != nil {
			names = slices.Sorted(maps.Keys(sub.names))
			if sub.sent == nil {
				sub.sent = map[string]bool{}
			}
		}
		s.client.mu.Unlock()
		if sub == nil || !sub.requested && !sub.wildcard && len(names) == 0 {
			continue // an empty first request would mean everything
		}
		if err := p.sync(kind, sub, names); err != nil {
			return err
		}
	}
	return nil
}

// sameNames says whether names is exactly the set.
func sameNames(names []string, set map[string]bool) bool {
	if len(names) != len(set) {
		return false
	}
	for _, name := range names {
		if !set[name] {
			return false
		}
	}
	return true
}

func toSet(names []string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, name := range names {
		set[name] = true
	}
	return set
}

// maxErrorDetail bounds what a NACK carries.
const maxErrorDetail = 4096

// errorDetail is the NACK's reason; nil for an ACK.
func errorDetail(err error) *rpcstatus.Status {
	if err == nil {
		return nil
	}
	text := err.Error()
	if len(text) > maxErrorDetail {
		text = text[:maxErrorDetail] + " …"
	}
	return status.New(codes.InvalidArgument, text).Proto()
}
