package pod

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// While a listener cannot be opened it is tried again, soon at first. A change of the namespace's addresses, such as
// loopback coming up, is noticed at once and doesn't wait for this.
const (
	retryFirst = 50 * time.Millisecond
	retryLast  = 5 * time.Second
	// settle6 is how long a pod waits for ::1 after 127.0.0.1 is there: both come with the loopback device.
	settle6 = 300 * time.Millisecond
)

// serve is a pod's state towards the Handler.
type serve struct {
	announced  *Spec // as the Handler knows it; nil: it doesn't
	has4, has6 bool  // listeners that the Handler was given, or that wait in pending
	pending    []int // opened, not yet handed over
	given      bool  // the Handler has listeners
	since      time.Time
	retryAt    time.Time
	wait       time.Duration
	problem    string
}

// advance brings a pod in its namespace to what the Handler should know of it.
func (m *Manager) advance(b *bound, now time.Time) {
	s := &b.serve
	if s.announced != nil && s.announced.Enrolled && !b.Enrolled {
		m.retract(b) // The Handler closes what it was given; PodReady follows below.
	}
	if b.Enrolled && !m.listening(b, now) && s.problem == "" {
		return
	}
	if s.announced != nil && s.announced.equal(&b.Spec) && len(s.pending) == 0 {
		return
	}
	p := Pod{Spec: b.Spec, Cookie: b.space.cookie, NetnsName: b.space.name()}
	p.IPs = slices.Clone(p.IPs)
	if len(s.pending) > 0 {
		ns, err := b.space.dup()
		if err != nil {
			m.problem(b, now, err)
			return
		}
		p.Netns, p.Listeners = ns, s.pending
		s.pending, s.given = nil, true
	}
	spec := b.Spec
	first := s.announced == nil
	s.announced = &spec
	if first {
		m.cfg.Logger.Info("pod found", "pod", b.label(), "ips", b.IPs, "netns", p.NetnsName, "cookie", p.Cookie, "enrolled", b.Enrolled)
	}
	m.cfg.Handler.PodReady(p)
}

// listening opens listeners that are missing; true: the pod can be announced.
func (m *Manager) listening(b *bound, now time.Time) bool {
	s := &b.serve
	if s.since.IsZero() {
		s.since = now
	}
	if s.has4 && s.has6 {
		return true
	}
	// Only ::1 is missing and the namespace has none: nothing to try until its addresses change.
	if s.has4 && s.given && s.problem == "" && !b.space.addrs[loopback6] {
		return true
	}
	if now.Before(s.retryAt) {
		return s.has4 && s.given
	}
	got := b.space.open(&m.cfg, !s.has4, !s.has6)
	if len(got.fds) > 0 && s.given {
		// ::1 came late. The Handler gets all listeners at once or none, so it starts afresh with this pod.
		for _, fd := range got.fds {
			closeFD(fd)
		}
		m.retract(b)
		return m.listening(b, now)
	}
	s.has4, s.has6 = s.has4 || got.has4, s.has6 || got.has6
	s.pending = append(s.pending, got.fds...)
	switch {
	case got.problem4 != nil:
		m.problem(b, now, got.problem4)
		return false
	case got.problem6 != nil:
		m.problem(b, now, got.problem6)
		return true
	}
	if s.problem != "" {
		m.cfg.Logger.Info("pod's listeners are open now", "pod", b.label())
	}
	s.problem, s.wait, s.retryAt = "", 0, time.Time{}
	if got.wait6 && !s.given && now.Sub(s.since) < settle6 {
		s.retryAt = now.Add(settle6 / 10)
		return false
	}
	return true
}

// problem notes why a pod is not served, logs it once, and plans the next attempt.
func (m *Manager) problem(b *bound, now time.Time, err error) {
	s := &b.serve
	said := err.Error()
	if errors.Is(err, errNoLoopback) {
		said = "the loopback device in the pod's network namespace is down"
	}
	if s.problem != said {
		s.problem = said
		m.cfg.Logger.Warn("a pod cannot be served by the proxy, retrying", "pod", b.label(), "netns", b.space.name(), "error", said)
	}
	s.wait = min(max(2*s.wait, retryFirst), retryLast)
	s.retryAt = now.Add(s.wait)
}

// inspect looks whether a stranger has come to the port of pods that are served. Such a pod is taken back; what it is then
// announced as has no listeners.
func (m *Manager) inspect(now time.Time) {
	for _, b := range m.pods {
		if b.space == nil || !b.serve.given {
			continue
		}
		if err := b.space.shared(&m.cfg); errors.As(err, new(*stranger)) {
			m.retract(b)
			m.problem(b, now, err)
		}
	}
}

// retract takes a pod back from the Handler and closes what it was not given yet.
func (m *Manager) retract(b *bound) {
	s := &b.serve
	for _, fd := range s.pending {
		closeFD(fd)
	}
	known := s.announced != nil
	b.serve = serve{}
	if known {
		m.cfg.Handler.PodGone(b.UID)
	}
}

// equal tells whether two specs say the same.
func (s *Spec) equal(b *Spec) bool {
	return slices.Equal(s.IPs, b.IPs) && s.Created.Equal(b.Created) &&
		s.UID == b.UID && s.Namespace == b.Namespace && s.Name == b.Name && s.ServiceAccount == b.ServiceAccount &&
		s.Enrolled == b.Enrolled && s.Ignored == b.Ignored && s.Deleting == b.Deleting && s.AccelerateBlocking == b.AccelerateBlocking
}

func (b *bound) label() string { return fmt.Sprintf("%s/%s", b.Namespace, b.Name) }
