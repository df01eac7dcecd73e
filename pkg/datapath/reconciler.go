package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sort"
	"sync"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// Sources of wanted state, as passed to Synced.
const (
	SourceServices = "services"
	SourceClaims   = "claims"
	SourcePods     = "pods"
)

// Pod is one pod of this node.
type Pod struct {
	Namespace, Name string
	// Cookie of its network namespace; 0 while unknown.
	Cookie uint64
	IPs    []netip.Addr
	// Enrolled: listeners may claim its connections.
	Enrolled bool
	// AccelerateBlocking opts its blocking sockets in to redirection.
	AccelerateBlocking bool
}

// Reconciler keeps the maps equal to the wanted state that its Set methods describe. Those only note what is wanted and
// return at once; Run writes, as many changes in one go as have come. It is the only writer of the configuration
// maps.
//
// Until every source has synced nothing is deleted: what an earlier agent wrote keeps working while this one
// learns the world. After SyncTimeout the sources that have synced may delete; those that haven't keep theirs.
type Reconciler struct {
	d    *Datapath
	log  *slog.Logger
	kick chan struct{}
	born time.Time

	mu       sync.Mutex
	services map[service.Name]*service.Service    // guarded by mu
	owners   map[frontendKey]map[service.Name]int // guarded by mu; Services that want the address, and which of their frontends
	claims   map[claimKey]mesh.Claim              // guarded by mu
	clashes  []EntryError                         // guarded by mu; claims that can't be
	pods     []Pod                                // guarded by mu
	dirty    dirt                                 // guarded by mu
	synced   map[string]bool                      // guarded by mu
	failed   map[string]EntryError                // guarded by mu
	failures uint64                               // guarded by mu; changes of failed
	applied  time.Time                            // guarded by mu
	timedOut bool                                 // guarded by mu
	ends     departures                           // guarded by mu
	endKick  chan struct{}                        // a backend stopped being a member of its pool
	heirs    bool                                 // guarded by mu; sockets from before this agent have not been looked at
	short    map[string]int                       // guarded by mu; entries of the maps that had no room, when that was last seen

	applyMu sync.Mutex
	tables  *tables         // guarded by applyMu
	pruned  map[string]bool // guarded by applyMu; sources whose leftovers were deleted once
	tight   map[string]bool // guarded by applyMu; maps that were said to be almost full
	// superseded: another agent writes the maps now; guarded by applyMu
	superseded bool
}

// dirt is what has to be looked at.
type dirt struct {
	frontends    map[frontendKey]struct{}
	claims, pods bool
}

func newReconciler(d *Datapath) (*Reconciler, error) {
	t, err := newTables(d.objs)
	if err != nil {
		return nil, err
	}
	return &Reconciler{
		d: d, log: d.log, kick: make(chan struct{}, 1), endKick: make(chan struct{}, 1), born: time.Now(), ends: departures{}, short: map[string]int{},
		services: map[service.Name]*service.Service{}, owners: map[frontendKey]map[service.Name]int{},
		claims: map[claimKey]mesh.Claim{}, synced: map[string]bool{}, failed: map[string]EntryError{},
		dirty: dirt{frontends: map[frontendKey]struct{}{}}, tables: t, pruned: map[string]bool{}, tight: map[string]bool{},
	}, nil
}

// SetService adds or replaces a Service. The value must not change afterwards.
func (r *Reconciler) SetService(s *service.Service) {
	r.mu.Lock()
	r.ends.left(r.services[s.Name], s, time.Now())
	r.forget(s.Name)
	r.services[s.Name] = s
	for i := range frontendCount(s) {
		key := keyOf(frontendAt(s, i))
		if r.owners[key] == nil {
			r.owners[key] = map[service.Name]int{}
		}
		r.owners[key][s.Name] = i
		r.dirty.frontends[key] = struct{}{}
	}
	r.mu.Unlock()
	r.wake()
}

