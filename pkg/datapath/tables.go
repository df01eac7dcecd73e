package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// Modes of a target, as in bpf/common.h.
const (
	modeService = 1
	modeProxy   = 2
	modeOffload = 3
)

// tables is what the maps hold, kept in memory so that a change costs what it changes. Read from the pinned maps at
// start, with their ids; after that every write goes to the map first and here when it has succeeded.
//
// Writes are make before break: backends, then slots of a new generation, then the frontend's or claim's value, which
// moves new connections over in one update; only then are the old slots deleted, and backends that nobody uses.
type tables struct {
	o *objects

	frontends map[frontendKey]targetValue
	outside   map[frontendKey]targetValue
	claims    map[claimKey]targetValue
	pools     map[uint32]pool
	backends  map[uint32]backendValue
	backendID map[backendValue]uint32
	refs      map[uint32]int // slots that name the backend
	members   poolSets[uint32]
	sources   poolSets[sourceKey]
	loopbacks int // frontends that are loopback addresses
	netns     map[uint64]netnsValue
	local     map[localKey]localValue

	nextPool, nextBackend uint32 // ids are not reused until 2^32 are through: nobody can mix up old and new

	writes, deletes, drift uint64
	dismissed              int // members that were removed since somebody last looked
}

// pool is the set of slots in force.
type pool struct {
	generation uint32
	slots      []slotValue
}

// backends that the pool's slots name.
func (p pool) backends() []uint32 {
	ids := make([]uint32, 0, len(p.slots))
	for _, s := range p.slots {
		ids = append(ids, s.Backend, s.Other)
	}
	return ids
}

func newTables(o *objects) (*tables, error) {
	t := &tables{
		o: o, frontends: map[frontendKey]targetValue{}, outside: map[frontendKey]targetValue{},
		members: poolSets[uint32]{}, sources: poolSets[sourceKey]{}, claims: map[claimKey]targetValue{}, pools: map[uint32]pool{},
		backends: map[uint32]backendValue{}, backendID: map[backendValue]uint32{}, refs: map[uint32]int{},
		netns: map[uint64]netnsValue{}, local: map[localKey]localValue{}, nextPool: 1, nextBackend: 1,
	}
	return t, t.restore()
}

// readMap reads a whole map.
func readMap[K comparable, V any](m *ebpf.Map, into map[K]V) error {
	return eachEntry(m, func(k K, v V) { into[k] = v })
}

// restore reads what an earlier agent left, and removes what it left half done: slots of a generation that was never
// put in force, backends that no slot names.
func (t *tables) restore() error {
	slots := map[slotKey]slotValue{}
	if err := errors.Join(
		readMap(t.o.frontends(), t.frontends), readMap(t.o.outside(), t.outside), readMap(t.o.claims(), t.claims), readMap(t.o.slots(), slots),
		readMap(t.o.backends(), t.backends), readMap(t.o.netns(), t.netns), readMap(t.o.local(), t.local),
	); err != nil {
		return err
	}
	for key, target := range t.frontends {
		t.restorePool(target, slots)
		t.loopbacks += loopback(key)
	}
	for key, target := range t.outside {
		t.restorePool(target, slots)
		if err := t.markPort(key.Port); err != nil {
			return err
		}
	}
	for _, target := range t.claims {
		t.restorePool(target, slots)
	}
	for k := range slots {
		t.nextPool = max(t.nextPool, k.Pool+1)
		if p, ok := t.pools[k.Pool]; !ok || p.generation != k.Generation || k.Slot >= uint32(len(p.slots)) {
			if err := t.delete(t.o.slots(), k); err != nil {
				return err
			}
		}
	}
	for id, b := range t.backends {
		t.nextBackend = max(t.nextBackend, id+1)
		t.backendID[b] = id
	}
	for id := range t.backends {
		if t.refs[id] == 0 {
			if err := t.dropBackend(id); err != nil {
				return err
			}
		}
	}
	return errors.Join(t.restoreMembers(), t.restoreSources())
}

