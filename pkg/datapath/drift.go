package datapath

import (
	"errors"

	"github.com/cilium/ebpf"
)

// Repair compares every map with what was written and puts right what somebody else changed. prune also removes
// entries that are nobody's; it is off until every source has synced. Returns how many entries were wrong.
func (t *tables) repair(prune bool) (int, error) {
	wrong := 0
	var errs []error
	count := func(n int, err error) {
		wrong += n
		errs = append(errs, err)
	}
	// In the order of writing, so that nothing ever leads to what isn't there.
	count(repairMap(t, t.o.backends(), t.backends, true))
	count(t.repairSlots())
	count(repairMap(t, t.o.members(), t.memberEntries(), true))
	count(repairMap(t, t.o.sources(), t.sourceEntries(), true))
	count(repairMap(t, t.o.frontends(), t.frontends, prune))
	count(repairMap(t, t.o.outside(), t.outside, prune))
	count(repairMap(t, t.o.claims(), t.claims, prune))
	count(repairMap(t, t.o.netns(), t.netns, prune))
	count(repairMap(t, t.o.local(), t.local, prune))
	t.drift += uint64(wrong)
	return wrong, errors.Join(errs...)
}

func repairMap[K, V comparable](t *tables, m *ebpf.Map, want map[K]V, prune bool) (int, error) {
	wrong, seen := 0, 0
	var errs []error
	var unknown []K
	err := eachEntry(m, func(k K, v V) {
		w, ok := want[k]
		switch {
		case !ok:
			unknown = append(unknown, k)
			return
		case w != v:
			wrong++
			errs = append(errs, t.put(m, k, w))
		}
		seen++
	})
	errs = append(errs, err)
	var v V
	if seen < len(want) {
		for k, w := range want {
			if err := m.Lookup(k, &v); errors.Is(err, ebpf.ErrKeyNotExist) {
				wrong++
				errs = append(errs, t.put(m, k, w))
			}
		}
	}
	if prune {
		for _, k := range unknown {
			wrong++
			errs = append(errs, t.delete(m, k))
		}
	}
	return wrong, errors.Join(errs...)
}

// repairSlots does the same for the slots, which are kept by pool.
func (t *tables) repairSlots() (int, error) {
	m := t.o.slots()
	wrong, seen, total := 0, 0, 0
	var errs []error
	var unknown []slotKey
	err := eachEntry(m, func(k slotKey, v slotValue) {
		p, ok := t.pools[k.Pool]
		if !ok || p.generation != k.Generation || k.Slot >= uint32(len(p.slots)) {
			unknown = append(unknown, k)
			return
		}
		if p.slots[k.Slot] != v {
			wrong++
			errs = append(errs, t.put(m, k, p.slots[k.Slot]))
		}
		seen++
	})
	errs = append(errs, err)
	var v slotValue
	for _, p := range t.pools {
		total += len(p.slots)
	}
	if seen < total {
		for id, p := range t.pools {
			for i, want := range p.slots {
				k := slotKey{Pool: id, Generation: p.generation, Slot: uint32(i)}
				if err := m.Lookup(k, &v); errors.Is(err, ebpf.ErrKeyNotExist) {
					wrong++
					errs = append(errs, t.put(m, k, want))
				}
			}
		}
	}
	for _, k := range unknown {
		wrong++
		errs = append(errs, t.delete(m, k))
	}
	return wrong, errors.Join(errs...)
}
