package loop

import "math/bits"

const (
	// scratchSize is what one receive takes at most.
	scratchSize = 64 << 10
	// smallChunk holds a corked head or a small message, largeChunk what a slow peer makes us keep.
	smallChunk = 4 << 10
	largeChunk = 32 << 10
	// Kept input is held in buffers of 2^minClass … 2^maxClass bytes.
	minClass = 11
	maxClass = 20
	// keepFree bounds the bytes of unused buffers that a loop holds on to; the rest is left to the collector.
	keepFree = 8 << 20
)

// chunk is a piece of pending output.
type chunk struct {
	next *chunk
	buf  []byte
	r, w int
}

// pool lends buffers to the connections of one loop.
type pool struct {
	small, large *chunk
	classes      [maxClass + 1][][]byte
	free         int // bytes in the lists
	lent         int // bytes out
}

func (p *pool) chunk(want int) *chunk {
	list, size := &p.small, smallChunk
	if want > smallChunk {
		list, size = &p.large, largeChunk
	}
	p.lent += size
	if c := *list; c != nil {
		*list, c.next = c.next, nil
		p.free -= size
		return c
	}
	return &chunk{buf: make([]byte, size)}
}

func (p *pool) putChunk(c *chunk) {
	size := len(c.buf)
	p.lent -= size
	if p.free+size > keepFree {
		return
	}
	list := &p.small
	if size > smallChunk {
		list = &p.large
	}
	c.r, c.w, c.next = 0, 0, *list
	*list = c
	p.free += size
}

// putChunks takes back a whole list.
func (p *pool) putChunks(c *chunk) {
	for c != nil {
		next := c.next
		p.putChunk(c)
		c = next
	}
}

func sizeClass(n int) int {
	return max(bits.Len(uint(n-1)), minClass)
}

// buffer returns a buffer with room for at least n bytes.
func (p *pool) buffer(n int) []byte {
	class := sizeClass(n)
	p.lent += 1 << class
	if class <= maxClass {
		if list := p.classes[class]; len(list) > 0 {
			b := list[len(list)-1]
			p.classes[class] = list[:len(list)-1]
			p.free -= len(b)
			return b
		}
	}
	return make([]byte, 1<<class)
}

func (p *pool) putBuffer(b []byte) {
	p.lent -= len(b)
	class := sizeClass(len(b))
	if class > maxClass || p.free+len(b) > keepFree {
		return
	}
	p.classes[class] = append(p.classes[class], b)
	p.free += len(b)
}
