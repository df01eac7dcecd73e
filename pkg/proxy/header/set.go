package header

// Most questions that are put to a head are about fields that it doesn't have: a dozen that a client may not send, half a
// dozen that end at each hop. A Set asks for all of them at once.

// Set is a set of well-known fields.
type Set [(numIDs + 63) / 64]uint64

// SetOf returns the set of the given fields, None not among them.
func SetOf(ids ...ID) (s Set) {
	for _, id := range ids {
		s[id>>6] |= 1 << (id & 63)
	}
	return s
}

// Has says whether the field is in the set.
func (s *Set) Has(id ID) bool { return s[id>>6]>>(id&63)&1 != 0 }

// HasAny says whether one of the fields is there.
func (b *Block) HasAny(s *Set) bool {
	var there uint64
	for i, word := range s {
		there |= b.present[i] & word
	}
	return there != 0
}

// RemoveAll removes every field of the set.
func (b *Block) RemoveAll(s *Set) {
	if !b.HasAny(s) {
		return
	}
	kept := b.fields[:0]
	for i := range b.fields {
		if f := &b.fields[i]; !s.Has(f.id) {
			kept = append(kept, *f)
		}
	}
	b.fields = kept
	for i, word := range s {
		b.present[i] &^= word
	}
}
