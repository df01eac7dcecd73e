package header

import (
	"encoding/binary"
	"strings"
	"unsafe"
)

// Add appends a well-known field; a field of the same name stays.
func (b *Block) Add(id ID, value string) {
	b.addSpan(id, b.put(names[id]), value)
}

// AddBytes is Add for a value in bytes.
func (b *Block) AddBytes(id ID, value []byte) { b.Add(id, str(value)) }

// AddName appends a field by its name, which is brought to lower case. Pseudo names and "host" set those.
func (b *Block) AddName(name, value string) {
	if b.setPseudo(name, value) {
		return
	}
	n := b.put(name)
	lowerInPlace(b.arena[n.off : n.off+n.n])
	b.addSpan(Lookup(str(b.at(n))), n, value)
}

func (b *Block) addSpan(id ID, name span, value string) {
	b.fields = append(b.fields, field{name: name, value: b.putValue(value), id: id})
	b.mark(id)
}

// Set makes value the field's only one, in the place of its first.
func (b *Block) Set(id ID, value string) {
	if !b.Has(id) {
		b.Add(id, value)
		return
	}
	v := b.putValue(value)
	first := 0
	for b.fields[first].id != id {
		first++
	}
	b.fields[first].value = v
	for i := first + 1; i < len(b.fields); i++ {
		if b.fields[i].id == id { // seldom: nearly every field is there once
			b.replace(v, func(f *field) bool { return f.id == id })
			return
		}
	}
}

// SetBytes is Set for a value in bytes.
func (b *Block) SetBytes(id ID, value []byte) { b.Set(id, str(value)) }

// SetName makes value the only one of the field of that lower-case name.
func (b *Block) SetName(lower, value string) {
	if b.setPseudo(lower, value) {
		return
	}
	if id := Lookup(lower); id != None {
		b.Set(id, value)
		return
	}
	if _, ok := b.GetName(lower); !ok {
		b.AddName(lower, value)
		return
	}
	v := b.putValue(value)
	b.replace(v, func(f *field) bool { return f.id == None && string(b.at(f.name)) == lower })
}

// replace gives the first field that matches the value v and removes the others.
func (b *Block) replace(v span, match func(*field) bool) {
	kept, seen := b.fields[:0], false
	for _, f := range b.fields {
		if match(&f) {
			if seen {
				continue
			}
			seen = true
			f.value = v
		}
		kept = append(kept, f)
	}
	b.fields = kept
}

// Append joins value to the field's first value with a comma, or adds the field.
func (b *Block) Append(id ID, value string) {
	if !b.Has(id) {
		b.Add(id, value)
		return
	}
	for i := range b.fields {
		if f := &b.fields[i]; f.id == id {
			off := len(b.arena)
			b.arena = append(append(b.arena, b.at(f.value)...), ", "...)
			b.putValue(value)
			f.value = span{uint32(off), uint32(len(b.arena) - off)}
			return
		}
	}
}

// Remove removes every field of that name.
func (b *Block) Remove(id ID) {
	if !b.Has(id) || id == None {
		return
	}
	kept := b.fields[:0]
	for _, f := range b.fields {
		if f.id != id {
			kept = append(kept, f)
		}
	}
	b.fields = kept
	b.unmark(id)
}

// RemoveName removes every field of that lower-case name. Pseudo fields stay: a request cannot do without.
func (b *Block) RemoveName(lower string) {
	if id := Lookup(lower); id != None {
		b.Remove(id)
		return
	}
	kept := b.fields[:0]
	for _, f := range b.fields {
		if f.id != None || string(b.at(f.name)) != lower {
			kept = append(kept, f)
		}
	}
	b.fields = kept
}

// RemoveAt removes the i-th field.
func (b *Block) RemoveAt(i int) {
	id := b.fields[i].id
	b.fields = append(b.fields[:i], b.fields[i+1:]...)
	if id == None {
		return
	}
	for j := range b.fields {
		if b.fields[j].id == id {
			return
		}
	}
	b.unmark(id)
}

// CopyFrom makes b an independent copy of o.
func (b *Block) CopyFrom(o *Block) {
	b.arena = append(b.arena[:0], o.arena...)
	b.fields = append(b.fields[:0], o.fields...)
	b.present = o.present
	b.method, b.path, b.authority, b.scheme = o.method, o.path, o.authority, o.scheme
	b.pseudo, b.status = o.pseudo, o.status
}

// putValue copies a field value and makes it harmless: a line break or NUL that came by a header mutation must not
// become a second header on the wire.
func (b *Block) putValue(v string) span {
	s := b.put(v)
	if harmless(v) {
		return s
	}
	for i, c := range b.arena[s.off : s.off+s.n] {
		if c == '\r' || c == '\n' || c == 0 {
			b.arena[int(s.off)+i] = ' '
		}
	}
	return s
}

// harmless is a quick look, eight bytes at a time, that says no too often: a tab is as small as what must not be there.
func harmless(v string) bool {
	const least = '\r' + 1
	i := 0
	for ; i+8 <= len(v); i += 8 {
		x := binary.LittleEndian.Uint64(bytesOf(v[i:]))
		if (x-least*swarOnes)&^x&swarHigh != 0 {
			return false
		}
	}
	for ; i < len(v); i++ {
		if v[i] < least {
			return false
		}
	}
	return true
}

// bytesOf are v's bytes, not to be written to.
func bytesOf(v string) []byte { return unsafe.Slice(unsafe.StringData(v), len(v)) }

func (b *Block) setPseudo(name, value string) bool {
	if len(name) != 4 && (name == "" || name[0] != ':') {
		return false
	}
	switch name {
	case ":authority":
		b.SetAuthority(value)
	case ":path":
		b.SetPath(value)
	case ":method":
		b.SetMethod(value)
	case ":scheme":
		b.SetScheme(value)
	default:
		if !strings.EqualFold(name, "host") {
			return false
		}
		b.SetAuthority(value)
	}
	return true
}
