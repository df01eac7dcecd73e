package mesh

import (
	"math"
	"strings"
)

// The matchers below follow Envoy's to the letter, odd corners included, because a control plane was tested
// against those: an absent header never satisfies a value matcher, inverted or not; a regular expression has
// to cover the whole value; a query parameter is compared as sent (not percent-decoded) and only its first
// occurrence counts; of a repeated header each value is looked at on its own, as Envoy does since 1.39, and one that
// matches is enough (inverted: none may). They run once per candidate route and request, so none of them allocates.

// Matches says whether s satisfies the matcher.
func (m *StringMatcher) Matches(s string) bool {
	switch m.Kind {
	case StringExact:
		if m.IgnoreCase {
			return equalFold(s, m.Value)
		}
		return s == m.Value
	case StringPrefix:
		return hasPrefix(s, m.Value, m.IgnoreCase)
	case StringSuffix:
		if len(s) < len(m.Value) {
			return false
		}
		tail := s[len(s)-len(m.Value):]
		if m.IgnoreCase {
			return equalFold(tail, m.Value)
		}
		return tail == m.Value
	case StringContains:
		if !m.IgnoreCase {
			return strings.Contains(s, m.Value)
		}
		for i := 0; i+len(m.Value) <= len(s); i++ {
			if equalFold(s[i:i+len(m.Value)], m.Value) {
				return true
			}
		}
		return false
	default:
		return m.Regex.MatchString(s)
	}
}

// Matches says whether the request's header satisfies the matcher.
func (m *HeaderMatcher) Matches(r Request) bool {
	there, matched := false, false
	if value, ok := pseudoHeader(r, m.Name); ok {
		there, matched = value != "", m.matchesValue(value)
	} else {
		for v, i := r.NextHeader(m.Name, 0); i != 0 && !matched; v, i = r.NextHeader(m.Name, i) {
			there, matched = true, m.matchesValue(v)
		}
	}
	if !there {
		if !m.TreatMissingAsEmpty {
			// Only a presence matcher has an opinion on a header that is not there.
			return m.Kind == MatchPresent && m.Present == m.Invert
		}
		matched = m.matchesValue("")
	}
	return matched != m.Invert
}

// matchesValue looks at one value, before inversion.
func (m *HeaderMatcher) matchesValue(value string) bool {
	switch m.Kind {
	case MatchPresent:
		return m.Present
	case MatchString:
		return m.String.Matches(value)
	case MatchRange:
		n, ok := parseInt(value)
		return ok && n >= m.RangeStart && n < m.RangeEnd
	}
	return false
}

// pseudoHeader knows the pseudo headers, by which control planes match method and authority; host is :authority.
func pseudoHeader(r Request, name string) (value string, ok bool) {
	switch name {
	case ":method":
		return r.Method(), true
	case ":path":
		return r.Path(), true
	case ":scheme":
		return r.Scheme(), true
	case ":authority", "host":
		return r.Authority(), true
	}
	return "", false
}

// Matches says whether the request's query string satisfies the matcher.
func (p *QueryMatcher) Matches(r Request) bool {
	value, ok := queryValue(r.Path(), p.Name)
	if p.String == nil {
		return ok == p.Present
	}
	return ok && p.String.Matches(value)
}

// Matches says whether the request's cookie satisfies the matcher. A missing cookie never satisfies it, unless
// inverted.
func (k *CookieMatcher) Matches(r Request) bool {
	value, ok := cookieValue(r, k.Name)
	return (ok && k.String.Matches(value)) != k.Invert
}

// cookieValue finds a cookie; several cookie headers arrive joined.
func cookieValue(r Request, name string) (string, bool) {
	cookies, _ := r.Header("cookie")
	for cookies != "" {
		end := strings.IndexAny(cookies, ";,")
		pair := cookies
		if end < 0 {
			cookies = ""
		} else {
			pair, cookies = cookies[:end], cookies[end+1:]
		}
		key, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if key == name {
			return strings.Trim(value, `"`), true
		}
	}
	return "", false
}

