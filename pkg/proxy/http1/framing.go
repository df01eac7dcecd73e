package http1

import (
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// finishHead looks at a complete request head as a whole: what is allowed only once or not together, and how the
// body is framed.
func (p *RequestParser) finishHead() *ParseError {
	f, h := &p.framing, p.head
	p.fixPath()
	if bad := p.underscores(); bad != nil {
		return bad
	}
	if f.HTTP10 && !p.opt.AcceptHTTP10 {
		return ErrHTTP10
	}
	if !h.HasAuthority() {
		switch {
		case !f.HTTP10 && !p.opt.OptionalHost:
			return ErrMissingHost
		case f.HTTP10 && p.opt.DefaultHost != "":
			h.SetAuthority(p.opt.DefaultHost)
		}
	}
	p.connection()
	if bad := p.contentLength(); bad != nil {
		return bad
	}
	hasTE, bad := p.transferEncoding()
	if bad != nil {
		return bad
	}
	switch {
	case p.isConnect && (hasTE || f.Length > 0):
		if hasTE {
			return ErrTEForbidden
		}
		return ErrLengthForbidden
	case hasTE:
		f.Body = Chunked
	case f.Length > 0:
		f.Body = FixedLength
	}
	if f.Body != NoBody && !f.HTTP10 && h.Has(header.Expect) {
		f.Continue = h.HasToken(header.Expect, "100-continue")
	}
	return nil
}

// finishHead does the same for a response.
func (p *ResponseParser) finishHead() *ParseError {
	f, status := &p.framing, p.head.Status()
	if bad := p.underscores(); bad != nil {
		return bad
	}
	p.connection()
	if bad := p.contentLength(); bad != nil {
		return bad
	}
	hasTE, bad := p.transferEncoding()
	if bad != nil {
		return bad
	}
	tunnel := status == 101 || p.kind&ToConnect != 0 && status/100 == 2
	if tunnel || status < 200 || status == 204 {
		// RFC 9110 section 8.6, RFC 9112 section 6.1: these have no body, and fields that announce one are a trap.
		if hasTE {
			return ErrTEForbidden
		}
		if f.Length > 0 {
			return ErrLengthForbidden
		}
	}
	switch {
	case status == 101:
		if p.kind&ToUpgrade == 0 {
			return ErrUpgrade
		}
		f.Body = Raw
	case tunnel:
		f.Body = Raw
	case status < 200, status == 204, status == 304, p.kind&ToHead != 0, f.Length == 0:
	case hasTE:
		f.Body = Chunked
	case f.Length > 0:
		f.Body = FixedLength
	default:
		f.Body, f.KeepAlive = UntilClose, false
	}
	return nil
}

// connection reads the Connection options: "close" wins over "keep-alive", which only HTTP/1.0 needs.
func (m *message) connection() {
	f, h := &m.framing, m.head
	f.KeepAlive = !f.HTTP10
	if !h.Has(header.Connection) {
		return
	}
	f.KeepAlive = !h.HasToken(header.Connection, "close") &&
		(!f.HTTP10 || h.HasToken(header.Connection, "keep-alive"))
	f.Upgrade = !f.HTTP10 && h.Has(header.Upgrade) && h.HasToken(header.Connection, "upgrade")
}

// contentLength reads Content-Length: one field, digits only, no list even of equal values.
func (m *message) contentLength() *ParseError {
	if !m.head.Has(header.ContentLength) {
		return nil
	}
	if m.head.Count(header.ContentLength) > 1 {
		return ErrDuplicateLength
	}
	v, _ := m.head.Get(header.ContentLength)
	n, ok := parseLength(v)
	if !ok {
		return ErrContentLength
	}
	m.framing.Length = n
	return nil
}

func parseLength(v []byte) (int64, bool) {
	if len(v) == 0 || len(v) > 19 {
		return 0, false
	}
	var n uint64
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	return int64(n), n < 1<<63
}

// transferEncoding accepts "chunked" alone, as Envoy does: any other coding would have to be understood by whoever
// frames the message next.
func (m *message) transferEncoding() (bool, *ParseError) {
	if !m.head.Has(header.TransferEncoding) {
		return false, nil
	}
	if m.framing.Length >= 0 {
		return true, ErrLengthAndTE
	}
	if m.framing.HTTP10 {
		return true, ErrTEForbidden
	}
	v, _ := m.head.Get(header.TransferEncoding)
	if m.head.Count(header.TransferEncoding) > 1 || !header.EqualFold(v, "chunked") {
		return true, ErrTransferEncoding
	}
	return true, nil
}

// underscores applies headers_with_underscores_action.
func (m *message) underscores() *ParseError {
	if m.opt.Underscores == mesh.UnderscoresAllow {
		return nil
	}
	h := m.head
	for i := 0; i < h.Len(); {
		// No well-known name has one.
		if h.ID(i) != header.None || !hasUnderscore(h.Name(i)) {
			i++
			continue
		}
		if m.opt.Underscores == mesh.UnderscoresReject {
			return ErrUnderscore
		}
		h.RemoveAt(i)
	}
	return nil
}

func hasUnderscore(name []byte) bool {
	for _, c := range name {
		if c == '_' {
			return true
		}
	}
	return false
}
