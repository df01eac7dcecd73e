package http1

import (
	"math/rand/v2"
	"testing"
)

// The eight-byte scans must stop where a scan by single bytes does, or before a byte that is then looked at alone.
func TestFastScansAgreeWithSlowOnes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	slow := func(b []byte, ok func(byte) bool) int {
		for i, c := range b {
			if !ok(c) {
				return i
			}
		}
		return len(b)
	}
	inValue := func(c byte) bool { return c >= ' ' && c != 0x7f }
	inTarget := func(c byte) bool { return c > ' ' && c < 0x7f }
	for range 200_000 {
		b := make([]byte, r.IntN(40))
		for i := range b {
			b[i] = byte('!' + r.IntN(90))
			if r.IntN(12) == 0 {
				b[i] = byte(r.IntN(256))
			}
		}
		for name, got := range map[string][2]int{
			"value":  {skipValue(b, 0), slow(b, inValue)},
			"target": {skipTarget(b, 0), slow(b, inTarget)},
		} {
			fast, exact := got[0], got[1]
			if fast > exact || fast < exact && fast+8 <= len(b) {
				t.Fatalf("%s: %q: %d, want %d", name, b, fast, exact)
			}
		}
	}
}
