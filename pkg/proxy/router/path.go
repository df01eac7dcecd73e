package router

import (
	"net/http"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// normalize brings path and host into the form that routes are matched against. It returns false if it has
// answered the request.
func (r *Request) normalize() bool {
	h, cfg := &r.head, r.hcm
	path := h.PathString()
	if r.head.MethodString() == http.MethodConnect {
		r.normalizeHost()
		return true
	}
	switch {
	case path == "":
		r.reply(http.StatusNotFound, "", "missing_path_rejected")
		return false
	case path[0] != '/':
		r.reply(http.StatusNotFound, "", "absolute_path_rejected")
		return false
	case strings.IndexByte(path, '#') >= 0:
		r.reply(http.StatusBadRequest, "", "path_with_fragment_rejected")
		return false
	}
	redirect := false
	if cfg.EscapedSlashes != mesh.EscapedSlashesKeep {
		var found bool
		r.scratch, found = unescapeSlashes(r.scratch[:0], path)
		if found {
			if cfg.EscapedSlashes == mesh.EscapedSlashesReject {
				r.reply(http.StatusBadRequest, "", "path_normalization_failed")
				return false
			}
			redirect = cfg.EscapedSlashes == mesh.EscapedSlashesRedirect
			h.SetPath(unsafeString(r.scratch))
		}
	}
	if cfg.NormalizePath && needsNormalizing(h.PathString()) {
		var ok bool
		r.scratch, ok = normalizePath(r.scratch[:0], h.PathString())
		if !ok {
			r.reply(http.StatusBadRequest, "", "path_normalization_failed")
			return false
		}
		h.SetPath(unsafeString(r.scratch))
	}
	if cfg.MergeSlashes && strings.Contains(pathOnly(h.PathString()), "//") {
		r.scratch = mergeSlashes(r.scratch[:0], h.PathString())
		h.SetPath(unsafeString(r.scratch))
	}
	if redirect {
		r.resp.Reset()
		r.resp.Add(header.Location, h.PathString())
		r.replyWith(http.StatusTemporaryRedirect, "", "path_normalization_failed")
		return false
	}
	r.normalizeHost()
	return true
}

// pathOnly is the path without query and fragment.
func pathOnly(p string) string {
	for i := range len(p) {
		if c := p[i]; c == '?' || c == '#' {
			return p[:i]
		}
	}
	return p
}

// unescapeSlashes turns %2F into / and %5C into \ in the path, and says whether there was any.
func unescapeSlashes(dst []byte, path string) ([]byte, bool) {
	n := len(pathOnly(path))
	found := false
	for i := 0; i < n; i++ {
		if path[i] == '%' && i+2 < n {
			switch lo := path[i+2] | 0x20; {
			case path[i+1] == '2' && lo == 'f':
				dst, found = append(dst, '/'), true
				i += 2
				continue
			case path[i+1] == '5' && lo == 'c':
				dst, found = append(dst, '\\'), true
				i += 2
				continue
			}
		}
		dst = append(dst, path[i])
	}
	return append(dst, path[n:]...), found
}

func mergeSlashes(dst []byte, path string) []byte {
	n := len(pathOnly(path))
	for i := 0; i < n; i++ {
		if path[i] == '/' && i > 0 && path[i-1] == '/' {
			continue
		}
		dst = append(dst, path[i])
	}
	return append(dst, path[n:]...)
}

// Classes of characters in a path, as browsers' URL canonicalisation (and hence Envoy) knows them.
const (
	pass   = iota // stands as it is, escaped or not
	plain         // unreserved: stands unescaped only
	escape        // stands escaped only
)

var pathClass = func() (t [256]uint8) {
	for c := range t {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', strings.IndexByte("-._~", byte(c)) >= 0:
			t[c] = plain
		case c <= ' ', c >= 0x7f, strings.IndexByte("\"#<>?^`{}", byte(c)) >= 0:
			t[c] = escape
		}
	}
	return
}()

// needsNormalizing is a quick look that spares nearly every path the work.
func needsNormalizing(path string) bool {
	for i := 0; i < len(path); i++ {
		switch c := path[i]; c {
		case '?':
			return false
		case '%', '\\':
			return true
		case '.':
			if i > 0 && (path[i-1] == '/' || path[i-1] == '.') {
				return true
			}
		default:
			if pathClass[c] == escape {
				return true
			}
		}
	}
	return false
}

// normalizePath resolves dot segments, escaped ones too, turns backslashes into slashes and gives unreserved
// characters their plain form (RFC 3986 section 6.2.2, as browsers do it). The query is left alone. false: the
// path cannot be trusted (%00).
func normalizePath(dst []byte, path string) ([]byte, bool) {
	n := len(pathOnly(path))
	for i := 0; i < n; i++ {
		c := path[i]
		switch c {
		case 0:
			return dst, false
		case '\\':
			dst = append(dst, '/')
		case '%':
			if v, ok := unhex(path[i+1 : min(i+3, n)]); ok {
				if v == 0 {
					return dst, false
				}
				if pathClass[v] == plain {
					dst = append(dst, v)
				} else {
					dst = append(dst, path[i:i+3]...)
				}
				i += 2
				break
			}
			dst = append(dst, c)
		default:
			if pathClass[c] == escape {
				dst = append(dst, '%', hexUpper[c>>4], hexUpper[c&15])
			} else {
				dst = append(dst, c)
			}
		}
		if last := dst[len(dst)-1]; last == '/' && len(dst) > 1 {
			dst = dropDots(dst[:len(dst)-1], true)
		}
	}
	dst = dropDots(dst, false)
	return append(dst, path[n:]...), true
}

const hexUpper = "0123456789ABCDEF"

// dropDots looks at the last segment of p, which begins with "/": "." goes, ".." takes the one before with it.
// slash says that a slash followed it.
func dropDots(p []byte, slash bool) []byte {
	at := strings.LastIndexByte(unsafeString(p), '/')
	switch seg := p[at+1:]; {
	case len(seg) == 1 && seg[0] == '.':
		return p[:at+1]
	case len(seg) == 2 && seg[0] == '.' && seg[1] == '.':
		if at > 0 {
			at = strings.LastIndexByte(unsafeString(p[:at]), '/')
		}
		return p[:at+1]
	}
	if slash {
		p = append(p, '/')
	}
	return p
}

func unhex(s string) (byte, bool) {
	if len(s) != 2 {
		return 0, false
	}
	hi, lo := hexValue(s[0]), hexValue(s[1])
	return hi<<4 | lo, hi < 16 && lo < 16
}

func hexValue(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c|0x20 >= 'a' && c|0x20 <= 'f':
		return c | 0x20 - 'a' + 10
	}
	return 255
}
