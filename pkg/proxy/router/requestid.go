package router

import "math/rand/v2"

// idSource makes version 4 UUIDs from a ChaCha8 stream of its own: no system call and no lock per request, and
// not predictable from earlier ones.
type idSource struct{ rand *rand.ChaCha8 }

const hexDigits = "0123456789abcdef"

// append appends a UUID in its usual form.
func (s *idSource) append(dst []byte) []byte {
	hi, lo := s.rand.Uint64(), s.rand.Uint64()
	hi = hi&^0xf000 | 0x4000         // version
	lo = lo&^(3<<62) | uint64(2)<<62 // variant
	for i := 0; i < 16; i++ {
		switch i {
		case 8, 12:
			dst = append(dst, '-')
		}
		dst = append(dst, hexDigits[hi>>60])
		hi <<= 4
	}
	dst = append(dst, '-')
	for i := 0; i < 16; i++ {
		if i == 4 {
			dst = append(dst, '-')
		}
		dst = append(dst, hexDigits[lo>>60])
		lo <<= 4
	}
	return dst
}
