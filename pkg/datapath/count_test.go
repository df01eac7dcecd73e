package datapath

import (
	"encoding/binary"
	"testing"
	"time"
)

// TestAFullTableIsCountedSeldom: whoever asks for metrics or status, however often, doesn't walk through a full table of
// connections each time; a map that is small is counted afresh.
func TestAFullTableIsCountedSeldom(t *testing.T) {
	o := newOuter(t)
	size := DefaultSizes().NAT
	d := o.open(func(c *Config) { c.Sizes.NAT = size })
	entries := func(name string) int {
		for _, m := range d.Maps() {
			if m.Name == name {
				return m.Entries
			}
		}
		t.Fatal("no map ", name)
		return 0
	}
	one := natKey{Proto: 6}
	for i := range 3 {
		one.ClientPort = uint16(i)
		must(t, d.objs.nat().Put(one, natValue{Used: ktime()}))
		time.Sleep(time.Millisecond) // longer than a hundred times what counting takes, unless the machine is busy
		eventually(t, "a small map's count is right", func() bool { return entries("sm_nat") == i+1 })
	}
	keys, values := make([]natKey, size), make([]natValue, size)
	for i := range keys {
		keys[i] = natKey{Proto: 6, ClientPort: uint16(i), BackendPort: 8080}
		binary.BigEndian.PutUint32(keys[i].Client[12:], uint32(i))
		values[i].Used = ktime()
	}
	for i := range 3 {
		one.ClientPort = uint16(i)
		must(t, d.objs.nat().Delete(one))
	}
	_, err := d.objs.nat().BatchUpdate(keys, values, nil)
	must(t, err)
	eventually(t, "the full table's count is right", func() bool { return entries("sm_nat") == int(size) })
	last := func() count {
		d.counts.mu.Lock()
		defer d.counts.mu.Unlock()
		return d.counts.of[d.objs.nat()]
	}
	was, asked := last(), 0
	for time.Since(was.at) < countShare*was.took/2 && asked < 1000 {
		if n := d.counts.entries(d.objs.nat()); n != int(size) {
			t.Fatalf("%d entries", n)
		}
		asked++
	}
	if is := last(); asked == 0 || is.at != was.at && is.at.Sub(was.at) < countShare*was.took {
		t.Errorf("asked %d times, and counted again after %s, where counting takes %s", asked, is.at.Sub(was.at), was.took)
	}
	began := time.Now()
	d.Maps()
	t.Logf("counting %d entries took %s; Maps() after it %s", size, was.took, time.Since(began))
}
