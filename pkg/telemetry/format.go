package telemetry

import (
	"fmt"
	"strconv"
	"strings"
)

// DefaultFormat is Envoy's default access-log format, for HTTP and TCP alike.
const DefaultFormat = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" " +
	"%RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% " +
	"%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" " +
	"\"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n"

// Format is a compiled string with Envoy command operators (%REQ(x)%, %START_TIME%, …). It is immutable and may be
// used by any number of goroutines.
type Format struct {
	pieces []piece
}

// piece is literal text, or an operator.
type piece struct {
	literal string
	// value appends the operator's value and says whether it is known. Nil for literal text.
	value  func(dst []byte, r *Record) ([]byte, bool)
	max    int  // longest value in bytes; 0: any
	number bool // JSON shows it as a number
	quoted bool // stands between quotation marks, which must then not be in the value
}

// CompileFormat compiles a format string. An unknown operator or a wrong argument is an error that names it.
func CompileFormat(s string) (*Format, error) {
	f := &Format{}
	literal := make([]byte, 0, len(s))
	flush := func() {
		if len(literal) > 0 {
			f.pieces = append(f.pieces, piece{literal: string(literal)})
			literal = literal[:0]
		}
	}
	for i := 0; i < len(s); {
		if s[i] != '%' {
			literal = append(literal, s[i])
			i++
			continue
		}
		if strings.HasPrefix(s[i:], "%%") {
			literal = append(literal, '%')
			i += 2
			continue
		}
		quoted := i > 0 && s[i-1] == '"'
		op, n, err := scanOperator(s[i:])
		if err != nil {
			return nil, fmt.Errorf("at offset %d: %w", i, err)
		}
		p, err := op.compile()
		if err != nil {
			return nil, fmt.Errorf("at offset %d: %w", i, err)
		}
		p.quoted = quoted
		flush()
		f.pieces = append(f.pieces, p)
		i += n
	}
	flush()
	return f, nil
}

// operator is %NAME(arg):max% as written.
type operator struct {
	text, name, arg string
	hasArg          bool
	max             int
}

// scanOperator reads the operator at the start of s and returns its length.
func scanOperator(s string) (operator, int, error) {
	i := 1
	for i < len(s) && (s[i] == '_' || 'A' <= s[i] && s[i] <= 'Z' || '0' <= s[i] && s[i] <= '9') {
		i++
	}
	op := operator{name: s[1:i]}
	if op.name == "" {
		return op, 0, fmt.Errorf("%q: a %% must begin a command operator like %%PROTOCOL%%; write %%%% for the character itself", clip(s))
	}
	if i < len(s) && s[i] == '(' {
		end := strings.IndexByte(s[i:], ')')
		if end < 0 {
			return op, 0, fmt.Errorf("%q: the parenthesis is not closed", clip(s))
		}
		op.arg, op.hasArg = s[i+1:i+end], true
		i += end + 1
	}
	if i < len(s) && s[i] == ':' {
		end := i + 1
		for end < len(s) && '0' <= s[end] && s[end] <= '9' {
			end++
		}
		max, err := strconv.Atoi(s[i+1 : end])
		if err != nil || max == 0 {
			return op, 0, fmt.Errorf("%q: the length after the colon must be a positive number", clip(s))
		}
		op.max, i = max, end
	}
	if i >= len(s) || s[i] != '%' {
		return op, 0, fmt.Errorf("%q: the command operator does not end in %%", clip(s))
	}
	op.text = s[:i+1]
	return op, i + 1, nil
}

func clip(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}

func (op *operator) compile() (piece, error) {
	def, ok := operators[op.name]
	if !ok {
		return piece{}, fmt.Errorf("%s: unknown command operator %q", op.text, op.name)
	}
	if op.hasArg && !def.takesArg {
		return piece{}, fmt.Errorf("%s: %s takes no argument", op.text, op.name)
	}
	if !op.hasArg && def.needsArg {
		return piece{}, fmt.Errorf("%s: %s needs an argument", op.text, op.name)
	}
	value, err := def.compile(op.arg)
	if err != nil {
		return piece{}, fmt.Errorf("%s: %w", op.text, err)
	}
	return piece{value: value, max: op.max, number: def.number}, nil
}

// Literal returns the text and true if the format has no operators.
func (f *Format) Literal() (string, bool) {
	switch {
	case len(f.pieces) == 0:
		return "", true
	case len(f.pieces) == 1 && f.pieces[0].value == nil:
		return f.pieces[0].literal, true
	}
	return "", false
}

// Append appends the text that the format gives for r, as it is: for header values, where what is not known is left
// out.
func (f *Format) Append(dst []byte, r *Record) []byte {
	for i := range f.pieces {
		dst, _ = f.pieces[i].append(dst, r, "")
	}
	return dst
}

// AppendText does the same for a line of a text log: what is not known prints as missing, and what a client or server
// could have put into a value to forge a line or a field is escaped.
func (f *Format) AppendText(dst []byte, r *Record, missing string) []byte {
	for i := range f.pieces {
		p := &f.pieces[i]
		at := len(dst)
		dst, _ = p.append(dst, r, missing)
		if p.value != nil {
			dst = escapeText(dst, at, p.quoted)
		}
	}
	return dst
}

func (p *piece) append(dst []byte, r *Record, missing string) (out []byte, known bool) {
	if p.value == nil {
		return append(dst, p.literal...), true
	}
	at := len(dst)
	dst, known = p.value(dst, r)
	if !known {
		return append(dst[:at], missing...), false
	}
	if p.max > 0 && len(dst)-at > p.max {
		dst = dst[:at+p.max]
	}
	return dst, true
}

// escapeText rewrites dst[at:] so that it has no control characters and, if it stands between quotation marks,
// none of those.
func escapeText(dst []byte, at int, quoted bool) []byte {
	for i := at; i < len(dst); i++ {
		if c := dst[i]; c < ' ' || c == 0x7f || quoted && c == '"' {
			return escapeTextFrom(dst, i, quoted)
		}
	}
	return dst
}

func escapeTextFrom(dst []byte, at int, quoted bool) []byte {
	const hex = "0123456789abcdef"
	end := len(dst)
	for i := at; i < end; i++ {
		switch c := dst[i]; {
		case quoted && c == '"':
			dst = append(dst, '\\', '"')
		case c < ' ' || c == 0x7f:
			dst = append(dst, '\\', 'x', hex[c>>4], hex[c&15])
		default:
			dst = append(dst, c)
		}
	}
	n := copy(dst[at:], dst[end:])
	return dst[:at+n]
}
