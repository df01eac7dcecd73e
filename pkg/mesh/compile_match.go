package mesh

import (
	"regexp"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
)

// routeMatch compiles the conditions of a route.
func (c *compiler) routeMatch(at *path, m *routev3.RouteMatch) RouteMatch {
	match := RouteMatch{IgnoreCase: !boolOr(m.GetCaseSensitive(), true), GRPC: m.GetGrpc() != nil}
	switch spec := m.GetPathSpecifier().(type) {
	case *routev3.RouteMatch_Prefix:
		match.Kind, match.Path = PathPrefix, spec.Prefix
	case *routev3.RouteMatch_Path:
		match.Kind, match.Path = PathExact, spec.Path
	case *routev3.RouteMatch_PathSeparatedPrefix:
		match.Kind, match.Path = PathSeparatedPrefix, spec.PathSeparatedPrefix
	case *routev3.RouteMatch_SafeRegex:
		match.Kind, match.IgnoreCase = PathRegex, false
		match.Regex = c.wholeRegex(at.field("safe_regex"), spec.SafeRegex)
	case *routev3.RouteMatch_ConnectMatcher_:
		match.Kind = PathConnect
	case nil:
		c.refuse(at, "prefix, path, safe_regex, path_separated_prefix or connect_matcher is needed")
	}
	if match.IgnoreCase {
		match.Path = lowerASCII(match.Path)
	}
	if f := m.GetRuntimeFraction(); f != nil {
		match.FractionIsSet = true
		match.FractionPPM = c.fraction(at.field("runtime_fraction").field("default_value"), f.GetDefaultValue())
	}
	for i, h := range m.GetHeaders() {
		match.Headers = append(match.Headers, c.headerMatcher(at.field("headers").at(i), h))
	}
	for i, q := range m.GetQueryParameters() {
		match.Query = append(match.Query, c.queryMatcher(at.field("query_parameters").at(i), q))
	}
	for i, k := range m.GetCookies() {
		match.Cookies = append(match.Cookies, &CookieMatcher{
			Name: k.GetName(), String: c.stringMatcher(at.field("cookies").at(i).field("string_match"), k.GetStringMatch()), Invert: k.GetInvertMatch(),
		})
	}
	return match
}

func (c *compiler) headerMatcher(at *path, m *routev3.HeaderMatcher) *HeaderMatcher {
	h := &HeaderMatcher{Name: lowerASCII(m.GetName()), Kind: MatchString, Invert: m.GetInvertMatch(), TreatMissingAsEmpty: m.GetTreatMissingHeaderAsEmpty()}
	switch spec := m.GetHeaderMatchSpecifier().(type) {
	case nil:
		h.Kind, h.Present = MatchPresent, true
	case *routev3.HeaderMatcher_PresentMatch:
		h.Kind, h.Present = MatchPresent, spec.PresentMatch
	case *routev3.HeaderMatcher_RangeMatch:
		h.Kind, h.RangeStart, h.RangeEnd = MatchRange, spec.RangeMatch.GetStart(), spec.RangeMatch.GetEnd()
	case *routev3.HeaderMatcher_ExactMatch:
		h.String = &StringMatcher{Kind: StringExact, Value: spec.ExactMatch}
		if spec.ExactMatch == "" {
			h.String.Kind = StringPrefix // Envoy: the deprecated field with an empty value matches every value
		}
	case *routev3.HeaderMatcher_PrefixMatch:
		h.String = &StringMatcher{Kind: StringPrefix, Value: spec.PrefixMatch}
	case *routev3.HeaderMatcher_SuffixMatch:
		h.String = &StringMatcher{Kind: StringSuffix, Value: spec.SuffixMatch}
	case *routev3.HeaderMatcher_ContainsMatch:
		h.String = &StringMatcher{Kind: StringContains, Value: spec.ContainsMatch}
	case *routev3.HeaderMatcher_SafeRegexMatch:
		h.String = &StringMatcher{Kind: StringRegex, Regex: c.wholeRegex(at.field("safe_regex_match"), spec.SafeRegexMatch)}
	case *routev3.HeaderMatcher_StringMatch:
		h.String = c.stringMatcher(at.field("string_match"), spec.StringMatch)
	}
	return h
}

func (c *compiler) queryMatcher(at *path, m *routev3.QueryParameterMatcher) *QueryMatcher {
	q := &QueryMatcher{Name: m.GetName(), Present: true}
	switch spec := m.GetQueryParameterMatchSpecifier().(type) {
	case *routev3.QueryParameterMatcher_PresentMatch:
		q.Present = spec.PresentMatch
	case *routev3.QueryParameterMatcher_StringMatch:
		q.String = c.stringMatcher(at.field("string_match"), spec.StringMatch)
	}
	return q
}