func (t *tables) restorePool(target targetValue, slots map[slotKey]slotValue) {
	t.nextPool = max(t.nextPool, target.Pool+1)
	if target.Pool == 0 {
		return
	}
	p := pool{generation: target.Generation, slots: make([]slotValue, target.Slots)}
	for i := range p.slots {
		p.slots[i] = slots[slotKey{Pool: target.Pool, Generation: target.Generation, Slot: uint32(i)}]
	}
	t.pools[target.Pool] = p
	t.ref(p.slots, 1)
}

func (t *tables) ref(slots []slotValue, by int) {
	for _, s := range slots {
		for _, id := range [...]uint32{s.Backend, s.Other} {
			if id != 0 {
				t.refs[id] += by
			}
		}
	}
}

func (t *tables) put(m *ebpf.Map, key, value any) error {
	err := m.Put(key, value)
	if err == nil {
		t.writes++
		return nil
	}
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return &fullError{mapName(m), m.MaxEntries()}
	}
	return fmt.Errorf("write %s: %w", mapName(m), err)
}

func (t *tables) delete(m *ebpf.Map, key any) error {
	t.deletes++
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from %s: %w", mapName(m), err)
	}
	return nil
}

// setFrontend and setClaim put a target in force; nothing is written where it is so already.
func (t *tables) setFrontend(key frontendKey, want []weighted, affinity uint32) error {
	_, known := t.frontends[key]
	next := targetValue{Mode: modeService, AffinitySeconds: affinity, Flags: stickiness(key, affinity)}
	err := setTarget(t, t.o.frontends(), t.frontends, key, next, want)
	if _, is := t.frontends[key]; is && !known {
		t.loopbacks += loopback(key)
	}
	return err
}

// stickiness: a UDP socket stays with its backend while that is good, a client with affinity as well.
func stickiness(key frontendKey, affinity uint32) uint16 {
	if affinity > 0 || service.Protocol(key.Proto) == service.UDP {
		return targetMembers
	}
	return 0
}

// loopback counts 1 for a loopback address.
func loopback(key frontendKey) int {
	if netip.AddrFrom16(key.Addr).Unmap().IsLoopback() {
		return 1
	}
	return 0
}

func (t *tables) setClaim(key claimKey, mode uint16, want []weighted) error {
	return setTarget(t, t.o.claims(), t.claims, key, targetValue{Mode: mode}, want)
}

func setTarget[K comparable](t *tables, m *ebpf.Map, mirror map[K]targetValue, key K, next targetValue, want []weighted) error {
	now := mirror[key]
	if next.Mode == modeProxy {
		want = nil
	}
	ids, made, err := t.backendIDs(want)
	if full := (*fullError)(nil); errors.As(err, &full) {
		if e := t.dropBackends(made); e != nil {
			return errors.Join(err, e)
		}
		rest, room := t.withoutDead(now, next, want)
		if !room {
			return err
		}
		if e := setTarget(t, m, mirror, key, next, rest); e != nil {
			return errors.Join(err, e)
		}
		now = mirror[key]
		ids, made, err = t.backendIDs(want)
	}
	if err != nil {
		return errors.Join(err, t.dropBackends(made))
	}
	weights := make([]uint64, len(want))
	for i, w := range want {
		weights[i] = w.weight
	}
	slots, sum := buildSlots(ids, weights)
	next.Slots, next.Weight = uint32(len(slots)), sum
	old := t.pools[now.Pool]
	if next.Mode != modeProxy {
		next.Pool, next.Generation = now.Pool, old.generation
		if next.Pool == 0 {
			next.Pool = t.nextPool
		}
	}
	var members []uint32
	if next.Flags&targetMembers != 0 {
		members = ids
	}
	if err := t.addMembers(next.Pool, members); err != nil {
		return errors.Join(err, t.trimMembers(next.Pool, t.membersOf(mirror[key], next.Pool)), t.dropBackends(made))
	}
	if err := switchTarget(t, m, mirror, key, now, next, old, slots, ids, made); err != nil {
		return errors.Join(err, t.trimMembers(next.Pool, t.membersOf(mirror[key], next.Pool)))
	}
	return t.trimMembers(next.Pool, members)
}

