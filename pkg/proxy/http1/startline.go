package http1

import (
	"bytes"
	"encoding/binary"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// maxMethod bounds a method: the longest registered one has 17 bytes.
const maxMethod = 32

var (
	version11 = binary.LittleEndian.Uint64([]byte("HTTP/1.1"))
	version10 = binary.LittleEndian.Uint64([]byte("HTTP/1.0"))
)

// pathFix is what must be done about a path that is not in the input as such.
type pathFix uint8

const (
	pathAsIs    pathFix = iota
	pathSlash           // http://host
	pathSlashed         // http://host?query: a slash goes before it
	pathStar            // OPTIONS http://host
)

// requestLine reads blank lines and the request line. It returns the index behind what is complete.
func (p *RequestParser) requestLine(in []byte) (int, *ParseError) {
	n := 0
	if p.line.scan == 0 {
		// RFC 9112 section 2.2: a CRLF or so too many after an earlier body is forgiven.
		for n < len(in) && in[n] == '\r' {
			if n+1 == len(in) {
				return n, nil
			}
			if in[n+1] != '\n' {
				return n, ErrBareCR
			}
			n += 2
		}
	}
	line := in[n:]
	if len(line) == 0 {
		return n, nil
	}
	p.started = true
	i := p.line.scan
	if p.line.mark == 0 {
		for i < len(line) && class[line[i]]&isToken != 0 {
			i++
		}
		if i > maxMethod {
			return n, ErrMethod
		}
		if i == len(line) {
			p.line.scan = i
			return n, nil
		}
		if line[i] != ' ' || i == 0 {
			return n, ErrMethod
		}
		i++
		p.line.mark = i
	}
	i = skipTarget(line, i)
	for i < len(line) && class[line[i]]&isTargetEnd == 0 {
		i++
	}
	p.line.scan = i
	if i == len(line) {
		return n, nil
	}
	if line[i] != ' ' || i == p.line.mark {
		return n, ErrTarget
	}
	minor, size, bad := requestVersion(line[i+1:])
	if size == 0 || bad != nil {
		return n, bad
	}
	p.framing.HTTP10 = minor == 0
	if bad := p.target(line, n, p.line.mark, i); bad != nil {
		return n, bad
	}
	p.head.StageMethod(n, p.line.mark-1)
	p.line.scan, p.line.mark = 0, 0
	p.state = atFields
	return n + i + 1 + size, nil
}

// requestVersion reads "HTTP/1.x" CRLF. A size of 0 means that it is not complete.
func requestVersion(b []byte) (minor, size int, bad *ParseError) {
	const line = "HTTP/1.1\r\n"
	if len(b) >= len(line) {
		if b[8] != '\r' || b[9] != '\n' {
			return 0, 0, ErrVersion
		}
		switch binary.LittleEndian.Uint64(b) {
		case version11:
			return 1, len(line), nil
		case version10:
			return 0, len(line), nil
		}
		return 0, 0, ErrVersion
	}
	for i, c := range b {
		if c != line[i] && (i != 7 || c != '0') {
			return 0, 0, ErrVersion
		}
	}
	return 0, 0, nil
}

// target checks the request target, line[from:to], and stages what it says; line lies at offset base of the input.
func (p *RequestParser) target(line []byte, base, from, to int) *ParseError {
	t := line[from:to]
	method := line[:from-1]
	p.isConnect = false
	switch {
	case string(method) == "CONNECT":
		if !validHostPort(t) {
			return ErrTarget
		}
		p.isConnect = true
		p.head.StageAuthority(base+from, len(t))
		p.line.host |= targetHost
		return nil
	case t[0] == '/':
		// A fragment is not for the wire (RFC 9112 section 3.2); what treats it as path and what does not disagree about
		// the route.
		if bytes.IndexByte(t, '#') >= 0 {
			return ErrFragment
		}
		p.head.StagePath(base+from, len(t))
		return nil
	case len(t) == 1 && t[0] == '*':
		if string(method) != "OPTIONS" {
			return ErrTarget
		}
		p.head.StagePath(base+from, 1)
		return nil
	}
	return p.absoluteForm(t, base+from, string(method) == "OPTIONS")
}

// absoluteForm reads "http://authority/path", which lies at offset off of the input.
func (p *RequestParser) absoluteForm(t []byte, off int, isOptions bool) *ParseError {
	host := 0
	switch {
	case len(t) >= 7 && header.EqualFold(t[:7], "http://"):
		host = 7
	case len(t) >= 8 && header.EqualFold(t[:8], "https://"):
		host, p.isHTTPS = 8, true
	case bytes.Contains(t, []byte("://")):
		return ErrScheme
	default:
		return ErrTarget
	}
	if p.opt.NoAbsoluteForm {
		return ErrAbsoluteForm
	}
	p.isAbsolute = true
	path := host
	for path < len(t) && t[path] != '/' && t[path] != '?' && t[path] != '#' {
		path++
	}
	switch {
	case path == host || !validHost(t[host:path]):
		return ErrTarget
	case bytes.IndexByte(t, '#') >= 0:
		return ErrFragment
	}
	p.head.StageAuthority(off+host, path-host)
	p.line.host |= targetHost
	switch {
	case path == len(t) && isOptions:
		p.path = pathStar
	case path == len(t):
		p.path = pathSlash
	default:
		if t[path] == '?' {
			p.path = pathSlashed
		}
		p.head.StagePath(off+path, len(t)-path)
	}
	return nil
}

// fixPath completes what absolute form left open.
func (p *RequestParser) fixPath() {
	if !p.isAbsolute {
		return
	}
	if p.isHTTPS {
		p.head.SetScheme("https")
	} else {
		p.head.SetScheme("http")
	}
	switch p.path {
	case pathSlash:
		p.head.SetPath("/")
	case pathStar:
		p.head.SetPath("*")
	case pathSlashed:
		p.head.PrefixPath("/")
	}
}

// validHostPort checks authority form: a host, a colon, a port.
func validHostPort(t []byte) bool {
	i := bytes.LastIndexByte(t, ':')
	if i <= 0 || i == len(t)-1 || len(t)-i > 6 || !validHost(t) {
		return false
	}
	for _, c := range t[i+1:] {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// statusLine reads "HTTP/1.1 200 OK" CRLF. The reason is checked and dropped: it means nothing (RFC 9110 section 15.1).
func (p *ResponseParser) statusLine(in []byte) (int, *ParseError) {
	if len(in) == 0 {
		return 0, nil
	}
	p.started = true
	const form = "HTTP/1.1 200"
	for i := 0; i < len(form); i++ {
		if i == len(in) {
			return 0, nil
		}
		switch c := in[i]; {
		case i >= 9:
			if c < '0' || c > '9' || i == 9 && c == '0' {
				return 0, ErrStatusLine
			}
		case c == form[i]:
		case i == 7 && c == '0':
		case i == 7:
			return 0, ErrVersion
		default:
			return 0, ErrStatusLine
		}
	}
	i := max(p.line.scan, len(form))
	if i < len(in) && i == len(form) && in[i] != ' ' && in[i] != '\r' {
		return 0, ErrStatusLine
	}
	end, bad := scanValue(in, i)
	if bad != nil {
		return 0, bad
	}
	if end+1 >= len(in) {
		p.line.scan = end
		return 0, nil
	}
	p.line.scan = 0
	p.framing.HTTP10 = in[7] == '0'
	p.head.SetStatus(int(in[9]-'0')*100 + int(in[10]-'0')*10 + int(in[11]-'0'))
	p.state = atFields
	return end + 2, nil
}