func (c *compiler) stringMatcher(at *path, m *matcherv3.StringMatcher) *StringMatcher {
	s := &StringMatcher{IgnoreCase: m.GetIgnoreCase()}
	switch spec := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		s.Kind, s.Value = StringExact, spec.Exact
	case *matcherv3.StringMatcher_Prefix:
		s.Kind, s.Value = StringPrefix, spec.Prefix
	case *matcherv3.StringMatcher_Suffix:
		s.Kind, s.Value = StringSuffix, spec.Suffix
	case *matcherv3.StringMatcher_Contains:
		s.Kind, s.Value = StringContains, spec.Contains
	case *matcherv3.StringMatcher_SafeRegex:
		if s.IgnoreCase {
			c.refuse(at.field("ignore_case"), "has no effect on safe_regex; write (?i) into the expression")
		}
		s.Kind, s.IgnoreCase, s.Regex = StringRegex, false, c.wholeRegex(at.field("safe_regex"), spec.SafeRegex)
	case nil:
		c.refuse(at, "exact, prefix, suffix, contains or safe_regex is needed")
	}
	if s.IgnoreCase {
		s.Value = lowerASCII(s.Value)
	}
	return s
}

// maxRegexLength bounds what one expression may cost to compile.
const maxRegexLength = 16 << 10

// regex compiles an RE2 expression. Go's dialect is RE2's; the expression is compiled alone before it is put
// into anything, so that it cannot break out.
func (c *compiler) regex(at *path, m *matcherv3.RegexMatcher) *regexp.Regexp {
	if len(m.GetRegex()) > maxRegexLength {
		c.refuse(at.field("regex"), "longer than %d bytes", maxRegexLength)
		return nil
	}
	re, err := regexp.Compile(m.GetRegex())
	if err != nil {
		c.refuse(at.field("regex"), "%v", err)
		return nil
	}
	return re
}

// wholeRegex compiles an expression that has to match the whole value.
func (c *compiler) wholeRegex(at *path, m *matcherv3.RegexMatcher) *regexp.Regexp {
	if c.regex(at, m) == nil {
		return nil
	}
	return regexp.MustCompile(`\A(?:` + m.GetRegex() + `)\z`)
}

// regexRewrite turns Envoy's \1 references into Go's ${1}.
func (c *compiler) regexRewrite(at *path, m *matcherv3.RegexMatchAndSubstitute) *RegexRewrite {
	if m == nil {
		return nil
	}
	re := c.regex(at.field("pattern"), m.GetPattern())
	if re == nil {
		return nil
	}
	var b strings.Builder
	s := m.GetSubstitution()
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '$':
			b.WriteString("$$")
		case s[i] != '\\':
			b.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == '\\':
			b.WriteByte('\\')
			i++
		case i+1 < len(s) && '0' <= s[i+1] && s[i+1] <= '9':
			i++
			if int(s[i]-'0') > re.NumSubexp() {
				c.refuse(at.field("substitution"), `\%c: the pattern has %d groups`, s[i], re.NumSubexp())
			}
			b.WriteString("${" + s[i:i+1] + "}")
		default:
			c.refuse(at.field("substitution"), `a backslash must be followed by a digit or a backslash`)
		}
	}
	return &RegexRewrite{Regex: re, Substitution: b.String()}
}

// fraction is a FractionalPercent in parts per million.
func (c *compiler) fraction(at *path, m *typev3.FractionalPercent) uint32 {
	per := uint64(10_000)
	switch m.GetDenominator() {
	case typev3.FractionalPercent_HUNDRED:
	case typev3.FractionalPercent_TEN_THOUSAND:
		per = 100
	case typev3.FractionalPercent_MILLION:
		per = 1
	default:
		c.refuse(at.field("denominator"), "%d is not known", m.GetDenominator())
	}
	return uint32(min(uint64(m.GetNumerator())*per, 1_000_000))
}

