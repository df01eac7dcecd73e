package telemetry

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// valueFunc appends a value and says whether it is known.
type valueFunc = func(dst []byte, r *Record) ([]byte, bool)

// operatorDef is one command operator.
type operatorDef struct {
	takesArg, needsArg bool
	number             bool
	compile            func(arg string) (valueFunc, error)
}

// operators are those of Envoy that make sense here; what a filter would have to set and no filter sets
// (dynamic metadata, filter state) is accepted and never known.
var operators map[string]operatorDef

func init() {
	operators = map[string]operatorDef{
		"START_TIME":       timeOp(false, func(r *Record) int64 { return r.StartTime }),
		"START_TIME_LOCAL": timeOp(true, func(r *Record) int64 { return r.StartTime }),
		"EMIT_TIME":        timeOp(false, func(*Record) int64 { return time.Now().UnixNano() }),
		"EMIT_TIME_LOCAL":  timeOp(true, func(*Record) int64 { return time.Now().UnixNano() }),

		"DURATION":             millis(func(r *Record) (int64, int64) { return r.Begin, r.End }),
		"REQUEST_DURATION":     millis(func(r *Record) (int64, int64) { return r.Begin, r.RequestEnd }),
		"REQUEST_TX_DURATION":  millis(func(r *Record) (int64, int64) { return r.Begin, r.UpstreamRequestEnd }),
		"RESPONSE_DURATION":    millis(func(r *Record) (int64, int64) { return r.Begin, r.ResponseBegin }),
		"RESPONSE_TX_DURATION": millis(func(r *Record) (int64, int64) { return r.ResponseBegin, r.DownstreamEnd }),

		"BYTES_RECEIVED":                 count(func(r *Record) uint64 { return r.BytesReceived }),
		"BYTES_SENT":                     count(func(r *Record) uint64 { return r.BytesSent }),
		"REQUEST_HEADERS_BYTES":          count(func(r *Record) uint64 { return r.RequestHeaderBytes }),
		"RESPONSE_HEADERS_BYTES":         count(func(r *Record) uint64 { return r.ResponseHeaderBytes }),
		"UPSTREAM_WIRE_BYTES_SENT":       count(func(r *Record) uint64 { return r.UpstreamBytesSent }),
		"UPSTREAM_WIRE_BYTES_RECEIVED":   count(func(r *Record) uint64 { return r.UpstreamBytesReceived }),
		"UPSTREAM_HEADER_BYTES_SENT":     count(func(r *Record) uint64 { return r.UpstreamHeaderBytesSent }),
		"UPSTREAM_HEADER_BYTES_RECEIVED": count(func(r *Record) uint64 { return r.UpstreamHeaderBytesReceived }),
		"RESPONSE_CODE":                  count(func(r *Record) uint64 { return uint64(r.Status) }),
		"UPSTREAM_REQUEST_ATTEMPT_COUNT": count(func(r *Record) uint64 { return uint64(r.Attempts) }),
		"CONNECTION_ID":                  count(func(r *Record) uint64 { return r.ConnectionID }),

		"PROTOCOL":          text(func(r *Record) string { return r.Protocol.String() }),
		"UPSTREAM_PROTOCOL": text(func(r *Record) string { return r.UpstreamProtocol.String() }),

		"RESPONSE_CODE_DETAILS":          {compile: details},
		"CONNECTION_TERMINATION_DETAILS": text(func(r *Record) string { return r.TerminationDetails }),
		"RESPONSE_FLAGS":                 flags(false),
		"RESPONSE_FLAGS_LONG":            flags(true),

		"UPSTREAM_CLUSTER":     text(func(r *Record) string { return r.UpstreamCluster }),
		"UPSTREAM_CLUSTER_RAW": text(func(r *Record) string { return r.UpstreamCluster }),
		// Without white space, as in Envoy: a log line that is split at blanks keeps its columns.
		"UPSTREAM_TRANSPORT_FAILURE_REASON": text(func(r *Record) string { return strings.ReplaceAll(r.UpstreamTransportFailure, " ", "_") }),
		"UPSTREAM_HOST_NAME":                {compile: hostName(true)},
		"UPSTREAM_HOST_NAME_WITHOUT_PORT":   {compile: hostName(false)},
		"ROUTE_NAME":                        text(func(r *Record) string { return r.RouteName }),
		"VIRTUAL_CLUSTER_NAME":              text(func(r *Record) string { return r.VirtualCluster }),
		"FILTER_CHAIN_NAME":                 text(func(r *Record) string { return r.FilterChain }),
		"REQUESTED_SERVER_NAME":             text(func(r *Record) string { return r.ServerName }),
		"DOWNSTREAM_TLS_VERSION":            text(func(r *Record) string { return r.DownstreamTLS }),
		"DOWNSTREAM_PEER_URI_SAN":           text(func(r *Record) string { return r.DownstreamPeerName }),
		"STREAM_ID":                         text(func(r *Record) string { return r.StreamID }),

		"REQ":               headerOp(request),
		"RESP":              headerOp(response),
		"TRAILER":           headerOp(trailers),
		"REQ_WITHOUT_QUERY": {needsArg: true, takesArg: true, compile: withoutQuery},
		"PATH":              {takesArg: true, compile: pathOp},
		"QUERY_PARAM":       {needsArg: true, takesArg: true, compile: queryParam},
		"GRPC_STATUS":       {takesArg: true, compile: grpcStatus},
		"GRPC_STATUS_NUMBER": {number: true, compile: func(string) (valueFunc, error) {
			return func(dst []byte, r *Record) ([]byte, bool) { v, ok := grpcStatusOf(r); return append(dst, v...), ok }, nil
		}},

		"HOSTNAME":    {compile: hostname},
		"ENVIRONMENT": {needsArg: true, takesArg: true, compile: environment},

		"CEL": {needsArg: true, takesArg: true, compile: attribute},
	}
	addresses("UPSTREAM_LOCAL", func(r *Record) netip.AddrPort { return r.UpstreamLocal })
	addresses("UPSTREAM_REMOTE", func(r *Record) netip.AddrPort { return r.UpstreamHost })
	addresses("DOWNSTREAM_LOCAL", func(r *Record) netip.AddrPort { return r.DownstreamLocal })
	addresses("DOWNSTREAM_DIRECT_LOCAL", func(r *Record) netip.AddrPort { return r.DownstreamLocal })
	addresses("DOWNSTREAM_REMOTE", func(r *Record) netip.AddrPort { return r.DownstreamRemote })
	addresses("DOWNSTREAM_DIRECT_REMOTE", func(r *Record) netip.AddrPort { return r.DownstreamDirect })
	operators["UPSTREAM_HOST"] = operators["UPSTREAM_REMOTE_ADDRESS"]
	for _, name := range []string{
		"DYNAMIC_METADATA", "CLUSTER_METADATA", "UPSTREAM_METADATA", "METADATA", "FILTER_STATE", "UPSTREAM_FILTER_STATE",
		"DOWNSTREAM_TRANSPORT_FAILURE_REASON",
	} {
		operators[name] = operatorDef{takesArg: true, compile: func(string) (valueFunc, error) {
			return func(dst []byte, _ *Record) ([]byte, bool) { return dst, false }, nil
		}}
	}
}

