package mesh

import (
	"fmt"
	"slices"
	"strings"
)

// hostIndex finds the virtual host of an authority in Envoy's order: exact name, longest suffix wildcard
// (*.example.com), longest prefix wildcard (www.*), "*". Names are compared in lower case.
type hostIndex struct {
	exact    map[string]*VirtualHost
	suffixes []wildcardHosts // longest first
	prefixes []wildcardHosts // longest first
	fallback *VirtualHost
}

// wildcardHosts holds the wildcard domains of one length, without their star.
type wildcardHosts struct {
	length int
	hosts  map[string]*VirtualHost
}

// buildHostIndex fails where two virtual hosts claim the same domain, as Envoy does.
func buildHostIndex(hosts []*VirtualHost) (hostIndex, error) {
	index := hostIndex{exact: map[string]*VirtualHost{}}
	suffixes, prefixes := map[int]map[string]*VirtualHost{}, map[int]map[string]*VirtualHost{}
	for i, host := range hosts {
		for j, raw := range host.Domains {
			domain := lowerASCII(raw)
			var taken bool
			switch {
			case domain == "*":
				taken = index.fallback != nil
				index.fallback = host
			case strings.HasPrefix(domain, "*"):
				taken = !putWildcard(suffixes, domain[1:], host)
			case strings.HasSuffix(domain, "*"):
				taken = !putWildcard(prefixes, domain[:len(domain)-1], host)
			default:
				_, taken = index.exact[domain]
				index.exact[domain] = host
			}
			if taken {
				return hostIndex{}, &fieldError{fmt.Sprintf("virtual_hosts[%d].domains[%d]", i, j), fmt.Sprintf("domain %q is claimed twice", raw)}
			}
		}
	}
	index.suffixes, index.prefixes = longestFirst(suffixes), longestFirst(prefixes)
	return index, nil
}

func putWildcard(table map[int]map[string]*VirtualHost, domain string, host *VirtualHost) bool {
	hosts := table[len(domain)]
	if hosts == nil {
		hosts = map[string]*VirtualHost{}
		table[len(domain)] = hosts
	}
	if _, taken := hosts[domain]; taken {
		return false
	}
	hosts[domain] = host
	return true
}

func longestFirst(table map[int]map[string]*VirtualHost) []wildcardHosts {
	list := make([]wildcardHosts, 0, len(table))
	for length, hosts := range table {
		list = append(list, wildcardHosts{length, hosts})
	}
	slices.SortFunc(list, func(a, b wildcardHosts) int { return b.length - a.length })
	return list
}

// VirtualHost returns the virtual host for the Host header's value; nil if none matches.
func (rc *RouteConfig) VirtualHost(authority string) *VirtualHost {
	index := &rc.hosts
	if len(index.exact) == 0 && len(index.suffixes) == 0 && len(index.prefixes) == 0 || authority == "" {
		return index.fallback
	}
	if rc.IgnorePort {
		authority = authority[:hostLen(authority)]
	}
	// Lower-casing into an array on the stack keeps this free of allocation; a map look-up by string(bytes)
	// does not copy.
	var array [256]byte
	host := array[:0]
	for i := range len(authority) {
		host = append(host, lower(authority[i]))
	}
	if vh, ok := index.exact[string(host)]; ok {
		return vh
	}
	for i := range index.suffixes {
		s := &index.suffixes[i]
		if s.length >= len(host) {
			continue // *.foo.com does not match .foo.com itself
		}
		if vh, ok := s.hosts[string(host[len(host)-s.length:])]; ok {
			return vh
		}
	}
	for i := range index.prefixes {
		p := &index.prefixes[i]
		if p.length >= len(host) {
			continue
		}
		if vh, ok := p.hosts[string(host[:p.length])]; ok {
			return vh
		}
	}
	return index.fallback
}

// hostLen is the length of authority without ":port". An IPv6 literal is in brackets, so a colon before the
// last bracket is not a port's.
func hostLen(authority string) int {
	colon := strings.LastIndexByte(authority, ':')
	if colon < 0 || strings.LastIndexByte(authority, ']') > colon {
		return len(authority)
	}
	return colon
}
