package mesh

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// ChainMatch is what a connection has to look like for a filter chain; an empty field does not care. Several
// values of one field are alternatives.
type ChainMatch struct {
	DstPort        uint16 // 0: any
	DstPrefixes    []netip.Prefix
	ServerNames    []string // lower case; "*.example.com" is kept as ".example.com"
	Transport      string
	ALPN           []string
	DirectSrc      []netip.Prefix
	SourceType     SourceType
	SrcPrefixes    []netip.Prefix
	SrcPorts       []uint16
	MatchesNothing bool // a condition that this data plane never meets, so the chain is never chosen
}

// SourceType is FilterChainMatch.source_type.
type SourceType uint8

// Source types.
const (
	SourceAny SourceType = iota
	SourceLocal
	SourceExternal
)

// Envoy's match order. Each stage keeps the chains with the most specific value that fits and forgets the rest:
// there is no way back when a later stage finds nothing. That makes the whole thing a decision tree, built once
// per listener.
const (
	stageDstPort = iota
	stageDstIP
	stageServerName
	stageTransport
	stageALPN
	stageDirectSrc
	stageSourceType
	stageSrcIP
	stageSrcPort
	stages
)

// chainMatcher is one node of the decision tree: a leaf, or one stage's alternatives. Stages about which no
// chain below cares have no node.
type chainMatcher struct {
	leaf *FilterChain

	stage    int
	ports    map[uint16]*chainMatcher
	names    map[string]*chainMatcher // server names (suffixes begin with a dot), transports, protocols
	prefixes []prefixGroup            // longest first
	types    [3]*chainMatcher         // by SourceType
	any      *chainMatcher            // chains that do not care
}

type prefixGroup struct {
	bits  int
	nodes map[netip.Prefix]*chainMatcher
}

// maxChainCombinations bounds the decision tree: a chain with many values in several fields occupies their
// product.
const maxChainCombinations = 1 << 20

// buildChains builds the tree; it fails where two chains match the same connections equally well.
func buildChains(chains []*FilterChain) (*chainMatcher, error) {
	total := 0
	for i, chain := range chains {
		total += chain.Match.combinations()
		if total > maxChainCombinations {
			return nil, &fieldError{fmt.Sprintf("filter_chains[%d].filter_chain_match", i), fmt.Sprintf("more than %d combinations of values", maxChainCombinations)}
		}
	}
	if len(chains) == 0 {
		return nil, nil
	}
	return buildChainNode(0, chains)
}

func (m *ChainMatch) combinations() int {
	n := 1
	for _, values := range []int{len(m.DstPrefixes), len(m.ServerNames), len(m.ALPN), len(m.DirectSrc), len(m.SrcPrefixes), len(m.SrcPorts)} {
		n = min(n*max(values, 1), maxChainCombinations+1)
	}
	return n
}

func buildChainNode(stage int, chains []*FilterChain) (*chainMatcher, error) {
	for stage < stages && !slices.ContainsFunc(chains, func(c *FilterChain) bool { return c.Match.cares(stage) }) {
		stage++
	}
	if stage == stages {
		if len(chains) > 1 {
			return nil, &fieldError{"filter_chains", fmt.Sprintf("%q and %q have overlapping filter_chain_match rules", chains[0].Name, chains[1].Name)}
		}
		return &chainMatcher{leaf: chains[0]}, nil
	}
	node := &chainMatcher{stage: stage}
	ports, names := map[uint16][]*FilterChain{}, map[string][]*FilterChain{}
	prefixes := map[netip.Prefix][]*FilterChain{}
	var types [3][]*FilterChain
	var indifferent []*FilterChain
	for _, c := range chains {
		m := &c.Match
		if !m.cares(stage) {
			indifferent = append(indifferent, c)
			continue
		}
		switch stage {
		case stageDstPort:
			ports[m.DstPort] = append(ports[m.DstPort], c)
		case stageSrcPort:
			group(ports, m.SrcPorts, c)
		case stageDstIP:
			group(prefixes, m.DstPrefixes, c)
		case stageDirectSrc:
			group(prefixes, m.DirectSrc, c)
		case stageSrcIP:
			group(prefixes, m.SrcPrefixes, c)
		case stageServerName:
			group(names, m.ServerNames, c)
		case stageTransport:
			names[m.Transport] = append(names[m.Transport], c)
		case stageALPN:
			group(names, m.ALPN, c)
		case stageSourceType:
			types[m.SourceType] = append(types[m.SourceType], c)
		}
	}
	return node, node.fill(ports, names, prefixes, types, indifferent)
}

// group files c under each of its values, once.
func group[K comparable](table map[K][]*FilterChain, values []K, c *FilterChain) {
	for _, v := range values {
		if list := table[v]; len(list) == 0 || list[len(list)-1] != c {
			table[v] = append(list, c)
		}
	}
}