func timeOp(local bool, at func(*Record) int64) operatorDef {
	return operatorDef{takesArg: true, compile: func(arg string) (valueFunc, error) {
		f, err := compileTime(arg, local)
		if err != nil {
			return nil, err
		}
		return func(dst []byte, r *Record) ([]byte, bool) {
			ns := at(r)
			return f.append(dst, ns), ns != 0
		}, nil
	}}
}

// millis is the time between two instants that must both have been.
func millis(span func(*Record) (from, to int64)) operatorDef {
	return operatorDef{number: true, compile: func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) {
			from, to := span(r)
			if from == 0 || to == 0 {
				return dst, false
			}
			return strconv.AppendInt(dst, max(to-from, 0)/int64(time.Millisecond), 10), true
		}, nil
	}}
}

func count(get func(*Record) uint64) operatorDef {
	return operatorDef{number: true, compile: func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) { return strconv.AppendUint(dst, get(r), 10), true }, nil
	}}
}

// text is a string that is unknown if it is empty.
func text(get func(*Record) string) operatorDef {
	return operatorDef{compile: func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) {
			v := get(r)
			return append(dst, v...), v != ""
		}, nil
	}}
}

// details has its spaces replaced, as by Envoy: it is one field of a line.
func details(string) (valueFunc, error) {
	return func(dst []byte, r *Record) ([]byte, bool) {
		for i := range len(r.Details) {
			c := r.Details[i]
			if c == ' ' {
				c = '_'
			}
			dst = append(dst, c)
		}
		return dst, r.Details != ""
	}, nil
}

func flags(long bool) operatorDef {
	return operatorDef{compile: func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) { return r.Flags.Append(dst, long), true }, nil
	}}
}

// addresses adds the operators of one address: whole, without port, port alone.
func addresses(name string, get func(*Record) netip.AddrPort) {
	operators[name+"_ADDRESS"] = operatorDef{compile: func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) {
			a := get(r)
			return AppendAddrPort(dst, a), a.IsValid()
		}, nil
	}}
	operators[name+"_ADDRESS_WITHOUT_PORT"] = operatorDef{compile: func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) {
			a := get(r)
			if !a.IsValid() {
				return dst, false
			}
			return a.Addr().Unmap().AppendTo(dst), true
		}, nil
	}}
	operators[name+"_PORT"] = operatorDef{number: true, compile: func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) {
			a := get(r)
			return strconv.AppendUint(dst, uint64(a.Port()), 10), a.IsValid()
		}, nil
	}}
}