// DeleteService removes a Service.
func (r *Reconciler) DeleteService(name service.Name) {
	r.mu.Lock()
	r.ends.left(r.services[name], nil, time.Now())
	r.forget(name)
	r.mu.Unlock()
	r.wake()
}

// forget drops what a Service wanted and marks its addresses. Caller holds mu.
func (r *Reconciler) forget(name service.Name) {
	old := r.services[name]
	if old == nil {
		return
	}
	for i := range frontendCount(old) {
		key := keyOf(frontendAt(old, i))
		delete(r.owners[key], name)
		if len(r.owners[key]) == 0 {
			delete(r.owners, key)
		}
		r.dirty.frontends[key] = struct{}{}
	}
	delete(r.services, name)
}

// frontendAt numbers a Service's frontends, those on loopback after the others.
func frontendAt(s *service.Service, i int) *service.Frontend {
	if i < len(s.Frontends) {
		return &s.Frontends[i]
	}
	return &s.Loopback[i-len(s.Frontends)]
}

func frontendCount(s *service.Service) int { return len(s.Frontends) + len(s.Loopback) }

func keyOf(f *service.Frontend) frontendKey { return frontendKeyOf(f.Addr, uint8(f.Protocol)) }

// SetClaims replaces all claims. Of two claims to one address the first wins, and Status names the other.
func (r *Reconciler) SetClaims(claims []mesh.Claim) {
	next := make(map[claimKey]mesh.Claim, len(claims))
	var clashes []EntryError
	for _, c := range claims {
		clash := EntryError{Kind: "claim", Name: c.Listener, Addr: c.Addr.String()}
		key := claimKeyOf(c.Addr)
		first, taken := next[key]
		switch {
		case !c.Addr.Addr().IsValid():
			clash.Error = "no address"
		case c.Addr.Port() == 0 && !c.Addr.Addr().IsUnspecified():
			clash.Error = "port 0 can only be claimed for every address"
		case taken:
			clash.Error = fmt.Sprintf("listener %s claims the same address", first.Listener)
		default:
			next[key] = c
			continue
		}
		clashes = append(clashes, clash)
	}
	r.mu.Lock()
	r.claims, r.clashes, r.dirty.claims = next, clashes, true
	r.mu.Unlock()
	r.wake()
}

// SetPods replaces the list of this node's pods.
func (r *Reconciler) SetPods(pods []Pod) {
	r.mu.Lock()
	r.pods, r.dirty.pods = append([]Pod(nil), pods...), true
	r.mu.Unlock()
	r.wake()
}

// Synced says that the source has delivered its first full list.
func (r *Reconciler) Synced(source string) {
	r.mu.Lock()
	r.synced[source] = true
	r.mu.Unlock()
	r.wake()
}

// adopt takes what the maps hold now for what is known of them, and has everything looked at again. Caller holds applyMu.
func (r *Reconciler) adopt(t *tables) {
	t.writes, t.deletes, t.drift = r.tables.writes, r.tables.deletes, r.tables.drift
	r.tables = t
	r.mu.Lock()
	defer r.mu.Unlock()
	for key := range r.owners {
		r.dirty.frontends[key] = struct{}{}
	}
	r.dirty.claims, r.dirty.pods = true, true
	r.pruned = map[string]bool{} // what nobody wants any more is found as after a start
}

func (r *Reconciler) wake() {
	select {
	case r.kick <- struct{}{}:
	default: // one is on its way, and will see this change too
	}
}

// Run applies changes until ctx ends, and looks for drift every DriftInterval.
func (r *Reconciler) Run(ctx context.Context) error {
	go r.endLoop(ctx)
	drift := time.NewTicker(r.d.cfg.DriftInterval)
	defer drift.Stop()
	timeout := time.NewTimer(time.Until(r.born.Add(r.d.cfg.SyncTimeout)))
	defer timeout.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.kick:
			r.apply()
		case <-timeout.C:
			r.timeOut()
			r.apply()
		case <-drift.C:
			r.Repair()
		}
	}
}

