package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// job is one entry to bring in line; want nil deletes it.
type job struct {
	id    string // of the error, if there is one
	label EntryError
	run   func() error
}

// batch is one pass: everything that is added or changed, then everything that goes.
type batch struct {
	sets, deletes []job
	keep          []frontendKey // to be deleted, but not yet
}

// apply brings the maps in line with what is wanted now. Additions come first; what didn't fit is tried again when the
// deletions have made room.
func (r *Reconciler) apply() {
	r.applyMu.Lock()
	defer r.applyMu.Unlock()
	if !r.mayWrite() {
		return
	}
	var b batch
	r.mu.Lock()
	opened := r.openGates()
	r.planFrontends(&b)
	claimBits := r.planClaims(&b)
	r.planPods(&b)
	for _, key := range b.keep {
		r.dirty.frontends[key] = struct{}{}
	}
	complete := len(r.waiting()) == 0 || r.timedOut
	r.mu.Unlock()

	if claimBits != 0 { // before the first claim is written: the programs skip maps that are said to be empty
		r.setTableFlags(claimBits | r.tableFlags())
	}
	again := r.run(b.sets, false)
	r.run(b.deletes, true)
	r.run(again, true)
	r.mu.Lock()
	heirs := r.heirs
	r.retryWithRoom()
	r.mu.Unlock()
	if r.tables.dismissed > 0 || heirs {
		r.tables.dismissed = 0
		select {
		case r.endKick <- struct{}{}:
		default:
		}
	}
	r.setTableFlags(r.tableFlags())

	r.mu.Lock()
	r.applied = time.Now()
	r.mu.Unlock()
	if opened {
		r.watchFill()
		r.log.Info("the maps hold what the sources want", "writes", r.tables.writes, "deletes", r.tables.deletes,
			"frontends", len(r.tables.frontends), "backends", len(r.tables.backends), "claims", len(r.tables.claims))
	}
	if complete && !r.d.Live() {
		if err := r.d.goLive(); err != nil {
			r.log.Error("attach the programs", "error", err)
		}
	}
}

// mayWrite is false once another agent has taken over. Caller holds applyMu.
func (r *Reconciler) mayWrite() bool {
	if !r.superseded && !r.d.inCharge() {
		r.superseded = true
		r.log.Info("another agent has taken over the maps; this one leaves them alone from now on")
	}
	return !r.superseded
}

// run executes jobs and keeps the list of those that fail. Those that fail because a map is full come back unless
// final.
func (r *Reconciler) run(jobs []job, final bool) []job {
	var again []job
	for _, j := range jobs {
		err := j.run()
		var full *fullError
		if errors.As(err, &full); full != nil && !final {
			again = append(again, j)
			continue
		}
		r.mu.Lock()
		_, known := r.failed[j.id]
		if err != nil {
			j.label.Error = err.Error()
			if full != nil {
				j.label.Map = full.Map
			}
			if r.failed[j.id] != j.label {
				r.failures++
			}
			r.failed[j.id] = j.label
		} else {
			r.forgive(j.id)
		}
		r.mu.Unlock()
		if err != nil && !known {
			r.log.Error("an entry can't be written; those that are there keep working",
				"kind", j.label.Kind, "name", j.label.Name, "addr", j.label.Addr, "error", err)
		}
	}
	return again
}

// forgive forgets a failure, if there was one. Caller holds mu.
func (r *Reconciler) forgive(id string) {
	if _, failed := r.failed[id]; failed {
		delete(r.failed, id)
		r.failures++
	}
}

// retryWithRoom tries again what found a map full, once something has gone from that map. Caller holds mu and applyMu.
func (r *Reconciler) retryWithRoom() {
	now, entries := map[string]int{}, map[string]int(nil)
	retry := false
	for _, e := range r.failed {
		if _, looked := now[e.Map]; e.Map == "" || looked {
			continue
		}
		if entries == nil {
			entries = r.tables.entries()
		}
		now[e.Map] = entries[e.Map]
		before, known := r.short[e.Map]
		retry = retry || known && now[e.Map] < before
	}
	r.short = now
	if retry {
		r.retryFailed()
		r.wake()
	}
}

// retryFailed marks what failed before as dirty. Caller holds mu.
func (r *Reconciler) retryFailed() {
	fronts := map[string]bool{}
	defer func() {
		for key := range r.owners {
			if len(fronts) > 0 && fronts[frontendAddr(key)] {
				r.dirty.frontends[key] = struct{}{}
			}
		}
	}()
	for _, e := range r.failed {
		switch e.Kind {
		case "claim":
			r.dirty.claims = true
		case "pod", "local":
			r.dirty.pods = true
		case "frontend", "outside":
			fronts[e.Addr] = true
		}
	}
}

