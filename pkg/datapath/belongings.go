package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// What belongs to a pool beside its slots: the backends that sockets and clients may stick to (sm_members), and the ranges
// of clients that may use it (sm_sources). Both are sets: what is new is added before the pool's target changes, what is
// old is removed afterwards, so that at no moment a good backend or an allowed client is missing.

// Bits of sm_target.flags; bpf/common.h explains them.
const (
	targetMembers = 1 << 0
	targetLocal   = 1 << 1
	targetSilent  = 1 << 2
	targetSources = 1 << 3
)

// frontPorts is where in sm_nat_ports the frontends' ports begin: bpf/nat.h.
const frontPorts = 1024

// poolSets holds a set for each pool that has one.
type poolSets[E comparable] map[uint32]map[E]struct{}

func (s poolSets[E]) add(pool uint32, e E) {
	if s[pool] == nil {
		s[pool] = map[E]struct{}{}
	}
	s[pool][e] = struct{}{}
}

func (s poolSets[E]) remove(pool uint32, e E) {
	delete(s[pool], e)
	if len(s[pool]) == 0 {
		delete(s, pool)
	}
}

func (s poolSets[E]) len() int {
	n := 0
	for _, set := range s {
		n += len(set)
	}
	return n
}

// addTo puts those elements into a map that are not there yet; trimOf removes all but keep.
func addTo[E comparable](t *tables, m *ebpf.Map, sets poolSets[E], pool uint32, want []E, key func(E) any) error {
	for _, e := range want {
		if _, has := sets[pool][e]; has {
			continue
		}
		if err := t.put(m, key(e), uint32(1)); err != nil {
			return err
		}
		sets.add(pool, e)
	}
	return nil
}

func trimOf[E comparable](t *tables, m *ebpf.Map, sets poolSets[E], pool uint32, keep []E, key func(E) any) error {
	if len(sets[pool]) == 0 {
		return nil
	}
	kept := make(map[E]struct{}, len(keep))
	for _, e := range keep {
		kept[e] = struct{}{}
	}
	var errs []error
	for e := range sets[pool] {
		if _, stays := kept[e]; stays {
			continue
		}
		err := t.delete(m, key(e))
		if err == nil {
			sets.remove(pool, e)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func memberKeyOf(pool uint32) func(uint32) any {
	return func(backend uint32) any { return memberKey{Pool: pool, Backend: backend} }
}

func (t *tables) addMembers(pool uint32, ids []uint32) error {
	return addTo(t, t.o.members(), t.members, pool, ids, memberKeyOf(pool))
}

func (t *tables) trimMembers(pool uint32, keep []uint32) error {
	had := len(t.members[pool])
	err := trimOf(t, t.o.members(), t.members, pool, keep, memberKeyOf(pool))
	t.dismissed += had - len(t.members[pool])
	return err
}

func itself[E any](e E) any { return e }

func (t *tables) addSources(pool uint32, keys []sourceKey) error {
	return addTo(t, t.o.sources(), t.sources, pool, keys, itself)
}

func (t *tables) trimSources(pool uint32, keep []sourceKey) error {
	return trimOf(t, t.o.sources(), t.sources, pool, keep, itself)
}

// outsideWant is how clients outside are served at an address.
type outsideWant struct {
	backends []weighted
	affinity uint32 // seconds
	flags    uint16
	ranges   []netip.Prefix
}

// setOutside puts what outside clients get at an address in force.
func (t *tables) setOutside(key frontendKey, want outsideWant) error {
	now, exists := t.outside[key]
	pool := now.Pool
	if !exists {
		pool = t.nextPool
	}
	next := targetValue{Mode: modeService, AffinitySeconds: want.affinity, Flags: want.flags | stickiness(key, want.affinity)}
	var ranges []sourceKey
	if len(want.ranges) > 0 {
		next.Flags |= targetSources
		for _, p := range want.ranges {
			ranges = append(ranges, sourceKeyOf(pool, p))
		}
	}
	before := make([]sourceKey, 0, len(t.sources[pool]))
	for k := range t.sources[pool] {
		before = append(before, k)
	}
	err := errors.Join(t.markPort(key.Port), t.addSources(pool, ranges))
	if err == nil {
		err = setTarget(t, t.o.outside(), t.outside, key, next, want.backends)
	}
	if err != nil {
		return errors.Join(err, t.trimSources(pool, before))
	}
	return t.trimSources(pool, ranges)
}

// markPort tells the programs that some frontend has the port; it is never taken back.
func (t *tables) markPort(port uint16) error {
	index := uint32(frontPorts) + uint32(port>>6)
	var word uint64
	if err := t.o.natPorts().Lookup(index, &word); err != nil {
		return fmt.Errorf("read sm_nat_ports: %w", err)
	}
	if bit := uint64(1) << (port & 63); word&bit == 0 {
		return t.put(t.o.natPorts(), index, word|bit)
	}
	return nil
}

// sourceKeyOf is a range as the trie wants it: the pool's bits first, then the address as 16 bytes.
func sourceKeyOf(pool uint32, p netip.Prefix) sourceKey {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return sourceKey{Prefixlen: uint32(32 + bits), Pool: pool, Addr: addr16(p.Masked().Addr())}
}

// restoreMembers and restoreSources read what is pinned, and remove what belongs to no pool.
func (t *tables) restoreMembers() error {
	entries := map[memberKey]uint32{}
	err := readMap(t.o.members(), entries)
	for k := range entries {
		if _, ok := t.pools[k.Pool]; ok && t.refs[k.Backend] > 0 {
			t.members.add(k.Pool, k.Backend)
			continue
		}
		err = errors.Join(err, t.delete(t.o.members(), k))
	}
	return err
}

func (t *tables) restoreSources() error {
	entries := map[sourceKey]uint32{}
	err := readMap(t.o.sources(), entries)
	for k := range entries {
		if _, ok := t.pools[k.Pool]; ok {
			t.sources.add(k.Pool, k)
			continue
		}
		err = errors.Join(err, t.delete(t.o.sources(), k))
	}
	return err
}

// memberEntries and sourceEntries are what the two maps should hold.
func (t *tables) memberEntries() map[memberKey]uint32 {
	out := make(map[memberKey]uint32, t.members.len())
	for pool, set := range t.members {
		for id := range set {
			out[memberKey{Pool: pool, Backend: id}] = 1
		}
	}
	return out
}

func (t *tables) sourceEntries() map[sourceKey]uint32 {
	out := make(map[sourceKey]uint32, t.sources.len())
	for _, set := range t.sources {
		for k := range set {
			out[k] = 1
		}
	}
	return out
}