// membersOf are the backends that are to be members of a pool as it is in force, which after an error may be neither the old set
// nor the wanted one.
func (t *tables) membersOf(inForce targetValue, poolID uint32) []uint32 {
	if inForce.Pool != poolID || inForce.Flags&targetMembers == 0 {
		return nil
	}
	return t.pools[poolID].backends()
}

// switchTarget moves new connections from a target's slots to the next ones. made are backends that only these have.
func switchTarget[K comparable](t *tables, m *ebpf.Map, mirror map[K]targetValue, key K, now, next targetValue, old pool, slots []slotValue, ids, made []uint32) error {
	_, exists := mirror[key]
	samePool := exists && next.Pool == now.Pool
	inPlace := func(any bool) (done bool, err error) {
		if !samePool || next.Pool == 0 || next.Weight != 1 || now.Weight != 1 {
			return false, nil
		}
		p, ok := planPatch(old.slots, ids, any)
		if !ok {
			return false, nil
		}
		next := next
		next.Slots = uint32(p.size)
		return true, errors.Join(patchTarget(t, m, mirror, key, now, next, p), t.dropBackends(made))
	}
	if done, err := inPlace(false); done {
		return err
	}
	sameSlots := samePool && slices.Equal(slots, old.slots)
	if sameSlots && now == next {
		return nil
	}
	if !sameSlots && next.Pool != 0 {
		next.Generation++
		if err := t.writeSlots(next.Pool, next.Generation, slots); err != nil {
			if full := (*fullError)(nil); errors.As(err, &full) {
				next.Generation--
				if done, err := inPlace(true); done {
					return err
				}
			}
			return errors.Join(err, t.dropBackends(made))
		}
		if next.Pool == t.nextPool {
			t.nextPool++
		}
	}
	if err := t.put(m, key, next); err != nil {
		if !sameSlots {
			err = errors.Join(err, t.deleteSlots(next.Pool, next.Generation, len(slots)))
		}
		return errors.Join(err, t.dropBackends(made))
	}
	mirror[key] = next
	if sameSlots {
		return nil
	}
	t.ref(slots, 1)
	if next.Pool != 0 {
		t.pools[next.Pool] = pool{next.Generation, slots}
	}
	return t.dropSlots(now.Pool, old, next.Pool != now.Pool)
}

// backendIDs finds or makes the backends' ids; made lists the new ones.
func (t *tables) backendIDs(want []weighted) (ids, made []uint32, err error) {
	ids = make([]uint32, len(want))
	for i, w := range want {
		if !w.addr.IsValid() {
			continue // 0 refuses
		}
		b := backendValue{Addr: addr16(w.addr.Addr()), Port: w.addr.Port()}
		id, ok := t.backendID[b]
		if !ok {
			id = t.freeBackendID()
			if err := t.put(t.o.backends(), id, b); err != nil {
				return nil, made, err
			}
			t.backends[id], t.backendID[b] = b, id
			made = append(made, id)
		}
		ids[i] = id
	}
	return ids, made, nil
}

func (t *tables) freeBackendID() uint32 {
	for {
		id := t.nextBackend
		t.nextBackend++
		if _, used := t.backends[id]; id != 0 && !used {
			return id
		}
	}
}

func (t *tables) writeSlots(poolID, generation uint32, slots []slotValue) error {
	for i, s := range slots {
		if err := t.put(t.o.slots(), slotKey{Pool: poolID, Generation: generation, Slot: uint32(i)}, s); err != nil {
			return errors.Join(err, t.deleteSlots(poolID, generation, i))
		}
	}
	return nil
}