func (r *Reconciler) timeOut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timedOut = true
	if waiting := r.waiting(); len(waiting) > 0 {
		r.log.Warn("some sources have not delivered their first list in time; their entries of before stay as they are",
			"waiting", waiting, "timeout", r.d.cfg.SyncTimeout)
	}
}

// waiting lists the sources that have not synced. Caller holds mu.
func (r *Reconciler) waiting() []string {
	var out []string
	for _, s := range r.d.cfg.Sources {
		if !r.synced[s] {
			out = append(out, s)
		}
	}
	return out
}

// mayDelete tells whether entries of the source may go. Caller holds mu.
func (r *Reconciler) mayDelete(source string) bool {
	waiting := r.waiting()
	return len(waiting) == 0 || r.timedOut && r.synced[source]
}

// Flush writes everything that was set before the call, and returns what could not be written. Returns ErrSuperseded
// where another agent has taken over.
func (r *Reconciler) Flush(context.Context) error {
	r.apply()
	r.applyMu.Lock()
	superseded := r.superseded
	r.applyMu.Unlock()
	if superseded {
		return ErrSuperseded
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, e := range r.failed {
		errs = append(errs, fmt.Errorf("%s %s of %s: %s", e.Kind, e.Addr, e.Name, e.Error))
	}
	return errors.Join(errs...)
}

// Repair compares the maps with what was written, puts right what differs, and returns how many entries that were.
func (r *Reconciler) Repair() int {
	r.mu.Lock()
	prune := len(r.waiting()) == 0
	r.retryFailed()
	r.mu.Unlock()
	r.applyMu.Lock()
	var n int
	var err error
	if r.mayWrite() {
		n, err = r.tables.repair(prune)
		r.watchFill()
	}
	r.applyMu.Unlock()
	if n > 0 {
		r.log.Warn("map entries had been changed by somebody else and were put right", "entries", n)
	}
	if err != nil {
		r.log.Error("repair of the maps is incomplete", "error", err)
	}
	r.d.dir.sweepRetired()
	r.wake()
	return n
}

// entries of the configuration maps. Once superseded they are somebody else's, and have to be counted.
func (r *Reconciler) entries() map[string]int {
	r.applyMu.Lock()
	defer r.applyMu.Unlock()
	if r.superseded {
		return nil
	}
	return r.tables.entries()
}

// Status of the reconciliation.
func (r *Reconciler) Status() ReconcilerStatus {
	r.applyMu.Lock()
	t := r.tables
	s := ReconcilerStatus{Superseded: r.superseded, DriftRepaired: t.drift, Writes: t.writes, Deletes: t.deletes,
		EndedTCP: r.d.endedTCP.Load(), EndedUDP: r.d.endedUDP.Load()}
	r.applyMu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Waiting = r.waiting()
	s.Synced = len(s.Waiting) == 0 || r.timedOut
	s.TimedOut = r.timedOut && len(s.Waiting) > 0
	s.Pending = len(r.dirty.frontends)
	s.Errors = r.errors()
	s.LastApplied = r.applied
	return s
}

// errors lists what is not in force. Caller holds mu.
func (r *Reconciler) errors() []EntryError {
	out := append([]EntryError(nil), r.clashes...)
	for _, e := range r.failed {
		out = append(out, e)
	}
	for key, owners := range r.owners {
		if len(owners) < 2 {
			continue
		}
		first, _ := r.ownerOf(key)
		for name := range owners {
			if name != first {
				out = append(out, EntryError{Kind: "frontend", Name: name.String(), Addr: frontendAddr(key),
					Error: fmt.Sprintf("Service %s has the same address and comes first", first)})
			}
		}
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := out[i], out[j]
		return a.Kind+a.Addr+a.Name < b.Kind+b.Addr+b.Name
	})
	return out
}
