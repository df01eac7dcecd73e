package http1

import (
	"encoding/binary"
	"math/bits"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// Classes of bytes, so that a scan is one table look-up for each byte.
const (
	isToken     = 1 << iota // tchar of RFC 9110 section 5.6.2
	isTargetEnd             // cannot be in a request target: space, control characters, all but ASCII
	isHost                  // reg-name, IP literal and port
	isHex
	isQuoted // qdtext of a quoted string
)

var class = func() (t [256]uint8) {
	for c := range 256 {
		b := byte(c)
		alpha := 'a' <= b|0x20 && b|0x20 <= 'z'
		digit := '0' <= b && b <= '9'
		if alpha || digit || isOneOf(b, "!#$%&'*+-.^_`|~") {
			t[c] |= isToken
		}
		if b <= ' ' || b >= 0x7f {
			t[c] |= isTargetEnd
		}
		if alpha || digit || isOneOf(b, "-._~%!$&'()*+,;=:[]") {
			t[c] |= isHost
		}
		if digit || 'a' <= b|0x20 && b|0x20 <= 'f' {
			t[c] |= isHex
		}
		if b == '\t' || b >= ' ' && b != '"' && b != '\\' && b != 0x7f {
			t[c] |= isQuoted
		}
	}
	return t
}()

func isOneOf(b byte, set string) bool {
	for i := 0; i < len(set); i++ {
		if set[i] == b {
			return true
		}
	}
	return false
}

const (
	ones = 0x0101010101010101
	high = 0x8080808080808080
)

// skipValue skips bytes that can be in a field value, eight at a time, and stops at one that perhaps cannot (a tab
// can) or less than eight before the end. A byte minus 0x20 borrows into its top bit if it was smaller and that bit
// was clear; DEL becomes zero first and then borrows from one. A borrow can only spoil the bytes above, so the
// lowest bit set is right.
func skipValue(b []byte, i int) int {
	for i+8 <= len(b) {
		x := binary.LittleEndian.Uint64(b[i:])
		del := x ^ 0x7f*ones
		if stop := ((x-0x20*ones)&^x | (del-ones)&^del) & high; stop != 0 {
			return i + bits.TrailingZeros64(stop)>>3
		}
		i += 8
	}
	return i
}

// skipTarget does the same for a request target, where space and bytes beyond ASCII end it too.
func skipTarget(b []byte, i int) int {
	for i+8 <= len(b) {
		x := binary.LittleEndian.Uint64(b[i:])
		if stop := ((x - 0x21*ones) | x | (x + ones)) & high; stop != 0 {
			return i + bits.TrailingZeros64(stop)>>3
		}
		i += 8
	}
	return i
}

// lineState is what is remembered of a line that was not complete, so that no byte is looked at twice however slowly
// a peer sends, and of the head (or trailer section) that it belongs to.
type lineState struct {
	used  int // bytes of complete lines
	scan  int // bytes of the current line that were found good
	mark  int // start of the target, or the colon's index plus one; 0 before it
	host  uint8
	count int
	end   bool // the empty line was seen
}

// fields scans complete field lines of in, from start on, and stages them in blk. It returns the index behind the last
// complete one; l.end says that the empty line was among them. With isRequest, Host becomes the authority.
func (l *lineState) fields(blk *header.Block, in []byte, start, limit int, isRequest bool) (int, *ParseError) {
	for start < len(in) {
		line := in[start:]
		i := l.scan
		if l.mark == 0 {
			if i == 0 {
				switch line[0] {
				case '\r':
					if len(line) == 1 {
						return start, nil
					}
					if line[1] != '\n' {
						return start, ErrBareCR
					}
					l.end, l.scan = true, 0
					return start + 2, nil
				case '\n':
					return start, ErrBareLF
				case ' ', '\t':
					return start, ErrFolded
				}
			}
			for i < len(line) && class[line[i]]&isToken != 0 {
				i++
			}
			if i == len(line) {
				l.scan = i
				return start, nil
			}
			if line[i] != ':' || i == 0 {
				return start, ErrFieldName
			}
			i++
			l.mark = i
		}
		end, err := scanValue(line, i)
		if err != nil {
			return start, err
		}
		if end+1 >= len(line) {
			l.scan = end
			return start, nil
		}
		if l.count++; l.count > limit {
			return start, ErrTooManyFields
		}
		if err := l.stage(blk, line[:end], start, isRequest); err != nil {
			return start, err
		}
		start += end + 2
		l.scan, l.mark = 0, 0
	}
	return start, nil
}

// scanValue returns the index of the CR that ends the field value; if the line does not end within b, a number of
// bytes of it that need not be looked at again, len(b)-1 at least.
func scanValue(b []byte, i int) (int, *ParseError) {
	for {
		i = skipValue(b, i)
		if i >= len(b) {
			return len(b), nil
		}
		switch c := b[i]; {
		case c >= ' ' && c != 0x7f || c == '\t':
			i++
		case c == '\r':
			if i+1 < len(b) && b[i+1] != '\n' {
				return 0, ErrBareCR
			}
			return i, nil
		case c == '\n':
			return 0, ErrBareLF
		default:
			return 0, ErrFieldValue
		}
	}
}

// stage notes the field in line, which lies at offset start of the input.
func (l *lineState) stage(blk *header.Block, line []byte, start int, isRequest bool) *ParseError {
	from, to := l.mark, len(line)
	for from < to && isBlank(line[from]) {
		from++
	}
	for to > from && isBlank(line[to-1]) {
		to--
	}
	nameLen := l.mark - 1
	if isRequest && nameLen == 4 && header.EqualFold(line[:4], "host") {
		return l.stageHost(blk, line[from:to], start+from)
	}
	blk.StageField(start, nameLen, start+from, to-from)
	return nil
}

// Of a request's authority it is remembered where it came from: a target's goes before Host's.
const (
	hostSeen   = 1 << iota
	targetHost // the request target named one
)

func (l *lineState) stageHost(blk *header.Block, host []byte, off int) *ParseError {
	if l.host&hostSeen != 0 {
		return ErrDuplicateHost
	}
	l.host |= hostSeen
	if !validHost(host) {
		return ErrHost
	}
	if l.host&targetHost == 0 {
		blk.StageAuthority(off, len(host))
	}
	return nil
}

func validHost(host []byte) bool {
	for _, c := range host {
		if class[c]&isHost == 0 {
			return false
		}
	}
	return true
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }
