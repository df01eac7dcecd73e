package pod

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

// Manager joins wanted pods, namespace files and addresses, and tells a Handler which pods are here.
//
// Everything below mu belongs to Run's goroutine alone, which also makes all calls to the Handler. Other goroutines
// leave messages: what is wanted (under mu), files (inotify), addresses (one goroutine per namespace).
type Manager struct {
	cfg Config

	mu     sync.Mutex
	wanted map[string]Spec // as set last
	wake   chan struct{}

	addresses chan addresses
	pods      map[string]*bound // by UID
	spaces    map[spaceID]*space
	watching  sync.WaitGroup
	done      chan struct{} // closed when Run ends
	status    atomic.Pointer[[]Status]
}

// addresses are those that a namespace has now.
type addresses struct {
	space *space
	have  map[netip.Addr]bool
}

// New prepares a Manager; Run makes it work.
func New(cfg Config) (*Manager, error) {
	if cfg.NetnsDir == "" {
		return nil, fmt.Errorf("the folder of network namespaces is not given (--netns-dir)")
	}
	if cfg.Handler == nil {
		return nil, fmt.Errorf("pod: Config.Handler is required")
	}
	if cfg.OutboundPort == 0 {
		cfg.OutboundPort = DefaultOutboundPort
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Manager{
		cfg:       cfg,
		wanted:    map[string]Spec{},
		wake:      make(chan struct{}, 1),
		addresses: make(chan addresses),
		pods:      map[string]*bound{},
		spaces:    map[spaceID]*space{},
		done:      make(chan struct{}),
	}, nil
}

// SetPods replaces all wanted pods.
func (m *Manager) SetPods(pods []Spec) {
	wanted := make(map[string]Spec, len(pods))
	for _, p := range pods {
		wanted[p.UID] = p
	}
	m.mu.Lock()
	m.wanted = wanted
	m.mu.Unlock()
	m.signal()
}

// SetPod adds a wanted pod or changes it.
func (m *Manager) SetPod(p Spec) {
	m.mu.Lock()
	m.wanted[p.UID] = p
	m.mu.Unlock()
	m.signal()
}

// DeletePod removes a wanted pod.
func (m *Manager) DeletePod(uid string) {
	m.mu.Lock()
	delete(m.wanted, uid)
	m.mu.Unlock()
	m.signal()
}

func (m *Manager) signal() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Status describes every wanted pod, sorted by name.
func (m *Manager) Status() []Status {
	if s := m.status.Load(); s != nil {
		return *s
	}
	return nil
}

// Run works until ctx ends, and then closes all that is its own. It makes no calls to the Handler then: what the
// Handler was given stays open, so that the proxy can drain. Run may be called once.
func (m *Manager) Run(ctx context.Context) error {
	files, err := newFolder(m.cfg.NetnsDir, m.cfg.Logger)
	if err != nil {
		return fmt.Errorf("watch %s: %w", m.cfg.NetnsDir, err)
	}
	defer m.stop(files)
	scan := time.NewTicker(scanEvery)
	defer scan.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	files.scan(time.Now(), m)
	for scans := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		case a := <-m.addresses:
			m.setAddresses(a)
		case e := <-files.watcher.Events:
			m.fileEvent(files, e)
		case err := <-files.watcher.Errors:
			m.cfg.Logger.Warn("inotify lost events, scanning", "dir", m.cfg.NetnsDir, "error", err)
			files.scan(time.Now(), m)
		case <-scan.C:
			files.scan(time.Now(), m)
			if scans++; scans%inspectEvery == 0 {
				m.inspect(time.Now())
			}
		case <-retry.C:
		}
		m.drain(files)
		next := files.due(time.Now(), m)
		m.reconcile(time.Now())
		retry.Reset(m.until(next))
	}
}

// drain takes what has arrived meanwhile, so that a burst is worked out once.
func (m *Manager) drain(files *folder) {
	for range 256 {
		select {
		case a := <-m.addresses:
			m.setAddresses(a)
		case e := <-files.watcher.Events:
			m.fileEvent(files, e)
		default:
			return
		}
	}
}

func (m *Manager) fileEvent(files *folder, e fsnotify.Event) {
	if filepath.Clean(e.Name) == filepath.Clean(m.cfg.NetnsDir) {
		files.scan(time.Now(), m)
		return
	}
	if e.Has(fsnotify.Create) || e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename) {
		files.look(filepath.Base(e.Name), time.Now(), m)
	}
}

