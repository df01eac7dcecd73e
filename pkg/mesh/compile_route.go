package mesh

import (
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
)

// CompileRouteConfig turns a RouteConfiguration into its runtime form.
func CompileRouteConfig(m *routev3.RouteConfiguration, version string) (*RouteConfig, []Warning, error) {
	c := newCompiler("route", m.GetName())
	c.begin(m)
	rc := c.routeConfig(nil, m, version)
	if err := c.err(); err != nil {
		return nil, c.warnings, err
	}
	return rc, c.warnings, nil
}

const defaultMaxDirectResponseBody = 4096

func (c *compiler) routeConfig(at *path, m *routev3.RouteConfiguration, version string) *RouteConfig {
	rc := &RouteConfig{
		Name:                  m.GetName(),
		Version:               version,
		RequestHeaders:        c.mutations(at, "request", m.GetRequestHeadersToAdd(), m.GetRequestHeadersToRemove()),
		ResponseHeaders:       c.mutations(at, "response", m.GetResponseHeadersToAdd(), m.GetResponseHeadersToRemove()),
		MostSpecificWins:      m.GetMostSpecificHeaderMutationsWins(),
		IgnorePort:            m.GetIgnorePortInHostMatching(),
		MaxDirectResponseBody: uint32Or(m.GetMaxDirectResponseBodySizeBytes(), defaultMaxDirectResponseBody),
	}
	c.perFilterConfig(at, m.GetTypedPerFilterConfig())
	for i, vh := range m.GetVirtualHosts() {
		rc.Hosts = append(rc.Hosts, c.virtualHost(at.field("virtual_hosts").at(i), vh, rc))
	}
	names := map[string]bool{}
	for i, vh := range rc.Hosts {
		if names[vh.Name] {
			c.refuse(at.field("virtual_hosts").at(i).field("name"), "%q is there twice", vh.Name)
		}
		names[vh.Name] = true
	}
	if err := rc.Init(); err != nil {
		c.refuseError(at, err)
	}
	return rc
}

func (c *compiler) virtualHost(at *path, m *routev3.VirtualHost, rc *RouteConfig) *VirtualHost {
	vh := &VirtualHost{
		Name:                   m.GetName(),
		Domains:                m.GetDomains(),
		RequireTLS:             TLSRequirement(0),
		RequestHeaders:         c.mutations(at, "request", m.GetRequestHeadersToAdd(), m.GetRequestHeadersToRemove()),
		ResponseHeaders:        c.mutations(at, "response", m.GetResponseHeadersToAdd(), m.GetResponseHeadersToRemove()),
		Retry:                  c.retryPolicy(at.field("retry_policy"), m.GetRetryPolicy()),
		IncludeAttemptCount:    m.GetIncludeRequestAttemptCount(),
		AttemptCountInResponse: m.GetIncludeAttemptCountInResponse(),
	}
	switch m.GetRequireTls() {
	case routev3.VirtualHost_NONE:
	case routev3.VirtualHost_EXTERNAL_ONLY:
		vh.RequireTLS = TLSExternalOnly
	case routev3.VirtualHost_ALL:
		vh.RequireTLS = TLSAll
	default:
		c.refuse(at.field("require_tls"), "%d is not known", m.GetRequireTls())
	}
	c.perFilterConfig(at, m.GetTypedPerFilterConfig())
	for i, r := range m.GetRoutes() {
		vh.Routes = append(vh.Routes, c.route(at.field("routes").at(i), r, vh, rc))
	}
	return vh
}

func (c *compiler) route(at *path, m *routev3.Route, vh *VirtualHost, rc *RouteConfig) *Route {
	r := &Route{
		Name:            m.GetName(),
		Match:           c.routeMatch(at.field("match"), m.GetMatch()),
		RequestHeaders:  c.mutations(at, "request", m.GetRequestHeadersToAdd(), m.GetRequestHeadersToRemove()),
		ResponseHeaders: c.mutations(at, "response", m.GetResponseHeadersToAdd(), m.GetResponseHeadersToRemove()),
	}
	c.perFilterConfig(at, m.GetTypedPerFilterConfig())
	switch action := m.GetAction().(type) {
	case *routev3.Route_Route:
		r.Action = c.routeAction(at.field("route"), action.Route, vh)
	case *routev3.Route_Redirect:
		r.Redirect = c.redirect(at.field("redirect"), action.Redirect)
	case *routev3.Route_DirectResponse:
		body := c.data(at.field("direct_response").field("body"), action.DirectResponse.GetBody())
		r.Direct = &DirectResponse{Status: int(action.DirectResponse.GetStatus()), Body: body}
		if len(body) > int(rc.MaxDirectResponseBody) {
			c.refuse(at.field("direct_response").field("body"), "%d bytes, the limit is %d (max_direct_response_body_size_bytes)", len(body), rc.MaxDirectResponseBody)
		}
	case nil:
		c.refuse(at, "route, redirect or direct_response is needed")
	}
	return r
}

func (c *compiler) redirect(at *path, m *routev3.RedirectAction) *Redirect {
	r := &Redirect{
		Scheme:     m.GetSchemeRedirect(),
		HTTPS:      m.GetHttpsRedirect(),
		Host:       m.GetHostRedirect(),
		Port:       m.GetPortRedirect(),
		Path:       m.GetPathRedirect(),
		StripQuery: m.GetStripQuery(),
	}
	switch m.GetResponseCode() {
	case routev3.RedirectAction_MOVED_PERMANENTLY:
		r.Code = 301
	case routev3.RedirectAction_FOUND:
		r.Code = 302
	case routev3.RedirectAction_SEE_OTHER:
		r.Code = 303
	case routev3.RedirectAction_TEMPORARY_REDIRECT:
		r.Code = 307
	case routev3.RedirectAction_PERMANENT_REDIRECT:
		r.Code = 308
	default:
		c.refuse(at.field("response_code"), "%d is not known", m.GetResponseCode())
	}
	switch spec := m.GetPathRewriteSpecifier().(type) {
	case *routev3.RedirectAction_PrefixRewrite:
		r.PrefixRewrite, r.HasPrefixRw = spec.PrefixRewrite, true
	case *routev3.RedirectAction_RegexRewrite:
		r.RegexRewrite = c.regexRewrite(at.field("regex_rewrite"), spec.RegexRewrite)
	}
	return r
}