func (t *tables) deleteSlots(poolID, generation uint32, n int) error {
	var errs []error
	for i := range n {
		errs = append(errs, t.delete(t.o.slots(), slotKey{Pool: poolID, Generation: generation, Slot: uint32(i)}))
	}
	return errors.Join(errs...)
}

// dropSlots removes a generation that is no longer in force, and the backends that only it used.
func (t *tables) dropSlots(poolID uint32, p pool, gone bool) error {
	if poolID == 0 {
		return nil
	}
	if gone {
		delete(t.pools, poolID)
	}
	err := t.deleteSlots(poolID, p.generation, len(p.slots))
	t.ref(p.slots, -1)
	return errors.Join(err, t.dropBackends(p.backends()))
}

// dropBackends removes those of ids that no slot names.
func (t *tables) dropBackends(ids []uint32) error {
	var errs []error
	for _, id := range ids {
		if _, ok := t.backends[id]; ok && t.refs[id] == 0 {
			errs = append(errs, t.dropBackend(id))
		}
	}
	return errors.Join(errs...)
}

func (t *tables) dropBackend(id uint32) error {
	b := t.backends[id]
	delete(t.backends, id)
	delete(t.refs, id)
	if t.backendID[b] == id {
		delete(t.backendID, b)
	}
	return t.delete(t.o.backends(), id)
}

func (t *tables) deleteFrontend(key frontendKey) error {
	_, known := t.frontends[key]
	err := deleteTarget(t, t.o.frontends(), t.frontends, key)
	if _, is := t.frontends[key]; known && !is {
		t.loopbacks -= loopback(key)
	}
	return err
}

func (t *tables) deleteOutside(key frontendKey) error {
	return deleteTarget(t, t.o.outside(), t.outside, key)
}

func (t *tables) deleteClaim(key claimKey) error {
	return deleteTarget(t, t.o.claims(), t.claims, key)
}

func deleteTarget[K comparable](t *tables, m *ebpf.Map, mirror map[K]targetValue, key K) error {
	now, ok := mirror[key]
	if !ok {
		return nil
	}
	if err := t.delete(m, key); err != nil {
		return err
	}
	delete(mirror, key)
	return errors.Join(t.trimMembers(now.Pool, nil), t.trimSources(now.Pool, nil), t.dropSlots(now.Pool, t.pools[now.Pool], true))
}

// setPlain keeps one entry of a map without indirection equal to want; nil deletes it.
func setPlain[K, V comparable](t *tables, m *ebpf.Map, mirror map[K]V, key K, want *V) error {
	now, ok := mirror[key]
	switch {
	case want == nil && ok:
		if err := t.delete(m, key); err != nil {
			return err
		}
		delete(mirror, key)
	case want != nil && (!ok || now != *want):
		if err := t.put(m, key, *want); err != nil {
			return err
		}
		mirror[key] = *want
	}
	return nil
}

func mapName(m *ebpf.Map) string {
	info, err := m.Info()
	if err != nil {
		return m.String()
	}
	return info.Name
}

func frontendKeyOf(a netip.AddrPort, proto uint8) frontendKey {
	return frontendKey{Addr: addr16(a.Addr()), Port: a.Port(), Proto: proto}
}

func claimKeyOf(a netip.AddrPort) claimKey {
	return claimKey{Addr: addr16(a.Addr()), Port: a.Port()}
}

// entries counts without walking the maps, which takes long where there are a quarter million.
func (t *tables) entries() map[string]int {
	slots := 0
	for _, p := range t.pools {
		slots += len(p.slots)
	}
	return map[string]int{
		sockmeshMapSmFrontends: len(t.frontends), sockmeshMapSmOutside: len(t.outside), sockmeshMapSmMembers: t.members.len(),
		sockmeshMapSmSources: t.sources.len(), sockmeshMapSmClaims: len(t.claims), sockmeshMapSmSlots: slots,
		sockmeshMapSmBackends: len(t.backends), sockmeshMapSmNetns: len(t.netns), sockmeshMapSmLocal: len(t.local),
	}
}