// found takes a namespace's file. It keeps or closes the descriptor.
func (m *Manager) found(name string, file *os.File, id spaceID) error {
	if s := m.spaces[id]; s != nil {
		s.names[name] = true
		return file.Close()
	}
	s, err := newSpace(file, id)
	if err != nil {
		_ = file.Close()
		return err
	}
	s.names[name] = true
	m.spaces[id] = s
	m.watching.Go(func() { m.follow(s) })
	return nil
}

// follow passes the addresses of a namespace on until it is closed.
func (m *Manager) follow(s *space) {
	publish := func(have map[netip.Addr]bool) {
		select {
		case m.addresses <- addresses{s, have}:
		case <-m.done:
		}
	}
	if err := s.watch.run(publish); err != nil {
		publish(map[netip.Addr]bool{}) // It must not hold up the others.
		m.cfg.Logger.Error("the addresses of a network namespace cannot be followed; its pod is not noticed until the agent restarts", "netns", s.file.Name(), "error", err)
	}
}

func (m *Manager) setAddresses(a addresses) {
	if m.spaces[a.space.id] != a.space {
		return // Closed meanwhile.
	}
	a.space.addrs = a.have
	for _, b := range m.pods {
		if b.space == a.space {
			b.serve.retryAt = time.Time{}
		}
	}
}

// lost notes that a file is gone; with its last file goes the namespace and whatever pod was in it.
func (m *Manager) lost(name string, id spaceID) {
	s := m.spaces[id]
	if s == nil {
		return
	}
	delete(s.names, name)
	if len(s.names) > 0 {
		return
	}
	delete(m.spaces, id)
	s.names[name] = true // For the log.
	for _, b := range m.pods {
		if b.space == s {
			m.leave(b)
		}
	}
	s.close()
}

// reconcile brings everything to where it should be.
func (m *Manager) reconcile(now time.Time) {
	for _, b := range m.takeWanted(now) {
		if b.space != nil {
			m.leave(b)
		}
	}
	for {
		moves := match(m.pods, m.spaces, m.cfg.NetnsDir, now)
		for b := range moves {
			if b.space != nil {
				m.leave(b)
			}
		}
		for b, to := range moves {
			b.space = to
			if to != nil {
				to.hadPod = b.UID
			}
		}
		if len(moves) == 0 {
			break
		}
	}
	for _, b := range m.pods {
		if b.space != nil {
			m.advance(b, now)
		}
	}
	m.publish()
}

// takeWanted compares what is wanted with what was, and gives the pods that are wanted no more.
func (m *Manager) takeWanted(now time.Time) (gone []*bound) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for uid, b := range m.pods {
		if _, still := m.wanted[uid]; !still {
			gone = append(gone, b)
			delete(m.pods, uid)
		}
	}
	for uid, spec := range m.wanted {
		b := m.pods[uid]
		if b == nil {
			b = &bound{seen: now}
			m.pods[uid] = b
		}
		if !slices.Equal(b.IPs, spec.IPs) {
			b.seen = now
		}
		b.Spec = spec
	}
	return gone
}

// leave takes a pod out of its namespace.
func (m *Manager) leave(b *bound) {
	m.cfg.Logger.Info("pod left its network namespace", "pod", b.label(), "netns", b.space.name())
	m.retract(b)
	b.space = nil
}

// until is how long nothing has to be tried again.
func (m *Manager) until(next time.Time) time.Duration {
	for _, b := range m.pods {
		if at := b.serve.retryAt; !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	if next.IsZero() {
		return time.Hour
	}
	return max(time.Until(next), time.Millisecond)
}

// publish makes Status's answer.
func (m *Manager) publish() {
	list := make([]Status, 0, len(m.pods))
	for _, b := range m.pods {
		s := Status{Spec: b.Spec, Ready: b.serve.announced != nil && (b.serve.given || !b.serve.announced.Enrolled), Reason: cmp.Or(b.serve.problem, b.place)}
		if b.space != nil {
			s.Cookie, s.NetnsName = b.space.cookie, b.space.name()
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	m.status.Store(&list)
}

// stop closes all that is the Manager's own and waits for its goroutines.
func (m *Manager) stop(files *folder) {
	close(m.done)
	files.close()
	for _, s := range m.spaces {
		s.close()
	}
	for _, b := range m.pods {
		for _, fd := range b.serve.pending {
			closeFD(fd)
		}
	}
	m.watching.Wait()
}

func closeFD(fd int) { _ = unix.Close(fd) }
