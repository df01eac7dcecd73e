// Package describe turns the compiled configuration into the words and rows that people read: what a route
// matches, where it goes, what a listener is. Pure functions from mesh and service values to api values.
//
// Words follow Envoy's field names, so that what is read here can be found in the configuration.
package describe

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Match says what a route matches: `prefix "/api", header x-canary exact "always"`.
func Match(m *mesh.RouteMatch) string {
	parts := []string{Path(m)}
	for _, h := range m.Headers {
		parts = append(parts, "header "+Header(h))
	}
	for _, q := range m.Query {
		parts = append(parts, "query "+Query(q))
	}
	if m.GRPC {
		parts = append(parts, "grpc")
	}
	if m.FractionIsSet {
		parts = append(parts, fmt.Sprintf("runtime_fraction %s", ppm(m.FractionPPM)))
	}
	return strings.Join(parts, ", ")
}

// Path is the path part of a route's match.
func Path(m *mesh.RouteMatch) string {
	fold := ""
	if m.IgnoreCase {
		fold = ", any case"
	}
	switch m.Kind {
	case mesh.PathPrefix:
		return fmt.Sprintf("prefix %q%s", m.Path, fold)
	case mesh.PathExact:
		return fmt.Sprintf("path %q%s", m.Path, fold)
	case mesh.PathSeparatedPrefix:
		return fmt.Sprintf("path_separated_prefix %q%s", m.Path, fold)
	case mesh.PathRegex:
		return fmt.Sprintf("safe_regex %q", m.Regex)
	case mesh.PathConnect:
		return "connect_matcher"
	}
	return "?"
}

// Header says what a header matcher asks for.
func Header(h *mesh.HeaderMatcher) string {
	not := ""
	if h.Invert {
		not = "not "
	}
	switch h.Kind {
	case mesh.MatchPresent:
		if h.Present != h.Invert {
			return h.Name + " present"
		}
		return h.Name + " absent"
	case mesh.MatchRange:
		return fmt.Sprintf("%s %sin [%d, %d)", h.Name, not, h.RangeStart, h.RangeEnd)
	}
	return fmt.Sprintf("%s %s%s", h.Name, not, stringMatch(h.String))
}

// Query says what a query parameter matcher asks for.
func Query(q *mesh.QueryMatcher) string {
	if q.String != nil {
		return q.Name + " " + stringMatch(q.String)
	}
	if q.Present {
		return q.Name + " present"
	}
	return q.Name + " absent"
}

func stringMatch(m *mesh.StringMatcher) string {
	fold := ""
	if m.IgnoreCase {
		fold = ", any case"
	}
	switch m.Kind {
	case mesh.StringExact:
		return fmt.Sprintf("exact %q%s", m.Value, fold)
	case mesh.StringPrefix:
		return fmt.Sprintf("prefix %q%s", m.Value, fold)
	case mesh.StringSuffix:
		return fmt.Sprintf("suffix %q%s", m.Value, fold)
	case mesh.StringContains:
		return fmt.Sprintf("contains %q%s", m.Value, fold)
	case mesh.StringRegex:
		return fmt.Sprintf("safe_regex %q", m.Regex)
	}
	return "?"
}

// Action says where a route goes: `cluster web-v1`, `90% web-v1, 10% web-v2`, `redirect 301 to https://…`.
func Action(r *mesh.Route) string {
	switch {
	case r.Direct != nil:
		return fmt.Sprintf("direct_response %d (%d bytes)", r.Direct.Status, len(r.Direct.Body))
	case r.Redirect != nil:
		return redirect(r.Redirect)
	case r.Action != nil:
		return Targets(r.Action.Clusters, r.Action.TotalWeight) + rewrites(r.Action)
	}
	return "none"
}

// Targets says over which clusters traffic is split.
func Targets(clusters []mesh.WeightedCluster, total uint64) string {
	names := make([]string, 0, len(clusters))
	for i := range clusters {
		w := &clusters[i]
		name := w.Name
		if w.ClusterHeader != "" {
			name = "named by header " + w.ClusterHeader
		}
		if len(clusters) == 1 {
			return "cluster " + name
		}
		names = append(names, Percent(Share(w, total))+" "+name)
	}
	return strings.Join(names, ", ")
}