// mutations compiles header additions and removals of one level.
func (c *compiler) mutations(at *path, side string, add []*corev3.HeaderValueOption, remove []string) HeaderMutations {
	var m HeaderMutations
	for i, name := range remove {
		name = lowerASCII(name)
		c.mutable(at.field(side+"_headers_to_remove").at(i), name)
		m.Remove = append(m.Remove, name)
	}
	for i, o := range add {
		here := at.field(side + "_headers_to_add").at(i)
		value := o.GetHeader().GetValue()
		if value == "" {
			value = string(o.GetHeader().GetRawValue())
		}
		h := HeaderAdd{
			Name: lowerASCII(o.GetHeader().GetKey()), Value: value, Literal: !strings.Contains(value, "%"),
			Action: AppendAction(o.GetAppendAction()), KeepEmpty: o.GetKeepEmptyValue(),
		}
		if o.GetAppend() != nil {
			if h.Action != AppendOrAdd {
				c.refuse(here.field("append"), "cannot be set together with append_action")
			}
			if !o.GetAppend().GetValue() {
				h.Action = OverwriteOrAdd
			}
		}
		c.mutable(here.field("header").field("key"), h.Name)
		if strings.ContainsAny(value, "\r\n\x00") {
			c.refuse(here.field("header").field("value"), "contains a line break or NUL")
		}
		if !h.Literal {
			if err := formatChecks.Value(value); err != nil {
				c.refuse(here.field("header").field("value"), "%v", err)
			}
		}
		m.Add = append(m.Add, h)
	}
	return m
}

func (c *compiler) mutable(at *path, name string) {
	switch {
	case name == "":
		c.refuse(at, "must not be empty")
	case name[0] == ':' || name == "host":
		c.refuse(at, "%q cannot be changed here; use the route's rewrites", name)
	}
}

// retryOn parses a comma-separated list of conditions. gRPC's are about a protocol that is not spoken yet.
func (c *compiler) retryOn(at *path, list string) RetryOn {
	var on RetryOn
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		if bit, known := retryConditions[name]; known {
			on |= bit
		} else if name != "" {
			c.warn(at.key(name))
		}
	}
	return on
}

var retryConditions = map[string]RetryOn{
	"5xx": Retry5xx, "gateway-error": RetryGatewayError, "reset": RetryReset,
	"reset-before-request": RetryResetBeforeRequest, "connect-failure": RetryConnectFailure,
	"envoy-ratelimited": RetryEnvoyRateLimited, "retriable-4xx": RetryRetriable4xx,
	"refused-stream": RetryRefusedStream, "retriable-status-codes": RetryRetriableStatusCodes,
	"retriable-headers": RetryRetriableHeaders, "http3-post-connect-failure": RetryHTTP3PostConnectFailure,
}

// ParseRetryOn reads the value of x-envoy-retry-on; conditions that are not known are left out, as Envoy does.
func ParseRetryOn(list string) RetryOn { return (&compiler{}).retryOn(nil, list) }

func (c *compiler) retryPolicy(at *path, m *routev3.RetryPolicy) *RetryPolicy {
	if m == nil {
		return nil
	}
	p := &RetryPolicy{
		On:                c.retryOn(at.field("retry_on"), m.GetRetryOn()),
		Retries:           uint32Or(m.GetNumRetries(), 1),
		PerTryTimeout:     c.duration(at.field("per_try_timeout"), m.GetPerTryTimeout(), 0),
		PerTryIdleTimeout: c.duration(at.field("per_try_idle_timeout"), m.GetPerTryIdleTimeout(), 0),
		HostAttempts:      max(int(m.GetHostSelectionRetryMaxAttempts()), 1),
	}
	for _, code := range m.GetRetriableStatusCodes() {
		p.StatusCodes = append(p.StatusCodes, int(code))
	}
	for i, h := range m.GetRetriableHeaders() {
		p.RetriableHeaders = append(p.RetriableHeaders, c.headerMatcher(at.field("retriable_headers").at(i), h))
	}
	for i, predicate := range m.GetRetryHostPredicate() {
		if !strings.Contains(predicate.GetName()+typeName(predicate.GetTypedConfig()), "previous_hosts") {
			c.refuse(at.field("retry_host_predicate").at(i), "%q is not supported, only previous_hosts", predicate.GetName())
		}
		p.PreviousHosts = true
	}
	backOff := at.field("retry_back_off")
	p.BackOffBase = max(c.duration(backOff.field("base_interval"), m.GetRetryBackOff().GetBaseInterval(), 25*time.Millisecond), time.Millisecond)
	p.BackOffMax = c.duration(backOff.field("max_interval"), m.GetRetryBackOff().GetMaxInterval(), 10*p.BackOffBase)
	if p.BackOffMax < p.BackOffBase {
		c.refuse(backOff.field("max_interval"), "is below base_interval")
	}
	return p
}
