package router

import (
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// rewritePath gives the upstream the path that the route wants it to see; the client's own goes into
// x-envoy-original-path.
func (r *Request) rewritePath(a *mesh.RouteAction) {
	if a.RegexRewrite == nil && (!a.HasPrefixRw || a.PrefixRewrite == "") {
		return
	}
	h := &r.head
	path := h.PathString()
	r.rec.OriginalPath = path // its bytes stay in the block's arena
	bare := pathOnly(path)
	query := path[len(bare):]
	if a.RegexRewrite != nil {
		r.scratch = appendRegexRewrite(r.scratch[:0], a.RegexRewrite, bare)
	} else {
		r.scratch = append(r.scratch[:0], a.PrefixRewrite...)
		r.scratch = append(r.scratch, bare[r.matchedLen(path):]...)
	}
	r.scratch = append(r.scratch, query...)
	if !r.hcm.SuppressEnvoyHeaders {
		h.Set(header.XEnvoyOriginalPath, path)
	}
	h.SetPath(unsafeString(r.scratch))
}

// matchedLen is how much of the path the route's match covers, which is what a prefix rewrite replaces.
func (r *Request) matchedLen(path string) int {
	n := len(pathOnly(path))
	switch m := &r.route.Match; m.Kind {
	case mesh.PathPrefix, mesh.PathSeparatedPrefix:
		return min(len(m.Path), n)
	}
	return n
}

func appendRegexRewrite(dst []byte, rw *mesh.RegexRewrite, s string) []byte {
	return append(dst, rw.Regex.ReplaceAllString(s, rw.Substitution)...)
}

// rewriteHost applies the route's host rewrite, except auto_host_rewrite, which depends on the endpoint.
func (r *Request) rewriteHost(a *mesh.RouteAction) {
	switch {
	case r.split != nil && r.split.HostRewrite != "":
		r.setHost(a, r.split.HostRewrite)
	case a.HostRewrite != "":
		r.setHost(a, a.HostRewrite)
	case a.HostRewriteHeader != "":
		if v, ok := r.head.GetName(a.HostRewriteHeader); ok && len(v) > 0 {
			r.setHost(a, unsafeString(v))
		}
	case a.HostRewritePath != nil:
		r.scratch = appendRegexRewrite(r.scratch[:0], a.HostRewritePath, pathOnly(r.Path()))
		r.setHost(a, unsafeString(r.scratch))
	}
}

func (r *Request) setHost(a *mesh.RouteAction, host string) {
	h := &r.head
	if old := h.AuthorityString(); old != host {
		if r.rec.OriginalAuthority == "" { // and not once more for another endpoint
			r.rec.OriginalAuthority = old
			if a.AppendXFHost && old != "" {
				r.appendForwardedHost(old)
			}
		}
		if !r.hcm.SuppressEnvoyHeaders && !h.Has(header.XEnvoyOriginalHost) {
			h.Set(header.XEnvoyOriginalHost, old)
		}
	}
	h.SetAuthority(host)
}

// appendForwardedHost joins as Envoy does: without a space.
func (r *Request) appendForwardedHost(host string) {
	if v, ok := r.head.Joined("x-forwarded-host"); ok {
		host = v + "," + host
	}
	r.head.Set(header.XForwardedHost, host)
}
