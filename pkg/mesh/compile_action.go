package mesh

import (
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
)

const defaultRouteTimeout = 15 * time.Second

func (c *compiler) routeAction(at *path, m *routev3.RouteAction, vh *VirtualHost) *RouteAction {
	a := &RouteAction{
		PrefixRewrite:     m.GetPrefixRewrite(),
		HasPrefixRw:       m.GetPrefixRewrite() != "",
		RegexRewrite:      c.regexRewrite(at.field("regex_rewrite"), m.GetRegexRewrite()),
		AppendXFHost:      m.GetAppendXForwardedHost(),
		Timeout:           c.duration(at.field("timeout"), m.GetTimeout(), defaultRouteTimeout),
		IdleTimeout:       c.optionalDuration(at.field("idle_timeout"), m.GetIdleTimeout()),
		MaxStreamDuration: c.optionalDuration(at.field("max_stream_duration").field("max_stream_duration"), m.GetMaxStreamDuration().GetMaxStreamDuration()),
		Retry:             c.retryPolicy(at.field("retry_policy"), m.GetRetryPolicy()),
		HashPolicy:        hashPolicies(m.GetHashPolicy()),
	}
	if a.Retry == nil {
		a.Retry = vh.Retry // a route's policy replaces the virtual host's as a whole
	}
	if a.HasPrefixRw && m.GetRegexRewrite() != nil {
		c.refuse(at.field("prefix_rewrite"), "cannot be set together with regex_rewrite")
	}
	c.routeClusters(at, m, a)
	c.hostRewrite(at, m, a)
	switch m.GetClusterNotFoundResponseCode() {
	case routev3.RouteAction_SERVICE_UNAVAILABLE:
		a.ClusterNotFoundCode = 503
	case routev3.RouteAction_NOT_FOUND:
		a.ClusterNotFoundCode = 404
	case routev3.RouteAction_INTERNAL_SERVER_ERROR:
		a.ClusterNotFoundCode = 500
	default:
		c.refuse(at.field("cluster_not_found_response_code"), "%d is not known", m.GetClusterNotFoundResponseCode())
	}
	if m.GetPriority() == corev3.RoutingPriority_HIGH {
		a.Priority = 1
	}
	for i, u := range m.GetUpgradeConfigs() {
		if a.Upgrades == nil {
			a.Upgrades = map[string]bool{}
		}
		c.upgrade(at.field("upgrade_configs").at(i), a.Upgrades, u.GetUpgradeType(), boolOr(u.GetEnabled(), true))
	}
	return a
}

func (c *compiler) routeClusters(at *path, m *routev3.RouteAction, a *RouteAction) {
	switch spec := m.GetClusterSpecifier().(type) {
	case *routev3.RouteAction_Cluster:
		a.Clusters = []WeightedCluster{{Name: spec.Cluster, Weight: 1}}
	case *routev3.RouteAction_ClusterHeader:
		a.ClusterHeader = lowerASCII(spec.ClusterHeader)
		a.Clusters = []WeightedCluster{{ClusterHeader: a.ClusterHeader, Weight: 1}}
	case *routev3.RouteAction_WeightedClusters:
		for i, w := range spec.WeightedClusters.GetClusters() {
			a.Clusters = append(a.Clusters, c.weightedCluster(at.field("weighted_clusters").field("clusters").at(i), w))
		}
	case nil:
		c.refuse(at, "cluster, cluster_header or weighted_clusters is needed")
		return
	}
	for i := range a.Clusters {
		a.TotalWeight += uint64(a.Clusters[i].Weight)
	}
	if a.TotalWeight == 0 && len(a.Clusters) > 0 {
		c.refuse(at.field("weighted_clusters"), "every weight is zero")
	}
	if a.TotalWeight > 1<<32-1 {
		c.refuse(at.field("weighted_clusters"), "the weights add up to more than 32 bits")
	}
}

func (c *compiler) weightedCluster(at *path, m *routev3.WeightedCluster_ClusterWeight) WeightedCluster {
	w := WeightedCluster{
		Name:            m.GetName(),
		ClusterHeader:   lowerASCII(m.GetClusterHeader()),
		Weight:          m.GetWeight().GetValue(),
		RequestHeaders:  c.mutations(at, "request", m.GetRequestHeadersToAdd(), m.GetRequestHeadersToRemove()),
		ResponseHeaders: c.mutations(at, "response", m.GetResponseHeadersToAdd(), m.GetResponseHeadersToRemove()),
		HostRewrite:     m.GetHostRewriteLiteral(),
	}
	if (w.Name == "") == (w.ClusterHeader == "") {
		c.refuse(at, "name or cluster_header is needed, and not both")
	}
	c.perFilterConfig(at, m.GetTypedPerFilterConfig())
	return w
}

func (c *compiler) hostRewrite(at *path, m *routev3.RouteAction, a *RouteAction) {
	switch spec := m.GetHostRewriteSpecifier().(type) {
	case *routev3.RouteAction_HostRewriteLiteral:
		a.HostRewrite = spec.HostRewriteLiteral
	case *routev3.RouteAction_AutoHostRewrite:
		a.AutoHostRewrite = spec.AutoHostRewrite.GetValue()
	case *routev3.RouteAction_HostRewriteHeader:
		a.HostRewriteHeader = lowerASCII(spec.HostRewriteHeader)
	case *routev3.RouteAction_HostRewritePathRegex:
		a.HostRewritePath = c.regexRewrite(at.field("host_rewrite_path_regex"), spec.HostRewritePathRegex)
	}
}

// hashPolicies are kept for the day when a cluster can be balanced by them; until then the field is reported as
// ignored and clusters that would need it are refused.
func hashPolicies(list []*routev3.RouteAction_HashPolicy) []HashPolicy {
	var policies []HashPolicy
	for _, m := range list {
		p := HashPolicy{
			Header:   lowerASCII(m.GetHeader().GetHeaderName()),
			Cookie:   m.GetCookie().GetName(),
			SourceIP: m.GetConnectionProperties().GetSourceIp(),
			Query:    m.GetQueryParameter().GetName(),
			Terminal: m.GetTerminal(),
		}
		policies = append(policies, p)
	}
	return policies
}
