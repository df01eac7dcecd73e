package mesh

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// request is a Request of plain values.
type request struct {
	authority, path, method string
	headers                 map[string]string
	random                  uint64
}

func (r *request) Authority() string { return r.authority }
func (r *request) Path() string      { return r.path }
func (r *request) Method() string    { return r.method }
func (r *request) Scheme() string    { return "http" }
func (r *request) Random() uint64    { return r.random }
func (r *request) Header(name string) (string, bool) {
	v, ok := r.headers[name]
	return v, ok
}

// NextHeader takes a line feed in the value for the border between two fields.
func (r *request) NextHeader(name string, from int) (string, int) {
	v, ok := r.headers[name]
	if !ok || from > len(v) {
		return "", 0
	}
	value, _, _ := strings.Cut(v[from:], "\n")
	return value, from + len(value) + 1
}

func TestHeaderMatcherAgreesWithEnvoy(t *testing.T) {
	exact := func(v string) *StringMatcher { return &StringMatcher{Kind: StringExact, Value: v} }
	tests := []struct {
		name    string
		matcher HeaderMatcher
		value   string // "-" means absent
		want    bool
	}{
		{"exact", HeaderMatcher{Kind: MatchString, String: exact("v")}, "v", true},
		{"exact is case-sensitive", HeaderMatcher{Kind: MatchString, String: exact("v")}, "V", false},
		{"inverted", HeaderMatcher{Kind: MatchString, String: exact("v"), Invert: true}, "w", true},
		{"absent never satisfies a value matcher", HeaderMatcher{Kind: MatchString, String: exact("v")}, "-", false},
		{"not even inverted", HeaderMatcher{Kind: MatchString, String: exact("v"), Invert: true}, "-", false},
		{"unless missing is empty", HeaderMatcher{Kind: MatchString, String: exact("v"), Invert: true, TreatMissingAsEmpty: true}, "-", true},
		{"present", HeaderMatcher{Kind: MatchPresent, Present: true}, "", true},
		{"present absent", HeaderMatcher{Kind: MatchPresent, Present: true}, "-", false},
		{"present inverted absent", HeaderMatcher{Kind: MatchPresent, Present: true, Invert: true}, "-", true},
		{"present false absent", HeaderMatcher{Kind: MatchPresent}, "-", true},
		{"present false there", HeaderMatcher{Kind: MatchPresent}, "x", false},
		{"range start is in", HeaderMatcher{Kind: MatchRange, RangeStart: -10, RangeEnd: 0}, "-10", true},
		{"range end is out", HeaderMatcher{Kind: MatchRange, RangeStart: -10, RangeEnd: 0}, "0", false},
		{"range not a number", HeaderMatcher{Kind: MatchRange, RangeEnd: 9}, "1x", false},
		{"range not a number inverted", HeaderMatcher{Kind: MatchRange, RangeEnd: 9, Invert: true}, "1x", true},
		{"range missing as empty inverted", HeaderMatcher{Kind: MatchRange, RangeEnd: 9, Invert: true, TreatMissingAsEmpty: true}, "-", true},
		{"regex whole value", HeaderMatcher{Kind: MatchString, String: &StringMatcher{Kind: StringRegex, Regex: regexp.MustCompile(`^(?s:\d{3})$`)}}, "123", true},
		{"contains ignoring case", HeaderMatcher{Kind: MatchString, String: &StringMatcher{Kind: StringContains, Value: "can", IgnoreCase: true}}, "a CANary", true},
		{"suffix", HeaderMatcher{Kind: MatchString, String: &StringMatcher{Kind: StringSuffix, Value: "ry"}}, "canary", true},
		{"suffix longer than value", HeaderMatcher{Kind: MatchString, String: &StringMatcher{Kind: StringSuffix, Value: "canary"}}, "ry", false},
		{"one of several values is enough", HeaderMatcher{Kind: MatchString, String: exact("v")}, "u\nv", true},
		{"several values are not joined", HeaderMatcher{Kind: MatchString, String: exact("u,v")}, "u\nv", false},
		{"a list in one field is not split", HeaderMatcher{Kind: MatchString, String: exact("v")}, "u,v", false},
		{"inverted, none of several may match", HeaderMatcher{Kind: MatchString, String: exact("v"), Invert: true}, "u\nv", false},
		{"one of several in range", HeaderMatcher{Kind: MatchRange, RangeEnd: 9}, "12\n3", true},
		{"prefix ignoring case", HeaderMatcher{Kind: MatchString, String: &StringMatcher{Kind: StringPrefix, Value: "ca", IgnoreCase: true}}, "CAnary", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := &request{headers: map[string]string{}}
			tt.matcher.Name = "x"
			if tt.value != "-" {
				r.headers["x"] = tt.value
			}
			if got := tt.matcher.Matches(r); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestHeaderMatchersKnowPseudoHeaders(t *testing.T) {
	r := &request{authority: "a.example", path: "/p?q", method: "PUT", headers: map[string]string{}}
	for name, value := range map[string]string{":method": "PUT", ":path": "/p?q", ":authority": "a.example", "host": "a.example", ":scheme": "http"} {
		m := HeaderMatcher{Name: name, Kind: MatchString, String: &StringMatcher{Value: value}}
		if !m.Matches(r) {
			t.Errorf("%s does not match", name)
		}
	}
}

func TestQueryMatcherComparesTheFirstOccurrenceAsSent(t *testing.T) {
	value := func(v string) *StringMatcher { return &StringMatcher{Kind: StringExact, Value: v} }
	tests := []struct {
		path    string
		matcher QueryMatcher
		want    bool
	}{
		{"/?a=1&a=2", QueryMatcher{Name: "a", String: value("1")}, true},
		{"/?a=1&a=2", QueryMatcher{Name: "a", String: value("2")}, false},
		{"/?a=%31", QueryMatcher{Name: "a", String: value("1")}, false},
		{"/?b&a", QueryMatcher{Name: "a", Present: true}, true},
		{"/?b&a", QueryMatcher{Name: "a", String: value("")}, true},
		{"/a=1", QueryMatcher{Name: "a", Present: true}, false},
		{"/a=1", QueryMatcher{Name: "a"}, true},
		{"/?a=x=y#f", QueryMatcher{Name: "a", String: value("x=y")}, true},
	}
	for _, tt := range tests {
		if got := tt.matcher.Matches(&request{path: tt.path}); got != tt.want {
			t.Errorf("%s %+v: got %v", tt.path, tt.matcher, got)
		}
	}
}

func TestHostOrderIsExactThenSuffixThenPrefixThenStar(t *testing.T) {
	rc := &RouteConfig{}
	for _, domain := range []string{"www.example.com", "*.example.com", "*.com", "www.*", "www.example.*", "*", "[::1]:8080", "plain:80"} {
		rc.Hosts = append(rc.Hosts, &VirtualHost{Name: domain, Domains: []string{domain}})
	}
	if err := rc.Init(); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"www.example.com": "www.example.com", "WWW.Example.COM": "www.example.com", "a.example.com": "*.example.com",
		".example.com": "*.com", "a.com": "*.com", "www.example.org": "www.example.*", "www.org": "www.*",
		"www.": "*", "": "*", "other": "*", "[::1]:8080": "[::1]:8080", "[::1]": "*", "plain": "*", "plain:80": "plain:80",
	} {
		if got := rc.VirtualHost(host); got.Name != want {
			t.Errorf("%q: got %s, want %s", host, got.Name, want)
		}
	}
	rc.IgnorePort = true
	for host, want := range map[string]string{"www.example.com:81": "www.example.com", "plain:80": "*", "[::2]:1": "*"} {
		if got := rc.VirtualHost(host); got.Name != want {
			t.Errorf("port ignored, %q: got %s, want %s", host, got.Name, want)
		}
	}
	rc.Hosts = append(rc.Hosts, &VirtualHost{Domains: []string{"*.COM"}})
	if err := rc.Init(); err == nil || !strings.Contains(err.Error(), "virtual_hosts[8].domains[0]") {
		t.Errorf("duplicate domain: %v", err)
	}
}

// randomRoutes makes tables in which prefixes nest, repeat and collide with exact paths.
func randomRoutes(rng *rand.Rand, n int) []*Route {
	words := []string{"a", "b", "ab", "A", "long", "lo", "x.y", ""}
	path := func() string {
		var p strings.Builder
		for range 1 + rng.IntN(4) {
			p.WriteString("/" + words[rng.IntN(len(words))])
		}
		return p.String()
	}
	routes := make([]*Route, n)
	for i := range routes {
		m := RouteMatch{Kind: PathKind(rng.IntN(5)), Path: path(), IgnoreCase: rng.IntN(4) == 0}
		if m.Kind == PathRegex {
			m.Regex = regexp.MustCompile("^(?:" + regexp.QuoteMeta(m.Path) + ".*)$")
		}
		if m.IgnoreCase {
			m.Path = lowerASCII(m.Path)
		}
		if rng.IntN(2) == 0 {
			m.Headers = []*HeaderMatcher{{Name: "h", Kind: MatchString, String: &StringMatcher{Value: fmt.Sprint(rng.IntN(3))}}}
		}
		if rng.IntN(4) == 0 {
			m.FractionIsSet, m.FractionPPM = true, 500_000
		}
		routes[i] = &Route{Name: fmt.Sprint(i), Match: m}
	}
	return routes
}

func TestRouteIndexEqualsTheLinearScan(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	matched := 0
	for range 300 {
		routes := randomRoutes(rng, 9+rng.IntN(60))
		rc := &RouteConfig{Hosts: []*VirtualHost{{Domains: []string{"*"}, Routes: routes}}}
		if err := rc.Init(); err != nil {
			t.Fatal(err)
		}
		for range 200 {
			r := &request{path: randomRoutes(rng, 1)[0].Match.Path, random: rng.Uint64(), headers: map[string]string{"h": fmt.Sprint(rng.IntN(3))}}
			switch rng.IntN(8) {
			case 0:
				r.path += "?q=/b"
			case 1:
				r.path = strings.ToUpper(r.path)
			case 2:
				r.method = "CONNECT"
			case 3:
				r.path = strings.Repeat("/a", 20)
			}
			var want *Route
			for _, route := range routes {
				if route.Match.matches(r, pathOnly(r.path)) {
					want = route
					break
				}
			}
			if got := rc.Match(r); got != want {
				t.Fatalf("%+v: got %+v, want %+v", r, got, want)
			}
			if want != nil {
				matched++
			}
		}
	}
	if matched < 1000 {
		t.Errorf("only %d requests matched: the tables are too thin to prove anything", matched)
	}
}

// naiveChain is Envoy's algorithm in prose: stage by stage, keep the chains with the most specific fitting value.
func naiveChain(l *Listener, in *ChainInput) *FilterChain {
	left := slices.Clone(l.Chains)
	prefixLen := func(prefixes []netip.Prefix, a netip.Addr) int {
		best := -1
		for _, p := range prefixes {
			if p.Contains(a) && p.Bits() > best {
				best = p.Bits()
			}
		}
		return best
	}
	rank := func(stage int, m *ChainMatch) int { // -1: does not fit, 0: indifferent, more: more specific
		if !m.cares(stage) {
			return 0
		}
		score := -2
		switch stage {
		case stageDstPort:
			if m.DstPort == in.Dst.Port() {
				score = 1
			}
		case stageDstIP:
			score = prefixLen(m.DstPrefixes, in.Dst.Addr())
		case stageDirectSrc:
			score = prefixLen(m.DirectSrc, in.DirectSrc)
		case stageSrcIP:
			score = prefixLen(m.SrcPrefixes, in.Src.Addr())
		case stageServerName:
			for _, n := range m.ServerNames {
				if n == in.ServerName {
					score = 1000
				} else if n[0] == '.' && strings.HasSuffix(in.ServerName, n) && len(in.ServerName) > len(n) {
					score = max(score, len(n))
				}
			}
		case stageTransport:
			if m.Transport == in.Transport {
				score = 1
			}
		case stageALPN:
			for i, p := range in.ALPN {
				if slices.Contains(m.ALPN, p) {
					score = max(score, 100-i)
				}
			}
		case stageSourceType:
			if (m.SourceType == SourceLocal) == in.SrcIsLocal {
				score = 1
			}
		case stageSrcPort:
			if slices.Contains(m.SrcPorts, in.Src.Port()) {
				score = 1
			}
		}
		if score < 0 {
			return -1
		}
		return score + 1
	}
	for stage := range stages {
		best := -1
		for _, c := range left {
			best = max(best, rank(stage, &c.Match))
		}
		if best < 0 {
			return l.Default
		}
		left = slices.DeleteFunc(left, func(c *FilterChain) bool { return rank(stage, &c.Match) != best })
	}
	if len(left) == 0 {
		return l.Default
	}
	return left[0]
}

func TestFilterChainsMatchStageByStageWithoutBacktracking(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	prefixes := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.1.2.3/32"), netip.MustParsePrefix("fd00::/8")}
	addrs := []string{"10.1.2.3", "10.1.9.9", "10.9.9.9", "fd00::1", "192.0.2.1"}
	names := []string{"a.example.com", ".example.com", ".com", "b.org"}
	some := func(n int) bool { return rng.IntN(n) == 0 }
	listeners, chosen := 0, 0
	for range 3000 {
		l := &Listener{Default: &FilterChain{Name: "default"}}
		for i := range 1 + rng.IntN(6) {
			m := ChainMatch{}
			if some(3) {
				m.DstPort = uint16(80 + rng.IntN(2))
			}
			if some(2) {
				m.DstPrefixes = []netip.Prefix{prefixes[rng.IntN(4)], prefixes[rng.IntN(4)]}
			}
			if some(3) {
				m.ServerNames = []string{names[rng.IntN(4)]}
			}
			if some(3) {
				m.Transport = []string{"tls", "raw_buffer"}[rng.IntN(2)]
			}
			if some(4) {
				m.ALPN = []string{[]string{"h2", "http/1.1"}[rng.IntN(2)]}
			}
			if some(4) {
				m.SourceType = SourceType(1 + rng.IntN(2))
			}
			if some(4) {
				m.SrcPrefixes = []netip.Prefix{prefixes[rng.IntN(4)]}
			}
			if some(4) {
				m.SrcPorts = []uint16{uint16(1 + rng.IntN(2))}
			}
			l.Chains = append(l.Chains, &FilterChain{Name: fmt.Sprint(i), Match: m})
		}
		if l.Init() != nil {
			continue // overlapping rules
		}
		listeners++
		for range 30 {
			in := &ChainInput{
				Dst:        netip.AddrPortFrom(netip.MustParseAddr(addrs[rng.IntN(5)]), uint16(80+rng.IntN(3))),
				Src:        netip.AddrPortFrom(netip.MustParseAddr(addrs[rng.IntN(5)]), uint16(1+rng.IntN(3))),
				ServerName: []string{"", "a.example.com", "x.y.example.com", "b.org", "example.com"}[rng.IntN(5)],
				Transport:  []string{"tls", "raw_buffer"}[rng.IntN(2)],
				ALPN:       [][]string{nil, {"h2", "http/1.1"}, {"http/1.1"}}[rng.IntN(3)],
				SrcIsLocal: some(2),
			}
			in.DirectSrc = in.Src.Addr()
			got, want := l.Chain(in), naiveChain(l, in)
			if got != want {
				t.Fatalf("%+v: got %+v, want %+v", in, got, want)
			}
			if got != l.Default {
				chosen++
			}
		}
	}
	if listeners < 500 || chosen < 1000 {
		t.Errorf("%d listeners, %d chosen chains: too few to prove anything", listeners, chosen)
	}
}

func TestOverlappingFilterChainsAreRefused(t *testing.T) {
	net := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	l := &Listener{Chains: []*FilterChain{
		{Name: "one", Match: ChainMatch{DstPrefixes: net}}, {Name: "two", Match: ChainMatch{DstPrefixes: net}},
	}}
	if err := l.Init(); err == nil || !strings.Contains(err.Error(), `"one" and "two"`) {
		t.Errorf("got %v", err)
	}
}

func TestMatchingDoesNotAllocate(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	rc := &RouteConfig{IgnorePort: true, Hosts: []*VirtualHost{
		{Domains: []string{"*.example.com", "exact.example.com", "www.*"}, Routes: randomRoutes(rng, 100)},
	}}
	rc.Hosts[0].Routes = append(rc.Hosts[0].Routes, &Route{
		Match:  RouteMatch{Path: "/zz", GRPC: true, Query: []*QueryMatcher{{Name: "q", String: &StringMatcher{Kind: StringContains, Value: "v", IgnoreCase: true}}}},
		Action: &RouteAction{Clusters: []WeightedCluster{{Name: "a", Weight: 1}, {Name: "b", Weight: 9}}, TotalWeight: 10},
	})
	l := &Listener{Chains: []*FilterChain{
		{Name: "1", Match: ChainMatch{DstPrefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, ServerNames: []string{".example.com"}}},
		{Name: "2", Match: ChainMatch{DstPort: 81}},
	}}
	if rc.Init() != nil || l.Init() != nil {
		t.Fatal("Init")
	}
	s := NewSnapshot(1, []*Listener{l}, nil)
	r := &request{authority: "A.Example.com:80", path: "/zz/1?p&q=aV", headers: map[string]string{"content-type": "application/grpc+proto", "h": "9"}}
	in := &ChainInput{Dst: netip.MustParseAddrPort("10.0.0.1:80"), ServerName: "a.b.example.com"}
	header := func(string) (string, bool) { return "", false }
	allocs := testing.AllocsPerRun(100, func() {
		if route := rc.Match(r); route == nil || route.Action.PickCluster(r.random, header) == nil {
			t.Error("no route")
		}
		if l.Chain(in) == nil {
			t.Error("no chain")
		}
		s.Outbound(in.Dst)
	})
	if allocs != 0 {
		t.Errorf("%v allocations per match", allocs)
	}
}

func TestWeightedPicksFollowTheirWeightsIndependentlyOfTheFraction(t *testing.T) {
	a := &RouteAction{Clusters: []WeightedCluster{{Name: "v1", Weight: 90}, {Name: "v2", Weight: 10}, {Name: "off"}}, TotalWeight: 100}
	rng := rand.New(rand.NewPCG(7, 8))
	counts, sampled := map[string]int{}, map[string]int{}
	for range 100_000 {
		random := rng.Uint64()
		name := a.PickCluster(random, nil).Name
		counts[name]++
		if Sampled(random, 100_000) {
			sampled[name]++
		}
	}
	if counts["off"] != 0 || counts["v2"] < 9_500 || counts["v2"] > 10_500 {
		t.Errorf("picks: %v", counts)
	}
	if sampled["v2"] < 850 || sampled["v2"] > 1_150 {
		t.Errorf("among the sampled tenth: %v", sampled)
	}
	if (&RouteAction{Clusters: []WeightedCluster{{ClusterHeader: "x"}}}).PickCluster(1, func(string) (string, bool) { return "", false }) != nil {
		t.Error("a missing cluster_header picks nothing")
	}
}
