package datapath

import (
	"errors"

	"github.com/cilium/ebpf"
)

// Small changes of a set of equal backends are made in place, so that one endpoint of a thousand costs a few writes and
// not two thousand. Each write is one atomic step from one valid set to the next: a slot gets another backend; a slot is
// added behind the last and then counted; a hole is filled with the last slot, which is then no longer counted and
// then deleted. A connect that reads the count before and the slot after finds nothing and looks again.
//
// In place needs no room for two sets at a time, so it is also the way where the map is full: a set that shrinks must not be
// kept from it, or dead backends would hold the very slots that are short.

// patch is how a pool gets from its slots to the wanted backends.
type patch struct {
	set  []slotEdit // in this order
	size int        // slots afterwards
}

type slotEdit struct {
	slot    int
	backend uint32
}

func (p patch) empty() bool { return len(p.set) == 0 }

// planPatch returns ok where the change is small enough, or where that does not matter. Wanted ids are distinct.
func planPatch(now []slotValue, want []uint32, any bool) (p patch, ok bool) {
	missing := make(map[uint32]bool, len(want))
	for _, id := range want {
		missing[id] = true
	}
	var holes []int
	for i, s := range now {
		if s == evenSlot(s.Backend) && missing[s.Backend] {
			delete(missing, s.Backend)
		} else {
			holes = append(holes, i)
		}
	}
	if !any && len(holes)+len(missing) > 2+len(now)/8 {
		return patch{}, false
	}
	p.size = len(want)
	for _, id := range want {
		if !missing[id] {
			continue
		}
		at := len(now)
		if len(holes) > 0 {
			at, holes = holes[0], holes[1:]
		} else {
			now = append(now[:len(now):len(now)], slotValue{})
		}
		p.set = append(p.set, slotEdit{at, id})
	}
	// What is left are more slots than wanted backends: move the last ones into the holes.
	last := len(now) - 1
	for i := len(holes) - 1; i >= 0; i, last = i-1, last-1 {
		if holes[i] != last {
			p.set = append(p.set, slotEdit{holes[i], backendAt(now, p.set, last)})
		}
	}
	return p, true
}

// backendAt is what slot i will hold after the edits so far.
func backendAt(now []slotValue, edits []slotEdit, i int) uint32 {
	for j := len(edits) - 1; j >= 0; j-- {
		if edits[j].slot == i {
			return edits[j].backend
		}
	}
	return now[i].Backend
}

// withoutDead is for a map of backends that is full: what of a Service's wanted backends is there already; room: without the
// others of its pool, which nobody wants any more, something would fit. A pod that takes the place of another is not to be kept
// out by that one.
func (t *tables) withoutDead(now, next targetValue, want []weighted) (rest []weighted, room bool) {
	if now.Pool == 0 || next.Mode != modeService {
		return nil, false
	}
	wanted := map[uint32]bool{}
	for _, w := range want {
		if id, ok := t.backendID[backendValue{Addr: addr16(w.addr.Addr()), Port: w.addr.Port()}]; ok {
			rest, wanted[id] = append(rest, w), true
		}
	}
	here := map[uint32]int{}
	for _, id := range t.pools[now.Pool].backends() {
		here[id]++
	}
	for id, n := range here {
		room = room || !wanted[id] && t.refs[id] == n
	}
	return rest, room
}

func evenSlot(backend uint32) slotValue {
	return slotValue{Keep: 1, Backend: backend, Other: backend}
}

// patchTarget makes the edits, then counts, then deletes what is counted no more. An error in between leaves a set that
// is valid too, and the mirror says which.
func patchTarget[K comparable](t *tables, m *ebpf.Map, mirror map[K]targetValue, key K, now, next targetValue, p patch) error {
	if p.empty() && now == next {
		return nil
	}
	old := t.pools[now.Pool].slots
	inMap := append([]slotValue(nil), old...)
	counted := len(old)
	slotAt := func(i int) slotKey {
		return slotKey{Pool: now.Pool, Generation: now.Generation, Slot: uint32(i)}
	}
	var err error
	for _, e := range p.set {
		value := evenSlot(e.backend)
		if err = t.put(t.o.slots(), slotAt(e.slot), value); err != nil {
			break
		}
		if e.slot == len(inMap) {
			inMap = append(inMap, value)
		} else {
			inMap[e.slot] = value
		}
	}
	if err == nil && now != next {
		if err = t.put(m, key, next); err == nil {
			mirror[key], counted = next, p.size
		}
	}
	for i := len(inMap) - 1; i >= counted; i-- {
		err = errors.Join(err, t.delete(t.o.slots(), slotAt(i)))
	}
	current := inMap[:counted:counted]
	t.ref(current, 1)
	t.ref(old, -1)
	t.pools[now.Pool] = pool{now.Generation, current}
	for _, s := range old {
		if t.refs[s.Backend] == 0 {
			err = errors.Join(err, t.dropBackends([]uint32{s.Backend}))
		}
	}
	return err
}