// matches checks everything about a route; path is the request's without query and fragment. Cheap conditions
// come first, but the outcome does not depend on the order.
func (m *RouteMatch) matches(r Request, path string) bool {
	if path == "" && m.Kind != PathConnect {
		return false // a plain CONNECT has no path: only a connect_matcher takes it
	}
	switch m.Kind {
	case PathPrefix:
		if !hasPrefix(path, m.Path, m.IgnoreCase) {
			return false
		}
	case PathExact:
		if len(path) != len(m.Path) || !hasPrefix(path, m.Path, m.IgnoreCase) {
			return false
		}
	case PathSeparatedPrefix:
		if !hasPrefix(path, m.Path, m.IgnoreCase) || len(path) > len(m.Path) && path[len(m.Path)] != '/' {
			return false
		}
	case PathConnect:
		if r.Method() != "CONNECT" {
			return false
		}
	}
	if m.FractionIsSet && !Sampled(r.Random(), m.FractionPPM) {
		return false
	}
	if m.GRPC && !isGRPC(r) {
		return false
	}
	for _, h := range m.Headers {
		if !h.Matches(r) {
			return false
		}
	}
	for _, q := range m.Query {
		if !q.Matches(r) {
			return false
		}
	}
	for _, k := range m.Cookies {
		if !k.Matches(r) {
			return false
		}
	}
	return m.Kind != PathRegex || m.Regex.MatchString(path)
}

// Sampled says whether a request's random draw falls into a fraction given in parts per million. All fractions
// of one request use the same bits, as in Envoy: two routes with 50 % each take the same half.
func Sampled(random uint64, ppm uint32) bool { return random%1_000_000 < uint64(ppm) }

// isGRPC is Envoy's test of content-type: application/grpc, alone or followed by "+".
func isGRPC(r Request) bool {
	const grpc = "application/grpc"
	ct, _ := r.Header("content-type")
	return strings.HasPrefix(ct, grpc) && (len(ct) == len(grpc) || ct[len(grpc)] == '+')
}

// pathOnly cuts the query string and the fragment off.
func pathOnly(path string) string {
	for i := range len(path) {
		if c := path[i]; c == '?' || c == '#' {
			return path[:i]
		}
	}
	return path
}

// queryValue finds the first parameter of that name.
func queryValue(path, name string) (string, bool) {
	_, query, ok := strings.Cut(path, "?")
	if !ok {
		return "", false
	}
	if i := strings.IndexByte(query, '#'); i >= 0 {
		query = query[:i]
	}
	for query != "" {
		var param string
		param, query, _ = strings.Cut(query, "&")
		key, value, _ := strings.Cut(param, "=")
		if key == name {
			return value, true
		}
	}
	return "", false
}

// lower maps one ASCII byte to lower case.
func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// equalFold compares ASCII without regard to case; folded is in lower case already. strings.EqualFold would
// fold Unicode as well, which HTTP does not.
func equalFold(s, folded string) bool {
	if len(s) != len(folded) {
		return false
	}
	for i := range len(s) {
		if lower(s[i]) != folded[i] {
			return false
		}
	}
	return true
}

func hasPrefix(s, prefix string, ignoreCase bool) bool {
	if len(s) < len(prefix) {
		return false
	}
	if ignoreCase {
		return equalFold(s[:len(prefix)], prefix)
	}
	return s[:len(prefix)] == prefix
}

// lowerASCII is strings.ToLower for ASCII alone, so that equalFold's right side is what it expects.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

// parseInt reads a decimal integer as absl::SimpleAtoi does: white space around it and a sign are allowed.
// strconv.ParseInt would allocate its error for every header that is no number.
func parseInt(s string) (int64, bool) {
	s = strings.Trim(s, " \t\n\v\f\r")
	negative := false
	if s != "" && (s[0] == '-' || s[0] == '+') {
		negative = s[0] == '-'
		s = s[1:]
	}
	if s == "" {
		return 0, false
	}
	var n uint64
	for i := range len(s) {
		d := uint64(s[i] - '0')
		if d > 9 || n > (math.MaxUint64-d)/10 {
			return 0, false
		}
		n = n*10 + d
	}
	switch {
	case negative && n <= 1<<63:
		return -int64(n), true
	case !negative && n <= math.MaxInt64:
		return int64(n), true
	}
	return 0, false
}