// AppendAddrPort appends "1.2.3.4:80" or "[::1]:80"; a mapped address is shown as the IPv4 one that it is.
func AppendAddrPort(dst []byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return dst
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).AppendTo(dst)
}

func hostName(port bool) func(string) (valueFunc, error) {
	return func(string) (valueFunc, error) {
		return func(dst []byte, r *Record) ([]byte, bool) {
			switch {
			case r.UpstreamHostName != "":
				return append(dst, r.UpstreamHostName...), true
			case !r.UpstreamHost.IsValid():
				return dst, false
			case port:
				return AppendAddrPort(dst, r.UpstreamHost), true
			}
			return r.UpstreamHost.Addr().Unmap().AppendTo(dst), true
		}, nil
	}
}

func request(r *Record) *header.Block  { return r.Request }
func response(r *Record) *header.Block { return r.Response }
func trailers(r *Record) *header.Block { return r.ResponseTrailers }

func headerOp(from func(*Record) *header.Block) operatorDef {
	return operatorDef{takesArg: true, needsArg: true, compile: func(arg string) (valueFunc, error) {
		get, err := headerGetter(arg)
		if err != nil {
			return nil, err
		}
		return func(dst []byte, r *Record) ([]byte, bool) {
			v, ok := get(from(r))
			return append(dst, v...), ok
		}, nil
	}}
}

// headerGetter compiles NAME or NAME?ALTERNATIVE.
func headerGetter(arg string) (func(*header.Block) ([]byte, bool), error) {
	name, alternative, hasAlternative := strings.Cut(strings.ToLower(arg), "?")
	if name == "" || hasAlternative && (alternative == "" || strings.Contains(alternative, "?")) {
		return nil, fmt.Errorf("%q is not NAME or NAME?ALTERNATIVE", arg)
	}
	first, second := lookup(name), lookup(alternative)
	return func(b *header.Block) ([]byte, bool) {
		if b == nil {
			return nil, false
		}
		v, ok := first(b)
		if !ok && hasAlternative {
			v, ok = second(b)
		}
		return v, ok
	}, nil
}

// lookup finds out once what kind of name it is.
func lookup(name string) func(*header.Block) ([]byte, bool) {
	if id := header.Lookup(name); id != header.None {
		return func(b *header.Block) ([]byte, bool) { return b.Get(id) }
	}
	switch name {
	case ":method":
		return func(b *header.Block) ([]byte, bool) { v := b.Method(); return v, v != nil }
	case ":path":
		return func(b *header.Block) ([]byte, bool) { v := b.Path(); return v, v != nil }
	case ":authority", "host":
		return func(b *header.Block) ([]byte, bool) { return b.Authority(), b.HasAuthority() }
	}
	return func(b *header.Block) ([]byte, bool) { return b.GetName(name) }
}

func withoutQuery(arg string) (valueFunc, error) {
	get, err := headerGetter(arg)
	if err != nil {
		return nil, err
	}
	return func(dst []byte, r *Record) ([]byte, bool) {
		v, ok := get(r.Request)
		if i := bytes.IndexByte(v, '?'); i >= 0 {
			v = v[:i]
		}
		return append(dst, v...), ok
	}, nil
}

// pathOp is PATH(WQ|NQ|NQ:PATH|ORIG|PATH_OR_ORIG).
func pathOp(arg string) (valueFunc, error) {
	query, which, _ := strings.Cut(arg, ":")
	if query != "" && query != "WQ" && query != "NQ" {
		return nil, fmt.Errorf("%q is not WQ or NQ", query)
	}
	name := map[string]string{
		"": "x-envoy-original-path?:path", "ORIG_OR_PATH": "x-envoy-original-path?:path", "ORIG": "x-envoy-original-path",
		"PATH": ":path",
	}[which]
	switch {
	case name == "":
		return nil, fmt.Errorf("%q is not PATH, ORIG or ORIG_OR_PATH", which)
	case query == "NQ":
		return withoutQuery(name)
	}
	return headerOp(request).compile(name)
}

func queryParam(name string) (valueFunc, error) {
	return func(dst []byte, r *Record) ([]byte, bool) {
		if r.Request == nil {
			return dst, false
		}
		_, query, _ := bytes.Cut(r.Request.Path(), []byte("?"))
		for len(query) > 0 {
			var pair []byte
			pair, query, _ = bytes.Cut(query, []byte("&"))
			k, v, _ := bytes.Cut(pair, []byte("="))
			if string(k) == name {
				return append(dst, v...), true
			}
		}
		return dst, false
	}, nil
}

func hostname(string) (valueFunc, error) {
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	return func(dst []byte, _ *Record) ([]byte, bool) { return append(dst, name...), true }, nil
}

func environment(name string) (valueFunc, error) {
	v, ok := os.LookupEnv(name)
	if !ok {
		v = "-" // in JSON too
	}
	return func(dst []byte, _ *Record) ([]byte, bool) { return append(dst, v...), true }, nil
}