// Share is a weighted cluster's part of the traffic, 0 to 100.
func Share(w *mesh.WeightedCluster, total uint64) float64 {
	if total == 0 {
		return 0
	}
	return float64(w.Weight) * 100 / float64(total)
}

func rewrites(a *mesh.RouteAction) string {
	var parts []string
	if a.HasPrefixRw {
		parts = append(parts, fmt.Sprintf("prefix_rewrite %q", a.PrefixRewrite))
	}
	if a.RegexRewrite != nil {
		parts = append(parts, fmt.Sprintf("regex_rewrite %q to %q", a.RegexRewrite.Regex, a.RegexRewrite.Substitution))
	}
	if a.HostRewrite != "" {
		parts = append(parts, fmt.Sprintf("host_rewrite_literal %q", a.HostRewrite))
	}
	if a.HostRewriteHeader != "" {
		parts = append(parts, fmt.Sprintf("host_rewrite_header %q", a.HostRewriteHeader))
	}
	if a.AutoHostRewrite {
		parts = append(parts, "auto_host_rewrite")
	}
	if len(parts) == 0 {
		return ""
	}
	return "; " + strings.Join(parts, ", ")
}

func redirect(r *mesh.Redirect) string {
	var b strings.Builder
	fmt.Fprintf(&b, "redirect %d", r.Code)
	switch {
	case r.HTTPS:
		b.WriteString(", scheme https")
	case r.Scheme != "":
		b.WriteString(", scheme " + r.Scheme)
	}
	if r.Host != "" {
		b.WriteString(", host " + r.Host)
	}
	if r.Port != 0 {
		fmt.Fprintf(&b, ", port %d", r.Port)
	}
	switch {
	case r.Path != "":
		b.WriteString(", path " + r.Path)
	case r.HasPrefixRw:
		fmt.Fprintf(&b, ", prefix_rewrite %q", r.PrefixRewrite)
	case r.RegexRewrite != nil:
		fmt.Fprintf(&b, ", regex_rewrite %q", r.RegexRewrite.Regex)
	}
	if r.StripQuery {
		b.WriteString(", without query")
	}
	return b.String()
}

// ChainMatch says for which connections a filter chain is.
func ChainMatch(m *mesh.ChainMatch) string {
	var parts []string
	add := func(field string, values ...string) {
		if len(values) > 0 {
			parts = append(parts, field+" "+strings.Join(values, " or "))
		}
	}
	if m.MatchesNothing {
		return "nothing (a condition that is never met here)"
	}
	if m.DstPort != 0 {
		add("destination_port", strconv.Itoa(int(m.DstPort)))
	}
	add("destination in", prefixes(m.DstPrefixes)...)
	names := make([]string, len(m.ServerNames))
	for i, n := range m.ServerNames {
		if strings.HasPrefix(n, ".") {
			n = "*" + n
		}
		names[i] = n
	}
	add("server_names", names...)
	if m.Transport != "" {
		add("transport_protocol", m.Transport)
	}
	add("application_protocols", m.ALPN...)
	add("direct_source in", prefixes(m.DirectSrc)...)
	switch m.SourceType {
	case mesh.SourceLocal:
		add("source_type", "SAME_IP_OR_LOOPBACK")
	case mesh.SourceExternal:
		add("source_type", "EXTERNAL")
	}
	add("source in", prefixes(m.SrcPrefixes)...)
	ports := make([]string, len(m.SrcPorts))
	for i, p := range m.SrcPorts {
		ports[i] = strconv.Itoa(int(p))
	}
	add("source_port", ports...)
	if len(parts) == 0 {
		return "any"
	}
	return strings.Join(parts, ", ")
}

func prefixes(list []netip.Prefix) []string {
	out := make([]string, len(list))
	for i, p := range list {
		out[i] = p.String()
	}
	return out
}

// Percent writes a share with as many digits as it needs: 90%, 33.3%, 0.01%.
func Percent(v float64) string {
	s := strconv.FormatFloat(v, 'f', 1, 64)
	if v > 0 && v < 0.1 {
		s = strconv.FormatFloat(v, 'g', 2, 64)
	}
	return strings.TrimSuffix(s, ".0") + "%"
}

func ppm(v uint32) string { return Percent(float64(v) / 10_000) }
