package router

import (
	"net/netip"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// A request's head crosses a trust boundary here: what the proxy is going to believe about the client, and
// what the upstream will believe about the proxy, is settled before any route is looked at. The rules are
// Envoy's connection manager's, odd ones included, since applications and policies were written against them.

// edgeOnly are removed from requests that come from outside, at the first trusted hop.
var edgeOnly = header.SetOf(
	header.XEnvoyDecoratorOperation,
	header.XEnvoyDownstreamServiceCluster,
	header.XEnvoyDownstreamServiceNode,
	header.XEnvoyOriginalPath,
	header.XEnvoyOriginalHost,
)

// internalOnly are removed from every request that is not internal: they command the proxy.
var internalOnly = header.SetOf(
	header.XEnvoyRetriableStatusCodes,
	header.XEnvoyRetriableHeaderNames,
	header.XEnvoyRetryOn,
	header.XEnvoyRetryGRPCOn,
	header.XEnvoyMaxRetries,
	header.XEnvoyUpstreamAltStatName,
	header.XEnvoyUpstreamRqTimeoutMS,
	header.XEnvoyUpstreamRqPerTryTimeoutMS,
	header.XEnvoyExpectedRqTimeoutMS,
	header.XEnvoyForceTrace,
	header.XEnvoyIPTags,
	header.XEnvoyHedgeOnPerTryTimeout,
	header.XEnvoyUpstreamRqTimeoutAltResponse,
	header.XEnvoyOriginalURL,
)

const (
	schemeHTTP  = "http"
	schemeHTTPS = "https"
)

// sanitize settles the request's head. The address that it finds trustworthy for the client goes into
// r.clientAddr.
func (r *Request) sanitize() {
	h, cfg, peer := &r.head, r.hcm, r.info.Peer
	scheme := r.scheme()

	h.Remove(header.XEnvoyInternal)
	if h.Has(header.Referer) && !validReferer(h) {
		h.Remove(header.Referer)
	}

	var client netip.Addr
	var mayBeInternal bool
	hops := int(cfg.XFFNumTrustedHops)
	if cfg.UseRemoteAddress {
		mayBeInternal = !h.Has(header.XForwardedFor)
		if hops > 0 {
			client, _ = lastFromXFF(h, hops-1)
		}
		if !client.IsValid() {
			client = peer.Addr()
		}
		if !cfg.SkipXFFAppend {
			hop := peer.Addr()
			if hop.IsLoopback() && r.rt.deps.LocalAddr.IsValid() {
				hop = r.rt.deps.LocalAddr
			}
			r.appendXFF(hop)
		}
		if v, ok := h.Get(header.XForwardedProto); hops == 0 || !ok || len(v) == 0 {
			h.Set(header.XForwardedProto, scheme)
		}
	} else {
		client, mayBeInternal = lastFromXFF(h, hops)
		if v, ok := h.Get(header.XForwardedProto); !ok || len(v) == 0 {
			h.Set(header.XForwardedProto, scheme)
		}
	}

	internal := mayBeInternal && client.IsValid() && isInternal(client)
	if !client.IsValid() {
		client = peer.Addr()
	}
	r.clientAddr = client
	edge := !internal && cfg.UseRemoteAddress
	if internal {
		h.Set(header.XEnvoyInternal, "true")
	} else {
		if edge {
			h.RemoveAll(&edgeOnly)
		}
		h.RemoveAll(&internalOnly)
	}
	if cfg.Via != "" {
		h.Append(header.Via, cfg.Via)
	}
	if edge {
		r.scratch = client.AppendTo(r.scratch[:0])
		h.SetBytes(header.XEnvoyExternalAddress, r.scratch)
	}
	if cfg.GenerateRequestID {
		if force := edge && !cfg.PreserveExternalReqID; force || !h.Has(header.XRequestID) {
			r.scratch = r.rt.ids.append(r.scratch[:0])
			h.SetBytes(header.XRequestID, r.scratch)
		}
	}
	// Client certificates are a matter of TLS; without it nobody may claim one.
	h.Remove(header.XForwardedClientCert)

	if v, ok := h.GetString(header.XForwardedProto); ok && (v == schemeHTTP || v == schemeHTTPS) {
		h.SetScheme(v)
	} else {
		h.SetScheme(scheme)
	}
}

// scheme is what the client itself speaks to us.
func (r *Request) scheme() string { return schemeHTTP }

// appendXFF adds one hop, in the form that Envoy joins them: without a space.
func (r *Request) appendXFF(addr netip.Addr) {
	h := &r.head
	buf := r.scratch[:0]
	if h.Has(header.XForwardedFor) {
		first := true
		for i := range h.Len() {
			if h.ID(i) != header.XForwardedFor {
				continue
			}
			if !first {
				buf = append(buf, ',')
			}
			first = false
			buf = append(buf, h.Value(i)...)
		}
		buf = append(buf, ',')
	}
	buf = addr.WithZone("").AppendTo(buf)
	r.scratch = buf
	h.SetBytes(header.XForwardedFor, buf)
}

// lastFromXFF returns the skip-th address of x-forwarded-for counted from its end, and whether it is the only
// one there. The zero Addr: there is none, or it is no address.
func lastFromXFF(h *header.Block, skip int) (addr netip.Addr, only bool) {
	if !h.Has(header.XForwardedFor) {
		return netip.Addr{}, false
	}
	list, _ := h.Joined("x-forwarded-for")
	for i := 0; i < skip; i++ {
		comma := strings.LastIndexByte(list, ',')
		if comma < 0 {
			return netip.Addr{}, false
		}
		list = list[:comma]
	}
	last := list
	comma := strings.LastIndexByte(list, ',')
	if comma >= 0 {
		last = list[comma+1:]
	}
	addr, err := netip.ParseAddr(strings.Trim(last, " \t"))
	if err != nil {
		return netip.Addr{}, false
	}
	return addr.Unmap(), comma < 0 && skip == 0
}

// isInternal says whether the address is of a private network. With no internal_address_config Envoy trusts
// none since 1.33; RFC 1918 addresses were trusted before that.
func isInternal(netip.Addr) bool { return false }

// validReferer says whether there is one referer, and it is an absolute URL.
func validReferer(h *header.Block) bool {
	if h.Count(header.Referer) != 1 {
		return false
	}
	v, _ := h.GetString(header.Referer)
	i := strings.Index(v, "://")
	if i <= 0 {
		return false
	}
	switch s := v[:i]; {
	case header.EqualFold([]byte(s), schemeHTTP), header.EqualFold([]byte(s), schemeHTTPS):
	default:
		return false
	}
	host := v[i+3:]
	if j := strings.IndexAny(host, "/?#"); j >= 0 {
		host = host[:j]
	}
	return host != "" && !strings.ContainsAny(host, " \t\"<>\\^`{|}")
}

// normalizeHost applies strip_matching_host_port, strip_any_host_port and strip_trailing_host_dot.
func (r *Request) normalizeHost() {
	cfg, h := r.hcm, &r.head
	if cfg.StripPort == mesh.StripPortNone && !cfg.StripTrailingHostDot {
		return
	}
	host := h.AuthorityString()
	name, port := splitPort(host)
	if cfg.StripTrailingHostDot {
		if n := len(name); n > 0 && name[n-1] == '.' {
			r.scratch = append(append(r.scratch[:0], name[:n-1]...), host[n:]...)
			h.SetAuthority(unsafeString(r.scratch))
			host = h.AuthorityString()
			name, port = splitPort(host)
		}
	}
	if port == "" || len(h.Method()) == 7 && string(h.Method()) == "CONNECT" {
		return
	}
	switch cfg.StripPort {
	case mesh.StripPortAny:
		h.SetAuthority(name)
	case mesh.StripPortMatching:
		if n, ok := parseUint(port); ok && n == uint64(r.info.Orig.Port()) {
			h.SetAuthority(name)
		}
	}
}

// splitPort cuts ":port" off a host, which may be a bracketed IPv6 address. port is "" if there is none.
func splitPort(host string) (name, port string) {
	i := strings.LastIndexByte(host, ':')
	if i < 0 || strings.IndexByte(host[i:], ']') >= 0 {
		return host, ""
	}
	if strings.IndexByte(host[:i], ':') >= 0 && host[0] != '[' {
		return host, "" // a bare IPv6 address
	}
	return host[:i], host[i+1:]
}

func parseUint(s string) (uint64, bool) {
	if s == "" || len(s) > 19 {
		return 0, false
	}
	var n uint64
	for i := 0; i < len(s); i++ {
		c := s[i] - '0'
		if c > 9 {
			return 0, false
		}
		n = n*10 + uint64(c)
	}
	return n, true
}
