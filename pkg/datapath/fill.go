package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// How full the maps are, and what happens when one is: the entry that doesn't fit is refused with a reason that names the
// setting, and tried again whenever something has gone; nothing that is there makes room for it.

// fullError says which map has no room. The entry may fit once others are gone.
type fullError struct {
	Map string
	Max uint32
}

// Error implements error.
func (e *fullError) Error() string {
	return fmt.Sprintf("%s is full (%d entries)%s", e.Map, e.Max, sizeHint(e.Map))
}

// sizeHint is the cure.
func sizeHint(name string) string {
	var s Sizes
	for _, m := range s.ByMap() {
		if m.Map == name {
			return ": raise --map-" + m.Flag()
		}
	}
	return ""
}

// Almost full is a map from tightAt percent on; it is no longer below looseAt, so that one entry more or less does not
// repeat the warning.
const tightAt, looseAt = 90, 85

// FillWarning says of a map that is almost full what will come of it and what to do; "": it is not. Arrays are always full,
// and a map without a size of its own can't be.
func (m MapStatus) FillWarning() string {
	if fill := m.fill(); fill < tightAt {
		return ""
	}
	what := "entries that don't fit are refused, what is there keeps working"
	if lru[m.Type] {
		what = "the oldest entries are forgotten early"
	}
	return fmt.Sprintf("%s is %d%% full (%d of %d entries): %s%s", m.Name, m.fill(), m.Entries, m.MaxEntries, what, sizeHint(m.Name))
}

var (
	lru    = map[string]bool{ebpf.LRUHash.String(): true, ebpf.LRUCPUHash.String(): true}
	arrays = map[string]bool{ebpf.Array.String(): true, ebpf.PerCPUArray.String(): true}
)

// fill is in percent, rounded down.
func (m MapStatus) fill() int {
	if m.MaxEntries == 0 || arrays[m.Type] {
		return 0
	}
	return int(int64(m.Entries) * 100 / int64(m.MaxEntries))
}

// watchFill logs once of each map that is almost full. Caller holds applyMu.
func (r *Reconciler) watchFill() {
	for name, entries := range r.tables.entries() {
		m := r.tables.o.maps[name]
		st := MapStatus{Name: name, Type: m.Type().String(), Entries: entries, MaxEntries: m.MaxEntries()}
		if warning := st.FillWarning(); warning != "" && !r.tight[name] {
			r.tight[name] = true
			r.log.Warn("a map is almost full: "+warning, "map", name)
		} else if st.fill() < looseAt {
			delete(r.tight, name)
		}
	}
}

// Failures are the entries that are wanted and not in force, and a number that is another one whenever they have changed.
// Where since is that number already, the list is nil and need not be read.
func (r *Reconciler) Failures(since uint64) ([]EntryError, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failures == since {
		return nil, since
	}
	out := make([]EntryError, 0, len(r.failed))
	for _, e := range r.failed {
		out = append(out, e)
	}
	return out, r.failures
}
