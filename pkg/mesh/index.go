package mesh

import "net/netip"

// Placeholders for the compiled look-up structures; each gets a file of its own.
type (
	claimIndex   struct{ list []Claim }
	hostIndex    struct{}
	routeIndex   struct{}
	chainMatcher struct{}
)

// Outbound returns the listener that handles an enrolled pod's connection to dst: the one that claims exactly
// this address, else the one that claims its port on every address of the family, else the use_original_dst
// catch-all; nil if there is none.
func (s *Snapshot) Outbound(dst netip.AddrPort) *Listener { return nil }

// Claims lists what the datapath has to do with connections of enrolled pods.
func (s *Snapshot) Claims() []Claim { return s.claims.list }

// Chain returns the filter chain for a connection, Default if none matches (which may be nil).
func (l *Listener) Chain(in *ChainInput) *FilterChain { return l.Default }

// Match returns the route for a request; nil: none (flag NR).
func (rc *RouteConfig) Match(r Request) *Route { return nil }

// Matches says whether the request's header satisfies the matcher.
func (m *HeaderMatcher) Matches(r Request) bool { return false }

// Matches says whether the request's query string satisfies the matcher.
func (p *QueryMatcher) Matches(r Request) bool { return false }

// Matches says whether s satisfies the matcher.
func (m *StringMatcher) Matches(s string) bool { return false }

// PickCluster draws one of the action's clusters. random is the request's Random() as it is: independent bits
// are derived from it here. header looks up a request header (for cluster_header). Nil: the header that names
// the cluster is missing or empty.
func (a *RouteAction) PickCluster(random uint64, header func(string) (string, bool)) *WeightedCluster {
	return nil
}

// PickCluster draws one of the tcp_proxy's clusters.
func (p *TCPProxy) PickCluster(random uint64) *WeightedCluster { return nil }
