package datapath

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"unicode"

	"github.com/cilium/ebpf"
)

// Entry is one decoded map entry, for `sockmesh maps NAME`: field names as in bpf/common.h, addresses as text.
type Entry struct {
	Key   map[string]any `json:"key"`
	Value map[string]any `json:"value"`
}

// shapes says what the maps' keys and values are; scalars get a name here.
var shapes = map[string]struct {
	key, value         reflect.Type
	keyName, valueName string
}{
	sockmeshMapSmFrontends: {key: reflect.TypeFor[frontendKey](), value: reflect.TypeFor[targetValue]()},
	sockmeshMapSmOutside:   {key: reflect.TypeFor[frontendKey](), value: reflect.TypeFor[targetValue]()},
	sockmeshMapSmMembers:   {key: reflect.TypeFor[memberKey](), value: reflect.TypeFor[uint32](), valueName: "member"},
	sockmeshMapSmSources:   {key: reflect.TypeFor[sourceKey](), value: reflect.TypeFor[uint32](), valueName: "allowed"},
	sockmeshMapSmUdpMore:   {key: reflect.TypeFor[udpKey](), value: reflect.TypeFor[udpFlow]()},
	sockmeshMapSmDoomed:    {key: reflect.TypeFor[uint64](), value: reflect.TypeFor[uint32](), keyName: "cookie", valueName: "doomed"},
	sockmeshMapSmAffinity:  {key: reflect.TypeFor[affinityKey](), value: reflect.TypeFor[affinity]()},
	sockmeshMapSmClaims:    {key: reflect.TypeFor[claimKey](), value: reflect.TypeFor[targetValue]()},
	sockmeshMapSmSlots:     {key: reflect.TypeFor[slotKey](), value: reflect.TypeFor[slotValue]()},
	sockmeshMapSmBackends:  {key: reflect.TypeFor[uint32](), value: reflect.TypeFor[backendValue](), keyName: "backend"},
	sockmeshMapSmNetns:     {key: reflect.TypeFor[uint64](), value: reflect.TypeFor[netnsValue](), keyName: "netns"},
	sockmeshMapSmLocal:     {key: reflect.TypeFor[localKey](), value: reflect.TypeFor[localValue]()},
	sockmeshMapSmOrigin:    {key: reflect.TypeFor[tupleKey](), value: reflect.TypeFor[originValue]()},
	sockmeshMapSmPairs:     {key: reflect.TypeFor[tupleKey](), value: reflect.TypeFor[uint64](), valueName: "cookie"},
	sockmeshMapSmNosplice:  {key: reflect.TypeFor[appKey](), value: reflect.TypeFor[uint64](), valueName: "seen_ktime"},
	sockmeshMapSmListeners: {key: reflect.TypeFor[uint64](), value: reflect.TypeFor[uint32](), keyName: "cookie", valueName: "agent"},
	sockmeshMapSmSpliced:   {key: reflect.TypeFor[tupleKey](), value: reflect.TypeFor[splicedValue]()},
	sockmeshMapSmSplicing:  {key: reflect.TypeFor[uint32](), value: reflect.TypeFor[uint32](), keyName: "index", valueName: "any"},
	sockmeshMapSmNat:       {key: reflect.TypeFor[natKey](), value: reflect.TypeFor[natValue]()},
	sockmeshMapSmNatNew:    {key: reflect.TypeFor[natKey](), value: reflect.TypeFor[natValue]()},
	sockmeshMapSmNatIn:     {key: reflect.TypeFor[natInKey](), value: reflect.TypeFor[natIn]()},
	sockmeshMapSmNatNewIn:  {key: reflect.TypeFor[natInKey](), value: reflect.TypeFor[natIn]()},
	sockmeshMapSmFrags:     {key: reflect.TypeFor[fragKey](), value: reflect.TypeFor[fragValue]()},
	sockmeshMapSmNatPorts:  {key: reflect.TypeFor[uint32](), value: reflect.TypeFor[uint64](), keyName: "index", valueName: "ports"},
	sockmeshMapSmNode:      {key: reflect.TypeFor[uint32](), value: reflect.TypeFor[nodeValue](), keyName: "index"},
	sockmeshMapSmConfig:    {key: reflect.TypeFor[uint32](), value: reflect.TypeFor[configValue](), keyName: "index"},
}

// Dump decodes all entries of one map. sm_sock is listed by Sockets, sm_counters by Counters.
func (d *Datapath) Dump(name string) ([]Entry, error) {
	if name == sockmeshMapSmCounters {
		c, err := d.Counters()
		return []Entry{{Key: map[string]any{"index": 0}, Value: decode(reflect.ValueOf(c), "")}}, err
	}
	shape, ok := shapes[name]
	if !ok {
		var names []string
		for _, m := range d.Maps() {
			if _, ok := shapes[m.Name]; ok || m.Name == sockmeshMapSmCounters {
				names = append(names, m.Name)
			}
		}
		return nil, fmt.Errorf("no map %q to dump; there are %s", name, strings.Join(names, ", "))
	}
	return dumpMap(d.objs.maps[name], shape.key, shape.value, shape.keyName, shape.valueName)
}

func dumpMap(m *ebpf.Map, keyType, valueType reflect.Type, keyName, valueName string) ([]Entry, error) {
	key, value := reflect.New(keyType), reflect.New(valueType)
	out := []Entry{}
	it := m.Iterate()
	for it.Next(key.Interface(), value.Interface()) {
		out = append(out, Entry{Key: decode(key.Elem(), keyName), Value: decode(value.Elem(), valueName)})
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("walk %s: %w", m, err)
	}
	return out, nil
}

func decode(v reflect.Value, scalarName string) map[string]any {
	if v.Kind() != reflect.Struct {
		return map[string]any{scalarName: v.Interface()}
	}
	out := map[string]any{}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Name == "_" || strings.HasPrefix(f.Name, "Pad") {
			continue
		}
		if a, ok := v.Field(i).Interface().([16]uint8); ok {
			out[snake(f.Name)] = netip.AddrFrom16(a).Unmap().String()
			continue
		}
		out[snake(f.Name)] = v.Field(i).Interface()
	}
	return out
}

func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
