package router

import (
	"net/http"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// direct answers with the route's own response. Envoy adds a Location, the request's own URL, to those that are
// meant to have one.
func (r *Request) direct(d *mesh.DirectResponse) {
	r.resp.Reset()
	r.resp.SetStatus(d.Status)
	r.rec.Response = &r.resp
	if d.Status == http.StatusCreated || d.Status/100 == 3 {
		buf := append(append([]byte(nil), r.head.Scheme()...), "://"...)
		r.resp.AddBytes(header.Location, append(append(buf, r.head.Authority()...), r.head.Path()...))
	}
	r.mutateResponse()
	r.replyWith(d.Status, unsafeString(d.Body), "direct_response")
}

// redirect answers with the Location that the route's redirect action makes of the request's own URL.
func (r *Request) redirect(d *mesh.Redirect) {
	scheme := r.head.SchemeString()
	switch {
	case d.HTTPS:
		scheme = schemeHTTPS
	case d.Scheme != "":
		scheme = d.Scheme
	}
	buf := append(append([]byte(nil), scheme...), "://"...)
	if d.Host != "" {
		buf = append(buf, d.Host...)
	} else {
		buf = append(buf, r.redirectHost(d, scheme)...)
	}
	if d.Port != 0 {
		buf = appendUint(append(buf, ':'), uint64(d.Port))
	}
	buf = r.appendRedirectPath(buf, d)
	code := d.Code
	if code == 0 {
		code = http.StatusMovedPermanently
	}
	r.resp.Reset()
	r.mutateResponse()
	r.resp.SetBytes(header.Location, buf)
	r.replyWith(code, "", "direct_response")
}

// redirectHost is the request's host, without its port if that one goes with the old scheme or is replaced.
func (r *Request) redirectHost(d *mesh.Redirect, scheme string) string {
	host := r.head.AuthorityString()
	name, port := splitPort(host)
	if port == "" {
		return host
	}
	drop := d.Port != 0
	if was, _ := r.head.GetString(header.XForwardedProto); was != scheme {
		drop = drop || was == schemeHTTP && port == "80" || was == schemeHTTPS && port == "443"
	}
	if drop {
		return name
	}
	return host
}

func (r *Request) appendRedirectPath(buf []byte, d *mesh.Redirect) []byte {
	path := r.head.PathString()
	query := path[len(pathOnly(path)):]
	if d.Path != "" {
		buf = append(buf, d.Path...)
		if strings.IndexByte(d.Path, '?') >= 0 || d.StripQuery {
			return buf
		}
		return append(buf, query...)
	}
	switch {
	case d.RegexRewrite != nil:
		buf = appendRegexRewrite(buf, d.RegexRewrite, pathOnly(path))
	case d.HasPrefixRw && d.PrefixRewrite != "":
		buf = append(buf, d.PrefixRewrite...)
		buf = append(buf, pathOnly(path)[r.matchedLen(path):]...)
	default:
		buf = append(buf, pathOnly(path)...)
	}
	if d.StripQuery {
		return buf
	}
	return append(buf, query...)
}

// redirectToTLS serves require_tls.
func (r *Request) redirectToTLS() {
	buf := append([]byte("https://"), r.head.Authority()...)
	if name, port := splitPort(r.head.AuthorityString()); port == "80" {
		buf = append(buf[:len("https://")], name...)
	}
	buf = append(buf, r.head.Path()...)
	r.resp.Reset()
	r.resp.AddBytes(header.Location, buf)
	r.replyWith(http.StatusMovedPermanently, "", "direct_response")
}