// openGates marks the leftovers of sources that may delete since now. Caller holds mu and applyMu.
func (r *Reconciler) openGates() bool {
	opened := false
	for _, s := range []string{SourceServices, SourceClaims, SourcePods} {
		if r.pruned[s] || !r.mayDelete(s) {
			continue
		}
		r.pruned[s], opened = true, true
		switch s {
		case SourceServices:
			r.heirs = r.d.cfg.Services
			for key := range r.tables.frontends {
				r.dirty.frontends[key] = struct{}{}
			}
			for key := range r.tables.outside {
				r.dirty.frontends[key] = struct{}{}
			}
		case SourceClaims:
			r.dirty.claims = true
		case SourcePods:
			r.dirty.pods = true
		}
	}
	return opened
}

// planFrontends turns marked Service addresses into jobs: one for clients inside, one for those outside. Caller holds mu and
// applyMu.
func (r *Reconciler) planFrontends(b *batch) {
	may := r.mayDelete(SourceServices)
	for key := range r.dirty.frontends {
		addr := frontendAddr(key)
		name, f := r.ownerOf(key)
		inside := job{"frontend " + addr, EntryError{Kind: "frontend", Addr: addr, Name: name.String()}, nil}
		outside := job{"outside " + addr, EntryError{Kind: "outside", Addr: addr, Name: name.String()}, nil}
		if f == nil {
			_, hasInside := r.tables.frontends[key]
			_, hasOutside := r.tables.outside[key]
			if (hasInside || hasOutside) && !may {
				b.keep = append(b.keep, key)
				continue
			}
			inside.run = func() error { return r.tables.deleteFrontend(key) }
			outside.run = func() error { return r.tables.deleteOutside(key) }
			b.deletes = append(b.deletes, outside, inside)
			continue
		}
		affinity := uint32(f.Affinity / time.Second)
		want, err := backendsOf(f, f.Backends)
		inside.run = func() error {
			return cmp.Or(r.tables.setFrontend(key, want, affinity), err)
		}
		b.sets = append(b.sets, inside)
		if !r.d.cfg.Outside || f.External == nil || f.Addr.Addr().IsLoopback() {
			outside.run = func() error { return r.tables.deleteOutside(key) }
			b.deletes = append(b.deletes, outside)
			continue
		}
		external, err := outsideOf(f, affinity)
		outside.run = func() error {
			return cmp.Or(r.tables.setOutside(key, external), err)
		}
		b.sets = append(b.sets, outside)
	}
	clear(r.dirty.frontends)
}

// outsideOf is what clients outside get at a frontend.
func outsideOf(f *service.Frontend, affinity uint32) (outsideWant, error) {
	backends, err := backendsOf(f, f.External.Backends)
	want := outsideWant{backends: backends, affinity: affinity, ranges: f.External.Sources}
	if f.External.Local {
		want.flags |= targetLocal
	}
	if f.External.Silent {
		want.flags |= targetSilent
	}
	return want, err
}

