// Package header holds the fields of one HTTP message head, whatever version of HTTP it came by.
//
// A Block is one byte arena and a table of offsets into it. Codecs fill it, the router reads and changes it,
// the other side's encoder writes it out. The arena is the Block's own copy, so that a head outlives the read
// buffer it was parsed from; a Block that is Reset and used again allocates nothing once it has grown.
//
// Names are kept in lower case: HTTP/2 demands it, Envoy does it for HTTP/1 too, and comparison is then a
// plain memory compare. What HTTP/2 calls pseudo-header fields (method, path, authority, scheme, status) stand
// beside the fields; HTTP/1's Host field is the authority and is not among the fields.
//
// A Block belongs to one goroutine. Slices and strings that it hands out stay valid until Reset.
package header

import (
	"strconv"
	"unsafe"
)

// span is a piece of the arena.
type span struct{ off, n uint32 }

type field struct {
	name, value span
	id          ID
}

// Block is one message's header fields (or trailers) and pseudo fields.
type Block struct {
	arena  []byte
	fields []field
	// present has a bit for each well-known field that is there: most look-ups are for fields that are not.
	present [(numIDs + 63) / 64]uint64

	method, path, authority, scheme span
	pseudo                          pseudoSet
	status                          int

	joined []byte // scratch of Joined
}

// pseudoSet remembers which pseudo fields were set: an empty authority is not the same as none.
type pseudoSet uint8

const (
	hasMethod pseudoSet = 1 << iota
	hasPath
	hasAuthority
	hasScheme
)

// Reset empties the block and keeps its memory.
func (b *Block) Reset() {
	b.arena = b.arena[:0]
	b.fields = b.fields[:0]
	b.present = [len(b.present)]uint64{}
	b.pseudo = 0
	b.status = 0
}

// maxKept is what Trim leaves of an arena: more than nearly every real head needs.
const maxKept = 8 << 10

// Trim gives back the memory of an unusually large head; call it before a block is kept for later use.
func (b *Block) Trim() {
	if cap(b.arena) > maxKept {
		b.arena = nil
	}
	if cap(b.fields) > 128 {
		b.fields = nil
	}
	if cap(b.joined) > maxKept {
		b.joined = nil
	}
	b.Reset()
}

// Size is the number of bytes of memory that the block holds.
func (b *Block) Size() int {
	return cap(b.arena) + cap(b.joined) + cap(b.fields)*int(unsafe.Sizeof(field{}))
}

// Len is the number of fields, pseudo fields not counted.
func (b *Block) Len() int { return len(b.fields) }

// Name is the i-th field's name, in lower case.
func (b *Block) Name(i int) []byte { return b.at(b.fields[i].name) }

// Value is the i-th field's value, without white space around it.
func (b *Block) Value(i int) []byte { return b.at(b.fields[i].value) }

// ID is the i-th field's well-known name, or None.
func (b *Block) ID(i int) ID { return b.fields[i].id }

func (b *Block) at(s span) []byte {
	return b.arena[s.off : s.off+s.n : s.off+s.n]
}

// Has says whether the field is there.
func (b *Block) Has(id ID) bool { return b.present[id>>6]>>(id&63)&1 != 0 }

// mark notes that id is there. Bit None is set too and means nothing: Has(None) is asked by nobody.
func (b *Block) mark(id ID) { b.present[id>>6] |= 1 << (id & 63) }

func (b *Block) unmark(id ID) { b.present[id>>6] &^= 1 << (id & 63) }

// Get returns the first value of a well-known field.
func (b *Block) Get(id ID) ([]byte, bool) {
	if !b.Has(id) || id == None {
		return nil, false
	}
	for i := range b.fields {
		if b.fields[i].id == id {
			return b.at(b.fields[i].value), true
		}
	}
	return nil, false
}

// GetName returns the first value of the field of that lower-case name. Pseudo names (":path") and "host" work too.
func (b *Block) GetName(lower string) ([]byte, bool) {
	if id := Lookup(lower); id != None {
		return b.Get(id)
	}
	if v, ok, isPseudo := b.pseudoValue(lower); isPseudo {
		return v, ok
	}
	for i := range b.fields {
		f := &b.fields[i]
		if f.id == None && int(f.name.n) == len(lower) && string(b.at(f.name)) == lower {
			return b.at(f.value), true
		}
	}
	return nil, false
}