func (node *chainMatcher) fill(ports map[uint16][]*FilterChain, names map[string][]*FilterChain,
	prefixes map[netip.Prefix][]*FilterChain, types [3][]*FilterChain, indifferent []*FilterChain,
) (err error) {
	if node.ports, err = buildChildren(node.stage, ports); err != nil {
		return err
	}
	if node.names, err = buildChildren(node.stage, names); err != nil {
		return err
	}
	byPrefix, err := buildChildren(node.stage, prefixes)
	if err != nil {
		return err
	}
	groups := map[int]map[netip.Prefix]*chainMatcher{}
	for prefix, child := range byPrefix {
		if groups[prefix.Bits()] == nil {
			groups[prefix.Bits()] = map[netip.Prefix]*chainMatcher{}
		}
		groups[prefix.Bits()][prefix] = child
	}
	for bits, nodes := range groups {
		node.prefixes = append(node.prefixes, prefixGroup{bits, nodes})
	}
	slices.SortFunc(node.prefixes, func(a, b prefixGroup) int { return cmp.Compare(b.bits, a.bits) })
	for i, chains := range types {
		if len(chains) > 0 {
			if node.types[i], err = buildChainNode(node.stage+1, chains); err != nil {
				return err
			}
		}
	}
	if len(indifferent) > 0 {
		node.any, err = buildChainNode(node.stage+1, indifferent)
	}
	return err
}

func buildChildren[K comparable](stage int, table map[K][]*FilterChain) (map[K]*chainMatcher, error) {
	if len(table) == 0 {
		return nil, nil
	}
	nodes := make(map[K]*chainMatcher, len(table))
	for value, chains := range table {
		node, err := buildChainNode(stage+1, chains)
		if err != nil {
			return nil, err
		}
		nodes[value] = node
	}
	return nodes, nil
}

func (m *ChainMatch) cares(stage int) bool {
	switch stage {
	case stageDstPort:
		return m.DstPort != 0
	case stageDstIP:
		return len(m.DstPrefixes) > 0
	case stageServerName:
		return len(m.ServerNames) > 0
	case stageTransport:
		return m.Transport != ""
	case stageALPN:
		return len(m.ALPN) > 0
	case stageDirectSrc:
		return len(m.DirectSrc) > 0
	case stageSourceType:
		return m.SourceType != SourceAny
	case stageSrcIP:
		return len(m.SrcPrefixes) > 0
	default:
		return len(m.SrcPorts) > 0
	}
}

// Chain returns the filter chain for a connection, Default if none matches (which may be nil).
func (l *Listener) Chain(in *ChainInput) *FilterChain {
	for node := l.matcher; node != nil; node = node.next(in) {
		if node.leaf != nil {
			return node.leaf
		}
	}
	return l.Default
}

// next takes one stage's decision; nil is final.
func (node *chainMatcher) next(in *ChainInput) *chainMatcher {
	var found *chainMatcher
	switch node.stage {
	case stageDstPort:
		found = node.ports[in.Dst.Port()]
	case stageSrcPort:
		found = node.ports[in.Src.Port()]
	case stageDstIP:
		found = node.byAddr(in.Dst.Addr())
	case stageDirectSrc:
		found = node.byAddr(in.DirectSrc)
	case stageSrcIP:
		found = node.byAddr(in.Src.Addr())
	case stageServerName:
		found = node.byServerName(in.ServerName)
	case stageTransport:
		found = node.names[in.Transport]
	case stageALPN:
		for _, protocol := range in.ALPN {
			if found = node.names[protocol]; found != nil {
				break
			}
		}
	case stageSourceType:
		if in.SrcIsLocal {
			found = node.types[SourceLocal]
		} else {
			found = node.types[SourceExternal]
		}
	}
	if found == nil {
		return node.any
	}
	return found
}

func (node *chainMatcher) byAddr(addr netip.Addr) *chainMatcher {
	addr = addr.Unmap().WithZone("")
	for i := range node.prefixes {
		group := &node.prefixes[i]
		prefix, err := addr.Prefix(group.bits)
		if err != nil {
			continue // longer than an IPv4 address
		}
		if found := group.nodes[prefix]; found != nil {
			return found
		}
	}
	return nil
}

// byServerName tries the exact name, then the wildcard of each parent domain, nearest first.
func (node *chainMatcher) byServerName(name string) *chainMatcher {
	if name == "" {
		return nil
	}
	if found := node.names[name]; found != nil {
		return found
	}
	for at := 1; at < len(name); at++ {
		dot := strings.IndexByte(name[at:], '.')
		if dot < 0 || at+dot == len(name)-1 {
			return nil
		}
		at += dot
		if found := node.names[name[at:]]; found != nil {
			return found
		}
	}
	return nil
}

// Init builds the look-up tables of a listener. Compile functions do it; code that puts a Listener together by
// hand must.
func (l *Listener) Init() error {
	for i, c := range l.allChains() {
		if c.HTTP != nil {
			// The route name belongs to it: a connection manager that changes to other routes is another one.
			id := c.Name
			if id == "" {
				id = fmt.Sprintf("#%d", i)
			}
			c.HTTP.place = l.Name + "\x00" + id + "\x00" + c.HTTP.RouteConfigName
		}
	}
	matcher, err := buildChains(l.Chains)
	l.matcher = matcher
	return err
}