// ownerOf picks the Service that an address belongs to: where several want it, the first by name, so that the order of
// events doesn't matter. Caller holds mu.
func (r *Reconciler) ownerOf(key frontendKey) (service.Name, *service.Frontend) {
	owners := r.owners[key]
	if len(owners) == 0 {
		return service.Name{}, nil
	}
	names := make([]service.Name, 0, len(owners))
	for n := range owners {
		names = append(names, n)
	}
	first := slices.MinFunc(names, func(a, b service.Name) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return first, frontendAt(r.services[first], owners[first])
}

// backendsOf lists those backends that a frontend's family can reach.
func backendsOf(f *service.Frontend, list []service.Backend) ([]weighted, error) {
	addrs := make([]netip.AddrPort, 0, len(list))
	var err error
	for _, b := range list {
		if e := reachable(f.Addr.Addr(), b.Addr); e != nil {
			err = e
			continue
		}
		addrs = append(addrs, b.Addr)
	}
	return even(addrs), err
}

// reachable: an IPv4 socket can't be sent to an IPv6 address. The other way round works by v4-mapped addresses.
func reachable(front netip.Addr, to netip.AddrPort) error {
	if !to.IsValid() || to.Port() == 0 {
		return fmt.Errorf("endpoint %s has no address or port and is left out", to)
	}
	if front.Unmap().Is4() && !to.Addr().Unmap().Is4() {
		return fmt.Errorf("IPv6 endpoint %s can't serve an IPv4 address and is left out", to)
	}
	return nil
}

// planClaims turns the wanted claims into jobs, and returns the flags that they need. Caller holds mu and applyMu.
func (r *Reconciler) planClaims(b *batch) uint32 {
	if !r.dirty.claims {
		return 0
	}
	var bits uint32
	for key, c := range r.claims {
		bits |= claimBit(key)
		label := EntryError{Kind: "claim", Name: c.Listener, Addr: c.Addr.String()}
		b.sets = append(b.sets, job{"claim " + c.Addr.String(), label, func() error { return r.setClaim(key, c) }})
	}
	may := r.mayDelete(SourceClaims)
	r.dirty.claims = false
	for key := range r.tables.claims {
		if _, wanted := r.claims[key]; wanted {
			continue
		}
		if !may {
			r.dirty.claims = true
			continue
		}
		addr := addrPort(key.Addr, key.Port).String()
		b.deletes = append(b.deletes, job{"claim " + addr, EntryError{Kind: "claim", Addr: addr}, func() error { return r.tables.deleteClaim(key) }})
	}
	for id, e := range r.failed { // claims that failed and are wanted no more
		if a, err := netip.ParseAddrPort(e.Addr); e.Kind == "claim" && err == nil {
			if _, wanted := r.claims[claimKeyOf(a)]; !wanted {
				r.forgive(id)
			}
		}
	}
	return bits
}

func (r *Reconciler) setClaim(key claimKey, c mesh.Claim) error {
	if c.Offload == nil {
		return r.tables.setClaim(key, modeProxy, nil)
	}
	var left error
	want := flatten(c.Offload)
	for i := range want {
		if !want[i].addr.IsValid() {
			continue
		}
		if err := reachable(c.Addr.Addr(), want[i].addr); err != nil {
			left = err
			want[i].addr = netip.AddrPort{} // its share is refused, as the proxy would fail it
		}
	}
	if err := r.tables.setClaim(key, modeOffload, want); err != nil {
		return err
	}
	return left
}

func claimBit(key claimKey) uint32 {
	switch {
	case !netip.AddrFrom16(key.Addr).Unmap().IsUnspecified():
		return flagClaimsExact
	case key.Port != 0:
		return flagClaimsPort
	}
	return flagClaimsCatchAll
}

// tableFlags say what is in the maps. Caller holds applyMu, or is Open.
func (r *Reconciler) tableFlags() uint32 {
	var bits uint32
	if len(r.tables.outside) > 0 || r.d.natBusy() {
		bits |= flagOutside
	}
	if r.tables.loopbacks > 0 {
		bits |= flagLoopbackPorts
	}
	for key := range r.tables.claims {
		bits |= claimBit(key)
	}
	return bits
}

// refreshFlags is for when the maps that the programs fill have changed what must be done.
func (r *Reconciler) refreshFlags() {
	r.applyMu.Lock()
	defer r.applyMu.Unlock()
	if r.mayWrite() {
		r.setTableFlags(r.tableFlags())
	}
}

func (r *Reconciler) setTableFlags(bits uint32) {
	r.d.mu.Lock()
	same := r.d.flags&flagTables == bits
	r.d.mu.Unlock()
	if same {
		return
	}
	if err := r.d.setFlags(bits, flagTables); err != nil {
		r.log.Error("tell the programs what the maps hold", "error", err)
	}
}

// planPods turns the wanted pods into jobs. Caller holds mu and applyMu.
func (r *Reconciler) planPods(b *batch) {
	if !r.dirty.pods {
		return
	}
	netns, local := map[uint64]netnsValue{}, map[localKey]localValue{}
	names := map[any]string{}
	for _, p := range r.pods {
		var flags uint32
		if p.Enrolled {
			flags |= 1
			if p.AccelerateBlocking {
				flags |= 2
			}
			if p.Cookie != 0 {
				netns[p.Cookie] = netnsValue{Flags: flags}
				names[p.Cookie] = p.Namespace + "/" + p.Name
			}
		}
		for _, ip := range p.IPs {
			key := localKey{Addr: addr16(ip)}
			local[key] = localValue{Netns: p.Cookie, Flags: flags}
			names[key] = p.Namespace + "/" + p.Name
		}
	}
	may := r.mayDelete(SourcePods)
	r.dirty.pods = false
	t := r.tables
	keptA := planPlain(b, t.netns, netns, may, "pod", func(k uint64) string { return fmt.Sprint("netns ", k) }, names,
		func(k uint64, v *netnsValue) error { return setPlain(t, t.o.netns(), t.netns, k, v) })
	keptB := planPlain(b, t.local, local, may, "local", func(k localKey) string { return netip.AddrFrom16(k.Addr).Unmap().String() }, names,
		func(k localKey, v *localValue) error { return setPlain(t, t.o.local(), t.local, k, v) })
	r.dirty.pods = keptA || keptB
	for id, e := range r.failed { // pods that failed and are wanted no more
		if (e.Kind == "pod" || e.Kind == "local") && !slices.ContainsFunc(b.sets, func(j job) bool { return j.id == id }) {
			r.forgive(id)
		}
	}
}

// planPlain diffs a map without indirection; it returns whether something stays that isn't wanted.
func planPlain[K, V comparable](b *batch, now, want map[K]V, may bool, kind string, addr func(K) string, names map[any]string, set func(K, *V) error) (kept bool) {
	for k, v := range want {
		if old, ok := now[k]; ok && old == v {
			continue
		}
		label := EntryError{Kind: kind, Name: names[k], Addr: addr(k)}
		b.sets = append(b.sets, job{kind + " " + addr(k), label, func() error { return set(k, &v) }})
	}
	for k := range now {
		if _, ok := want[k]; ok {
			continue
		}
		if !may {
			kept = true
			continue
		}
		label := EntryError{Kind: kind, Addr: addr(k)}
		b.deletes = append(b.deletes, job{kind + " " + addr(k), label, func() error { return set(k, nil) }})
	}
	return kept
}

func frontendAddr(k frontendKey) string {
	return service.Protocol(k.Proto).String() + " " + addrPort(k.Addr, k.Port).String()
}
