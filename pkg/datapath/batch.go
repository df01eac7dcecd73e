package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// batchSize is how many entries one call into the kernel reads. A walk takes two calls for each entry: over half a million
// entries that is seconds, during which no change would be written.
const batchSize = 4096

// eachEntry visits a map's entries: of hash maps in batches, where the kernel has them, else one by one. What is written to
// the map meanwhile may be visited or not.
func eachEntry[K, V any](m *ebpf.Map, visit func(K, V)) error {
	if m.Type() != ebpf.Hash {
		return eachEntrySingly(m, visit)
	}
	keys, values := make([]K, batchSize), make([]V, batchSize)
	var cursor ebpf.MapBatchCursor
	for first := true; ; first = false {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		end := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !end {
			if first {
				return eachEntrySingly(m, visit)
			}
			return fmt.Errorf("read %s: %w", m, err)
		}
		for i := range n {
			visit(keys[i], values[i])
		}
		if end {
			return nil
		}
	}
}

func eachEntrySingly[K, V any](m *ebpf.Map, visit func(K, V)) error {
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		visit(k, v)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read %s: %w", m, err)
	}
	return nil
}