func (b *Block) pseudoValue(lower string) (value []byte, ok, isPseudo bool) {
	switch lower {
	case ":authority", "host":
		return b.Authority(), b.pseudo&hasAuthority != 0, true
	case ":path":
		return b.Path(), b.pseudo&hasPath != 0, true
	case ":method":
		return b.Method(), b.pseudo&hasMethod != 0, true
	case ":scheme":
		return b.Scheme(), b.pseudo&hasScheme != 0, true
	case ":status":
		if b.status == 0 {
			return nil, false, true
		}
		b.joined = strconv.AppendInt(b.joined[:0], int64(b.status), 10)
		return b.joined, true, true
	}
	return nil, false, false
}

// GetString is Get as a string that shares the block's memory: valid until Reset, to be copied if kept longer.
func (b *Block) GetString(id ID) (string, bool) {
	v, ok := b.Get(id)
	return str(v), ok
}

// Joined returns all values of the field of that lower-case name, joined by "," where it is repeated, and whether
// it is there. The string shares the block's memory and is valid until the next call of Joined or of GetName(":status").
func (b *Block) Joined(lower string) (string, bool) {
	id := Lookup(lower)
	if id != None && !b.Has(id) {
		return "", false
	}
	if id == None {
		if v, ok, isPseudo := b.pseudoValue(lower); isPseudo {
			return str(v), ok
		}
	}
	var first []byte
	n := 0
	for i := range b.fields {
		f := &b.fields[i]
		if f.id != id || id == None && (int(f.name.n) != len(lower) || string(b.at(f.name)) != lower) {
			continue
		}
		v := b.at(f.value)
		switch n {
		case 0:
			first = v
		case 1:
			b.joined = append(append(append(b.joined[:0], first...), ','), v...)
		default:
			b.joined = append(append(b.joined, ','), v...)
		}
		n++
	}
	if n > 1 {
		return str(b.joined), true
	}
	return str(first), n == 1
}

// NextValue walks over the values of the field of that lower-case name: the first one at or after position from, which
// is 0 at the beginning, and the position to go on from; 0 if there is none left. The string shares the block's memory.
func (b *Block) NextValue(lower string, from int) (value string, next int) {
	id := Lookup(lower)
	if id != None && !b.Has(id) {
		return "", 0
	}
	if id == None {
		if v, ok, isPseudo := b.pseudoValue(lower); isPseudo {
			if from > 0 || !ok {
				return "", 0
			}
			return str(v), 1
		}
	}
	for i := from; i < len(b.fields); i++ {
		f := &b.fields[i]
		if f.id == id && (id != None || int(f.name.n) == len(lower) && string(b.at(f.name)) == lower) {
			return str(b.at(f.value)), i + 1
		}
	}
	return "", 0
}

// Values calls yield with each value of a well-known field until it returns false.
func (b *Block) Values(id ID) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		if !b.Has(id) {
			return
		}
		for i := 0; i < len(b.fields); i++ {
			if b.fields[i].id == id && !yield(b.at(b.fields[i].value)) {
				return
			}
		}
	}
}

// Count is how often a well-known field is there.
func (b *Block) Count(id ID) int {
	if !b.Has(id) {
		return 0
	}
	n := 0
	for i := range b.fields {
		if b.fields[i].id == id {
			n++
		}
	}
	return n
}

// HasToken says whether a comma-separated well-known field (Connection, Transfer-Encoding, TE…) has the
// lower-case token, compared without regard to case.
func (b *Block) HasToken(id ID, lower string) bool {
	if !b.Has(id) {
		return false
	}
	for i := range b.fields {
		if b.fields[i].id == id && HasToken(b.at(b.fields[i].value), lower) {
			return true
		}
	}
	return false
}

// str gives a string that shares v's memory.
func str(v []byte) string { return unsafe.String(unsafe.SliceData(v), len(v)) }

// HasToken says whether the comma-separated list has the lower-case token, compared without regard to case.
func HasToken(list []byte, lower string) bool {
	for len(list) > 0 {
		var item []byte
		item, list = nextItem(list)
		if EqualFold(item, lower) {
			return true
		}
	}
	return false
}

// EqualFold compares ASCII without regard to case; lower must be in lower case.
func EqualFold(v []byte, lower string) bool {
	if len(v) != len(lower) {
		return false
	}
	for i := 0; i < len(v); i++ {
		if lowerTable[v[i]] != lower[i] {
			return false
		}
	}
	return true
}

// TrimOWS removes the optional white space of RFC 9110 (space and tab) around v.
func TrimOWS(v []byte) []byte {
	for len(v) > 0 && (v[0] == ' ' || v[0] == '\t') {
		v = v[1:]
	}
	for len(v) > 0 && (v[len(v)-1] == ' ' || v[len(v)-1] == '\t') {
		v = v[:len(v)-1]
	}
	return v
}
