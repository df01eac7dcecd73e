package datapath

import (
	"errors"
	"reflect"
	"sync"
	"time"

	"github.com/cilium/ebpf"
)

// How many entries a map has, the kernel doesn't say: they have to be walked through. Of the maps that the reconciler writes it
// knows by itself; the others are filled by the programs, up to hundreds of thousands of entries, and whoever scrapes metrics
// asks every few seconds.

// countShare bounds what counting costs: a count is good for so many times as long as it took, so that no more than a hundredth
// of one core goes into it, however often it's asked for. Small maps are counted in microseconds, and so always afresh.
const countShare = 100

// counts remembers how many entries maps had.
type counts struct {
	mu sync.Mutex
	of map[*ebpf.Map]count // guarded by mu
}

type count struct {
	entries int
	at      time.Time // when counting ended
	took    time.Duration
}

// entries counts, or says what was counted last where that's still good.
func (c *counts) entries(m *ebpf.Map) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if was, ok := c.of[m]; ok && time.Since(was.at) < countShare*was.took {
		return was.entries
	}
	if c.of == nil {
		c.of = map[*ebpf.Map]count{}
	}
	began := time.Now()
	n := count{entries: countEntries(m), at: time.Now()}
	n.took = n.at.Sub(began)
	c.of[m] = n
	return n.entries
}

// countEntries goes through a map's keys: of hash maps in batches, where the kernel has them, else one by one.
func countEntries(m *ebpf.Map) int {
	if t := m.Type(); t == ebpf.Hash || t == ebpf.LRUHash {
		if n, err := countInBatches(m); err == nil {
			return n
		}
	}
	n := 0
	var next []byte
	key := make([]byte, m.KeySize())
	var prev any
	for {
		if err := m.NextKey(prev, &key); err != nil {
			return n
		}
		n++
		if next == nil {
			next = make([]byte, len(key))
		}
		copy(next, key)
		prev = next
	}
}

func countInBatches(m *ebpf.Map) (int, error) {
	buffer := func(size uint32) any { // of elements of so many bytes
		return reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(size), reflect.TypeFor[byte]())), batchSize, batchSize).Interface()
	}
	keys, values := buffer(m.KeySize()), buffer(m.ValueSize())
	var cursor ebpf.MapBatchCursor
	for total := 0; ; {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		total += n
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return total, nil
		case err != nil:
			return 0, err
		}
	}
}
