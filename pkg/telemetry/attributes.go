package telemetry

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// Control planes write CEL where a plain command operator would do. Of CEL only the bare attributes are
// understood, each the same as an operator.
var attributes = map[string]string{
	"request.method": "%REQ(:METHOD)%", "request.path": "%REQ(:PATH)%", "request.url_path": "%REQ_WITHOUT_QUERY(:PATH)%",
	"request.host": "%REQ(:AUTHORITY)%", "request.scheme": "%REQ(:SCHEME)%", "request.id": "%REQ(X-REQUEST-ID)%",
	"request.useragent": "%REQ(USER-AGENT)%", "request.referer": "%REQ(REFERER)%", "request.protocol": "%PROTOCOL%",
	"request.size": "%BYTES_RECEIVED%", "response.code": "%RESPONSE_CODE%", "response.code_details": "%RESPONSE_CODE_DETAILS%",
	"response.size": "%BYTES_SENT%", "upstream.address": "%UPSTREAM_HOST%", "upstream.local_address": "%UPSTREAM_LOCAL_ADDRESS%",
	"upstream.transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%", "source.address": "%DOWNSTREAM_REMOTE_ADDRESS%",
	"destination.address": "%DOWNSTREAM_LOCAL_ADDRESS%", "connection.requested_server_name": "%REQUESTED_SERVER_NAME%",
	"connection.id": "%CONNECTION_ID%", "connection.termination_details": "%CONNECTION_TERMINATION_DETAILS%",
	"xds.route_name": "%ROUTE_NAME%", "xds.cluster_name": "%UPSTREAM_CLUSTER%", "xds.filter_chain_name": "%FILTER_CHAIN_NAME%",
}

// computed attributes have no operator that says the same.
var computed = map[string]valueFunc{
	"request.duration": func(dst []byte, r *Record) ([]byte, bool) {
		if r.Begin == 0 || r.End == 0 {
			return dst, false
		}
		return append(strconv.AppendFloat(dst, time.Duration(r.End-r.Begin).Seconds(), 'f', -1, 64), 's'), true
	},
	"response.flags": func(dst []byte, r *Record) ([]byte, bool) { return strconv.AppendUint(dst, uint64(r.Flags), 10), true },
	"request.total_size": func(dst []byte, r *Record) ([]byte, bool) {
		return strconv.AppendUint(dst, r.BytesReceived+r.RequestHeaderBytes, 10), true
	},
	"response.total_size": func(dst []byte, r *Record) ([]byte, bool) {
		return strconv.AppendUint(dst, r.BytesSent+r.ResponseHeaderBytes, 10), true
	},
}

func attribute(expr string) (valueFunc, error) {
	expr = strings.TrimSpace(expr)
	if v, ok := computed[expr]; ok {
		return v, nil
	}
	text, ok := attributes[expr]
	for prefix, op := range map[string]string{"request.headers['": "REQ", "response.headers['": "RESP", "response.trailers['": "TRAILER"} {
		if name, found := strings.CutPrefix(expr, prefix); found && strings.HasSuffix(name, "']") {
			text, ok = "%"+op+"("+strings.TrimSuffix(name, "']")+")%", true
		}
	}
	if !ok {
		return nil, fmt.Errorf("CEL expression %q: only a bare attribute such as request.method is supported", expr)
	}
	f, err := CompileFormat(text)
	if err != nil {
		return nil, err
	}
	return f.pieces[0].value, nil
}

// grpcStatusOf is grpc-status, out of the trailers or, for an answer without body, the head.
func grpcStatusOf(r *Record) ([]byte, bool) {
	for _, b := range [...]*header.Block{r.ResponseTrailers, r.Response} {
		if b == nil {
			continue
		}
		if v, ok := b.Get(header.GRPCStatus); ok {
			return v, true
		}
	}
	return nil, false
}

var grpcNames = [...]string{
	"OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists", "PermissionDenied",
	"ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented", "Internal", "Unavailable",
	"DataLoss", "Unauthenticated",
}

// grpcStatus is GRPC_STATUS(CAMEL_STRING|SNAKE_STRING|NUMBER).
func grpcStatus(arg string) (valueFunc, error) {
	names := grpcNames[:]
	switch arg {
	case "", "CAMEL_STRING":
	case "SNAKE_STRING":
		names = nil
		for _, n := range grpcNames {
			names = append(names, snake(n))
		}
	case "NUMBER":
		names = nil
	default:
		return nil, fmt.Errorf("%q is not CAMEL_STRING, SNAKE_STRING or NUMBER", arg)
	}
	return func(dst []byte, r *Record) ([]byte, bool) {
		v, ok := grpcStatusOf(r)
		code, valid := 0, len(v) > 0 && len(v) <= 2
		for _, c := range v {
			valid = valid && '0' <= c && c <= '9'
			code = code*10 + int(c-'0')
		}
		if valid && code < len(names) {
			return append(dst, names[code]...), true
		}
		return append(dst, v...), ok
	}, nil
}

func snake(camel string) string {
	if camel == "OK" {
		return camel
	}
	var s strings.Builder
	for i, c := range camel {
		if i > 0 && 'A' <= c && c <= 'Z' {
			s.WriteByte('_')
		}
		s.WriteRune(c)
	}
	return strings.ToUpper(s.String())
}
