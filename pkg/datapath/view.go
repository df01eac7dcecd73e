package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// View reads the maps that an agent has pinned, from another process and without touching anything: what tests and
// benchmarks believe instead of what the agent says of itself.
type View struct{ maps map[string]*ebpf.Map }

// viewed are the maps with configuration.
var viewed = []string{
	sockmeshMapSmFrontends, sockmeshMapSmOutside, sockmeshMapSmClaims, sockmeshMapSmSlots, sockmeshMapSmBackends,
	sockmeshMapSmMembers, sockmeshMapSmSources, sockmeshMapSmNetns, sockmeshMapSmLocal,
}

// OpenView opens the maps pinned below a --bpffs by a build with this map layout.
func OpenView(bpffs string) (*View, error) {
	v := &View{maps: map[string]*ebpf.Map{}}
	for _, name := range viewed {
		m, err := ebpf.LoadPinnedMap(layoutDir{bpffs, layoutVersion}.mapPin(name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			v.Close()
			return nil, fmt.Errorf("open the pinned map %s: %w", name, err)
		}
		v.maps[name] = m
	}
	return v, nil
}

// Close lets go of the maps.
func (v *View) Close() {
	for _, m := range v.maps {
		m.Close()
	}
}

// Backends is how many backends connections to a Service's address are spread over now; false: the address is not there.
func (v *View) Backends(addr netip.AddrPort, protocol service.Protocol) (int, bool) {
	var t targetValue
	if v.maps[sockmeshMapSmFrontends].Lookup(frontendKeyOf(addr, uint8(protocol)), &t) != nil {
		return 0, false
	}
	return int(t.Slots), true
}

// Contents renders everything, one line for each address, in an order that depends on nothing but the contents. Ids of
// pools and backends are resolved, as they differ from one agent to the next; what no address leads to is listed too.
// Maps that change meanwhile make no sense of it.
func (v *View) Contents() ([]string, error) {
	c := contents{slots: map[slotKey]slotValue{}, backends: map[uint32]backendValue{}, members: map[memberKey]uint32{}, sources: map[sourceKey]uint32{}, used: map[uint32]bool{}}
	frontends, outside, claims := map[frontendKey]targetValue{}, map[frontendKey]targetValue{}, map[claimKey]targetValue{}
	netns, local := map[uint64]netnsValue{}, map[localKey]localValue{}
	if err := errors.Join(
		readMap(v.maps[sockmeshMapSmFrontends], frontends), readMap(v.maps[sockmeshMapSmOutside], outside), readMap(v.maps[sockmeshMapSmClaims], claims),
		readMap(v.maps[sockmeshMapSmSlots], c.slots), readMap(v.maps[sockmeshMapSmBackends], c.backends),
		readMap(v.maps[sockmeshMapSmMembers], c.members), readMap(v.maps[sockmeshMapSmSources], c.sources),
		readMap(v.maps[sockmeshMapSmNetns], netns), readMap(v.maps[sockmeshMapSmLocal], local),
	); err != nil {
		return nil, err
	}
	for k, t := range frontends {
		c.target("frontend "+frontendAddr(k), t)
	}
	for k, t := range outside {
		c.target("outside "+frontendAddr(k), t)
	}
	for k, t := range claims {
		c.target("claim "+addrPort(k.Addr, k.Port).String(), t)
	}
	for k, n := range netns {
		c.say("netns %d flags %d", k, n.Flags)
	}
	for k, l := range local {
		c.say("local %s netns %d flags %d", netip.AddrFrom16(k.Addr).Unmap(), l.Netns, l.Flags)
	}
	c.leftovers()
	slices.Sort(c.lines)
	return c.lines, nil
}

// contents is what Contents works on. What has been said of slots, members and sources is removed.
type contents struct {
	slots    map[slotKey]slotValue
	backends map[uint32]backendValue
	members  map[memberKey]uint32
	sources  map[sourceKey]uint32
	used     map[uint32]bool // backends
	lines    []string
}

func (c *contents) say(format string, args ...any) {
	c.lines = append(c.lines, fmt.Sprintf(format, args...))
}

func (c *contents) target(what string, t targetValue) {
	var parts []string
	for i := range t.Slots {
		key := slotKey{Pool: t.Pool, Generation: t.Generation, Slot: i}
		s, ok := c.slots[key]
		if !ok {
			parts = append(parts, "a slot is missing")
			continue
		}
		delete(c.slots, key)
		part := c.backend(s.Backend)
		if s.Other != s.Backend {
			part += fmt.Sprintf(" %d else %s", s.Keep, c.backend(s.Other))
		}
		parts = append(parts, part)
	}
	for k := range c.members {
		if k.Pool == t.Pool {
			parts = append(parts, "member "+c.backend(k.Backend))
			delete(c.members, k)
		}
	}
	for k := range c.sources {
		if k.Pool == t.Pool {
			parts = append(parts, fmt.Sprintf("from %s/%d", netip.AddrFrom16(k.Addr), k.Prefixlen))
			delete(c.sources, k)
		}
	}
	slices.Sort(parts)
	c.say("%s mode %d flags %d weight %d affinity %d s: %s", what, t.Mode, t.Flags, t.Weight, t.AffinitySeconds, strings.Join(parts, ", "))
}

func (c *contents) backend(id uint32) string {
	if id == 0 {
		return "refuse"
	}
	c.used[id] = true
	b, ok := c.backends[id]
	if !ok {
		return "a backend is missing"
	}
	return addrPort(b.Addr, b.Port).String()
}

// leftovers are entries that nothing leads to.
func (c *contents) leftovers() {
	for k := range c.slots {
		c.say("slot %d of no address: pool %d, generation %d", k.Slot, k.Pool, k.Generation)
	}
	for id, b := range c.backends {
		if !c.used[id] {
			c.say("backend %s of no address", addrPort(b.Addr, b.Port))
		}
	}
	for k := range c.members {
		c.say("member of no pool: %d", k.Pool)
	}
	for k := range c.sources {
		c.say("source of no pool: %d", k.Pool)
	}
}
