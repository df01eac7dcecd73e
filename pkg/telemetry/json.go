package telemetry

import (
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"unicode/utf8"
)

// jsonNode is a compiled JSON template: its string leaves hold formats. Keys come in sorted order, as with Envoy. A
// leaf that is one operator keeps the operator's type (a number stays a number, what is not known is null).
type jsonNode struct {
	// One of these.
	keys    []string // each with quotation marks and colon
	values  []jsonNode
	isArray bool
	format  *Format
	literal string
}

func compileJSON(v any, field string) (jsonNode, error) {
	switch v := v.(type) {
	case map[string]any:
		n := jsonNode{keys: []string{}}
		names := make([]string, 0, len(v))
		for k := range v {
			names = append(names, k)
		}
		sort.Strings(names)
		for _, k := range names {
			child, err := compileJSON(v[k], field+"."+k)
			if err != nil {
				return n, err
			}
			n.keys = append(n.keys, string(appendJSONString(nil, k))+":")
			n.values = append(n.values, child)
		}
		return n, nil
	case []any:
		n := jsonNode{isArray: true}
		for i, e := range v {
			child, err := compileJSON(e, fmt.Sprintf("%s[%d]", field, i))
			if err != nil {
				return n, err
			}
			n.values = append(n.values, child)
		}
		return n, nil
	case string:
		f, err := CompileFormat(v)
		if err != nil {
			return jsonNode{}, fmt.Errorf("%s: %w", field, err)
		}
		if lit, ok := f.Literal(); ok {
			return jsonNode{literal: string(appendJSONString(nil, lit))}, nil
		}
		return jsonNode{format: f}, nil
	case nil, bool:
		b, err := json.Marshal(v)
		return jsonNode{literal: string(b)}, err
	case float64, int, int64, uint64, json.Number:
		// Envoy writes a number that stands in the configuration as a string; whoever reads its logs expects that.
		b, err := json.Marshal(v)
		return jsonNode{literal: `"` + string(b) + `"`}, err
	}
	return jsonNode{}, fmt.Errorf("%s: a %T cannot stand in a JSON format", field, v)
}

// append appends the node's value; with omit, as in Envoy, nulls and empty objects are left out of what contains them, and
// unknown parts of text are empty.
func (n *jsonNode) append(dst []byte, r *Record, omit bool) []byte {
	switch {
	case n.format != nil:
		return n.appendLeaf(dst, r, omit)
	case n.isArray:
		dst = append(dst, '[')
		first := true
		for i := range n.values {
			dst, first = n.values[i].appendMember(dst, "", first, r, omit)
		}
		return append(dst, ']')
	case n.keys == nil:
		return append(dst, n.literal...)
	}
	dst = append(dst, '{')
	first := true
	for i, key := range n.keys {
		dst, first = n.values[i].appendMember(dst, key, first, r, omit)
	}
	return append(dst, '}')
}

// appendMember appends the node as a member of an object (with its key) or of an array. It returns whether the next
// member is still the first.
func (n *jsonNode) appendMember(dst []byte, key string, first bool, r *Record, omit bool) ([]byte, bool) {
	at := len(dst)
	if !first {
		dst = append(dst, ',')
	}
	dst = append(dst, key...)
	value := len(dst)
	dst = n.append(dst, r, omit)
	if v := dst[value:]; omit && (string(v) == "null" || string(v) == "{}") {
		return dst[:at], first
	}
	return dst, false
}

func (n *jsonNode) appendLeaf(dst []byte, r *Record, omit bool) []byte {
	missing := "-"
	if omit {
		missing = ""
	}
	at := len(dst)
	if len(n.format.pieces) == 1 {
		p := &n.format.pieces[0]
		if p.number {
			dst, known := p.append(dst, r, "null")
			if known && !isNumber(dst[at:]) {
				return closeString(slices.Insert(dst, at, '"'), at+1)
			}
			return dst
		}
		dst = append(dst, '"')
		dst, known := p.append(dst, r, "")
		if !known {
			return append(dst[:at], "null"...)
		}
		return closeString(dst, at+1)
	}
	dst = append(dst, '"')
	for i := range n.format.pieces {
		dst, _ = n.format.pieces[i].append(dst, r, missing)
	}
	return closeString(dst, at+1)
}

// isNumber guards the numbers that come from outside (grpc-status).
func isNumber(v []byte) bool {
	for _, c := range v {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(v) > 0 && (len(v) == 1 || v[0] != '0')
}

// closeString makes dst[at:], behind an opening quotation mark, the inside of a JSON string, and closes it.
func closeString(dst []byte, at int) []byte {
	for i := at; i < len(dst); i++ {
		if c := dst[i]; c < ' ' || c == '"' || c == '\\' || c >= 0x7f {
			dst = escapeJSONFrom(dst, i)
			break
		}
	}
	return append(dst, '"')
}

// escapeJSONFrom escapes dst[at:]. Bytes that are not UTF-8 are shown as the Latin-1 characters of their value: the
// line stays valid and nothing is lost.
func escapeJSONFrom(dst []byte, at int) []byte {
	const hex = "0123456789abcdef"
	end := len(dst)
	for i := at; i < end; {
		c := dst[i]
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c == '\n':
			dst = append(dst, '\\', 'n')
		case c == '\r':
			dst = append(dst, '\\', 'r')
		case c == '\t':
			dst = append(dst, '\\', 't')
		case c >= 0x80:
			ch, n := utf8.DecodeRune(dst[i:end])
			if n > 1 || ch != utf8.RuneError {
				dst = append(dst, dst[i:i+n]...)
				i += n
				continue
			}
			fallthrough
		case c < ' ' || c == 0x7f:
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			dst = append(dst, c)
		}
		i++
	}
	n := copy(dst[at:], dst[end:])
	return dst[:at+n]
}

func appendJSONString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	at := len(dst)
	return closeString(append(dst, s...), at)
}
