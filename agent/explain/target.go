package explain

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// target is what the pod would connect to, and for HTTP what it would ask.
type target struct {
	proto service.Protocol
	host  string // as written: an address or a name
	port  uint16
	addr  netip.AddrPort // once resolved
	http  *request       // nil for tcp and udp
}

// Check says whether a question can be understood at all, before anybody is asked.
func Check(in api.ExplainRequest) error {
	_, err := parseTarget(in)
	return err
}

// parseTarget reads tcp://host:port, udp://host:port and http://host[:port]/path.
func parseTarget(in api.ExplainRequest) (*target, error) {
	raw := in.URL
	if !strings.Contains(raw, "://") {
		return nil, fmt.Errorf("URL %q: expected tcp://host:port, udp://host:port or http://host/path", raw)
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("URL %q: %w", raw, err)
	}
	t := &target{proto: service.TCP, host: u.Hostname()}
	port := u.Port()
	switch u.Scheme {
	case "tcp":
	case "udp":
		t.proto = service.UDP
	case "http":
		if port == "" {
			port = "80"
		}
		t.http = newRequest(u, in)
	case "https":
		return nil, fmt.Errorf("URL %q: TLS is not terminated yet; ask for the connection with tcp://%s", raw, hostPort(u, "443"))
	default:
		return nil, fmt.Errorf("URL %q: scheme %q: expected tcp, udp or http", raw, u.Scheme)
	}
	if t.http == nil && (len(in.Headers) > 0 || in.Method != "") {
		return nil, fmt.Errorf("a method and headers mean something for http:// only, not for %s://", u.Scheme)
	}
	if t.host == "" {
		return nil, fmt.Errorf("URL %q: no host", raw)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("URL %q: expected a port from 1 to 65535 after the host, like %s://%s:8080", raw, u.Scheme, t.host)
	}
	t.port = uint16(n)
	return t, nil
}

func hostPort(u *url.URL, port string) string {
	if u.Port() != "" {
		return u.Host
	}
	return u.Host + ":" + port
}

// resolve turns the host into an address: literally, or as cluster DNS would name a Service. Other names are the
// cluster's DNS server's to know.
func (e *explainer) resolve() error {
	if ip, err := netip.ParseAddr(e.t.host); err == nil {
		e.t.addr = netip.AddrPortFrom(ip.Unmap().WithZone(""), e.t.port)
		e.step("address", e.t.addr.String(), "given")
		return nil
	}
	name, ok := serviceName(e.t.host, e.pod.Namespace)
	if !ok {
		return fmt.Errorf("%s is no Service name that cluster DNS would know (NAME, NAME.NAMESPACE, NAME.NAMESPACE.svc…): ask with the address instead", e.t.host)
	}
	for _, s := range e.w.Services {
		if s.Name != name {
			continue
		}
		for i := range s.Frontends {
			if f := &s.Frontends[i]; f.Kind == service.ClusterIP {
				e.t.addr = netip.AddrPortFrom(f.Addr.Addr(), e.t.port)
				e.step("address", e.t.addr.String(), fmt.Sprintf("ClusterIP of Service %s, as cluster DNS resolves %s", name, e.t.host))
				return nil
			}
		}
	}
	return fmt.Errorf("no Service %s with a cluster IP: cluster DNS would not resolve %s; ask with an address if it is something else", name, e.t.host)
}

// serviceName reads NAME[.NAMESPACE[.svc[.cluster.local]]] with a pod's search path.
func serviceName(host, podNamespace string) (service.Name, bool) {
	labels := strings.Split(strings.TrimSuffix(strings.ToLower(host), "."), ".")
	switch {
	case len(labels) == 1:
		return service.Name{Namespace: podNamespace, Name: labels[0]}, labels[0] != ""
	case len(labels) == 2 || labels[2] == "svc":
		return service.Name{Namespace: labels[1], Name: labels[0]}, true
	}
	return service.Name{}, false
}

// request is an HTTP request as mesh's matchers see it.
type request struct {
	authority, path, method string
	headers                 map[string][]string
	random                  uint64
}

func newRequest(u *url.URL, in api.ExplainRequest) *request {
	r := &request{authority: u.Host, path: u.RequestURI(), method: in.Method, headers: map[string][]string{}}
	if r.method == "" {
		r.method = "GET"
	}
	for _, h := range in.Headers {
		name := strings.ToLower(h[0])
		if name == "host" || name == ":authority" {
			r.authority = h[1]
			continue
		}
		r.headers[name] = append(r.headers[name], h[1])
	}
	return r
}

// Authority implements mesh.Request.
func (r *request) Authority() string { return r.authority }

// Path implements mesh.Request.
func (r *request) Path() string { return r.path }

// Method implements mesh.Request.
func (r *request) Method() string { return r.method }

// Scheme implements mesh.Request.
func (r *request) Scheme() string { return "http" }

// Header implements mesh.Request; pseudo-headers are what Envoy's matchers see under their names.
func (r *request) Header(name string) (string, bool) {
	switch name {
	case ":authority", "host":
		return r.authority, true
	case ":path":
		return r.path, true
	case ":method":
		return r.method, true
	case ":scheme":
		return "http", true
	}
	v, ok := r.headers[name]
	return strings.Join(v, ","), ok
}

// NextHeader implements mesh.Request.
func (r *request) NextHeader(name string, from int) (string, int) {
	if v := r.headers[name]; from < len(v) {
		return v[from], from + 1
	}
	return "", 0
}

// Random implements mesh.Request. Zero falls into every fraction that is not zero, so that a sampled route is
// shown, with its fraction.
func (r *request) Random() uint64 { return r.random }
