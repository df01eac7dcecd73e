package header

import "encoding/binary"

// A codec fills a block in two steps. While it scans a buffer it stages what it finds, as offsets into that
// buffer; then Import copies the scanned bytes in one go and brings the names to lower case in the copy. Copying once
// is cheaper than copying field by field, and what is refused half-way has cost no copy at all.

// StageField notes a field whose name and value lie at those offsets of the buffer that Import will be given.
func (b *Block) StageField(name, nameLen, value, valueLen int) {
	base := len(b.arena)
	b.fields = append(b.fields, field{
		name:  span{uint32(base + name), uint32(nameLen)},
		value: span{uint32(base + value), uint32(valueLen)},
	})
}

// StageMethod notes where the method lies.
func (b *Block) StageMethod(off, n int) { b.method = b.stage(hasMethod, off, n) }

// StagePath notes where path and query lie.
func (b *Block) StagePath(off, n int) { b.path = b.stage(hasPath, off, n) }

// StageAuthority notes where the authority lies.
func (b *Block) StageAuthority(off, n int) { b.authority = b.stage(hasAuthority, off, n) }

func (b *Block) stage(p pseudoSet, off, n int) span {
	b.pseudo |= p
	return span{uint32(len(b.arena) + off), uint32(n)}
}

// Import copies raw, the buffer that fields from index first on were staged for.
func (b *Block) Import(raw []byte, first int) {
	b.arena = append(b.arena, raw...)
	for i := first; i < len(b.fields); i++ {
		f := &b.fields[i]
		name := b.arena[f.name.off : f.name.off+f.name.n]
		lowerInPlace(name)
		if id := Lookup(str(name)); id != None {
			f.id = id
			b.mark(id)
		}
	}
}

// Lines is the way back: the i-th field and those after it as they lie in the block, for as long as they lie there as HTTP/1
// writes them ("name: value" CRLF), one right behind the other, and how many they are. Most of a head passes a proxy
// unchanged, and is written by one copy. A field of the set without is never among them.
func (b *Block) Lines(i int, without *Set) (lines []byte, n int) {
	from, to := 0, 0
	for ; i+n < len(b.fields); n++ {
		f := &b.fields[i+n]
		name, value := int(f.name.off), int(f.value.off)
		colon, end := name+int(f.name.n), value+int(f.value.n)
		if value != colon+2 || end+2 > len(b.arena) || n > 0 && name != to || without.Has(f.id) {
			break
		}
		if line := b.arena[name : end+2]; line[colon-name] != ':' || line[colon-name+1] != ' ' || line[end-name] != '\r' || line[end-name+1] != '\n' {
			break
		}
		if n == 0 {
			from = name
		}
		to = end + 2
	}
	return b.arena[from:to], n
}

const (
	swarOnes = 0x0101010101010101
	swarHigh = 0x8080808080808080
)

// lowerInPlace brings ASCII to lower case, eight bytes at a time.
func lowerInPlace(v []byte) {
	for len(v) >= 8 {
		x := binary.LittleEndian.Uint64(v)
		low := x &^ swarHigh
		aboveZ := low + (0x7f-'Z')*swarOnes
		fromA := low + (0x80-'A')*swarOnes
		upper := (fromA ^ aboveZ) & swarHigh &^ x
		binary.LittleEndian.PutUint64(v, x|upper>>2)
		v = v[8:]
	}
	for i, c := range v {
		v[i] = lowerTable[c]
	}
}
