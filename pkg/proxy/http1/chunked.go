package http1

import "github.com/sockmesh/sockmesh/pkg/proxy/header"

// chunkStep is where in a chunk the parser is. Unlike in a head, every byte is consumed at once: what a size line
// says fits a few words.
type chunkStep uint8

const (
	chunkSize chunkStep = iota
	chunkExtName
	chunkExtValue
	chunkExtQuoted
	chunkExtEscape
	chunkExtAfterQuoted
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
)

type chunkState struct {
	step   chunkStep
	item   int    // bytes of the current digits, extension name or value
	line   int    // bytes of the current size line
	exts   int    // bytes of extensions in the whole message
	remain uint64 // bytes of data to come
}

// chunked reads a chunked body up to the trailer section.
func (m *message) chunked(b []byte) (n int, ev Event, err error) {
	c := &m.chunk
	for n < len(b) {
		switch c.step {
		case chunkData:
			take := len(b) - n
			if uint64(take) >= c.remain {
				take = int(c.remain)
				c.step = chunkDataCR
			}
			c.remain -= uint64(take)
			m.data = b[n : n+take]
			return n + take, Data, nil
		case chunkDataCR:
			if b[n] != '\r' {
				return m.fail(n, ErrChunkEnd)
			}
			c.step = chunkDataLF
		case chunkDataLF:
			if b[n] != '\n' {
				return m.fail(n, ErrChunkEnd)
			}
			c.step, c.item, c.line = chunkSize, 0, 0
		case chunkSizeLF:
			if b[n] != '\n' {
				return m.fail(n, ErrBareCR)
			}
			c.step = chunkData
			if c.remain == 0 {
				return m.beginTrailers(b, n+1)
			}
		default:
			if bad := c.sizeLine(b[n], m.limits.ChunkLine, m.limits.ChunkExtensions); bad != nil {
				return m.fail(n, bad)
			}
		}
		n++
	}
	return n, NeedMore, nil
}

// sizeLine takes one byte of a chunk-size line. Extensions are checked against RFC 9112 section 7.1.1, without
// the white space that is "bad" there, and dropped.
func (c *chunkState) sizeLine(b byte, maxLine, maxExts int) *ParseError {
	if c.line++; c.line > maxLine {
		return ErrChunkTooLong
	}
	if c.step != chunkSize {
		if c.exts++; c.exts > maxExts {
			return ErrChunkTooLong
		}
	}
	switch c.step {
	case chunkSize:
		if class[b]&isHex != 0 {
			if c.remain >= 1<<59 {
				return ErrChunkSize
			}
			c.remain = c.remain<<4 | uint64(hexValue(b))
			c.item++
			return nil
		}
		if c.item == 0 {
			return ErrChunkSize
		}
		return c.separator(b, ErrChunkSize)
	case chunkExtName:
		switch {
		case class[b]&isToken != 0:
			c.item++
			return nil
		case c.item == 0:
			return ErrChunkExtension
		case b == '=':
			c.step, c.item = chunkExtValue, 0
			return nil
		}
		return c.separator(b, ErrChunkExtension)
	case chunkExtValue:
		switch {
		case class[b]&isToken != 0:
			c.item++
			return nil
		case b == '"' && c.item == 0:
			c.step = chunkExtQuoted
			return nil
		case c.item == 0:
			return ErrChunkExtension
		}
		return c.separator(b, ErrChunkExtension)
	case chunkExtQuoted:
		switch {
		case class[b]&isQuoted != 0:
		case b == '"':
			c.step = chunkExtAfterQuoted
		case b == '\\':
			c.step = chunkExtEscape
		default:
			return ErrChunkExtension
		}
		return nil
	case chunkExtEscape:
		if b != '\t' && b < ' ' || b == 0x7f {
			return ErrChunkExtension
		}
		c.step = chunkExtQuoted
		return nil
	}
	return c.separator(b, ErrChunkExtension)
}

// separator takes what may follow a size or an extension.
func (c *chunkState) separator(b byte, otherwise *ParseError) *ParseError {
	switch b {
	case ';':
		c.step, c.item = chunkExtName, 0
	case '\r':
		c.step = chunkSizeLF
	case '\n':
		return ErrBareLF
	default:
		return otherwise
	}
	return nil
}

func hexValue(b byte) byte {
	if b <= '9' {
		return b - '0'
	}
	return b&^0x20 - 'A' + 10
}

func (m *message) beginTrailers(b []byte, n int) (int, Event, error) {
	m.state = atTrailers
	m.line = lineState{}
	if n == len(b) {
		return n, NeedMore, nil
	}
	k, ev, err := m.readTrailers(b[n:])
	return n + k, ev, err
}

// readTrailers reads the trailer section; its fields have the limits of a head of their own.
func (m *message) readTrailers(b []byte) (n int, ev Event, err error) {
	in := b
	if room := m.limits.HeadBytes - m.line.used; len(in) > room {
		in = in[:room]
	}
	if m.trailers == nil && len(in) > 0 && in[0] != '\r' {
		if m.spare == nil {
			m.spare = new(header.Block)
		}
		m.spare.Reset()
		m.trailers = m.spare
	}
	first := 0
	if m.trailers != nil {
		first = m.trailers.Len()
	}
	n, bad := m.line.fields(m.trailers, in, 0, m.limits.Fields, false)
	if m.trailers != nil {
		m.trailers.Import(b[:n], first)
	}
	m.line.used += n
	switch {
	case bad != nil:
		return m.fail(n, bad)
	case !m.line.end && len(in) < len(b):
		return m.fail(n, ErrHeadTooLarge)
	case !m.line.end:
		return n, NeedMore, nil
	}
	m.state = atDone
	if m.line.count == 0 {
		return n, Complete, nil
	}
	if bad := checkTrailers(m.trailers); bad != nil {
		return m.fail(n, bad)
	}
	return n, Trailers, nil
}

// checkTrailers refuses fields that frame or route a message (RFC 9110 section 6.5.1): whoever merges trailers into
// the head would be deceived.
func checkTrailers(t *header.Block) *ParseError {
	for i := 0; i < t.Len(); i++ {
		if !mayTrail(t, i) {
			return ErrTrailer
		}
	}
	return nil
}

func mayTrail(t *header.Block, i int) bool {
	switch t.ID(i) {
	case header.ContentLength, header.TransferEncoding, header.Connection, header.Upgrade, header.TE, header.Trailer,
		header.KeepAlive, header.ProxyConnection, header.Expect, header.Authorization:
		return false
	case header.None:
		return string(t.Name(i)) != "host"
	}
	return true
}
