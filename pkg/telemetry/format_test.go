package telemetry

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

const ms = int64(time.Millisecond)

// sampleRecord is a request as the router would report it.
func sampleRecord() *Record {
	req, resp := &header.Block{}, &header.Block{}
	req.SetMethod("GET")
	req.SetPath("/rewritten?q=1&r=two")
	req.SetAuthority("reviews:9080")
	req.SetScheme("http")
	req.AddName("User-Agent", "curl/8.5.0")
	req.AddName("X-Envoy-Original-Path", "/original?q=1")
	req.AddName("X-Request-Id", "id-1")
	resp.SetStatus(200)
	resp.AddName("X-Envoy-Upstream-Service-Time", "7")
	trailers := &header.Block{}
	trailers.AddName("grpc-status", "14")
	return &Record{
		StartTime: time.Date(2026, 11, 22, 18, 5, 9, 12_345_678, time.UTC).UnixNano(), Begin: 1000 * ms, RequestEnd: 1002 * ms,
		UpstreamRequestEnd: 1003 * ms, ResponseBegin: 1010 * ms, DownstreamEnd: 1015 * ms, End: 1016*ms + 999_999,
		Protocol: HTTP11, Status: 200, Details: "via upstream", BytesReceived: 5, BytesSent: 1234,
		Request: req, Response: resp, ResponseTrailers: trailers,
		UpstreamHost: netip.MustParseAddrPort("10.0.0.7:9080"), UpstreamCluster: "outbound|9080||reviews.default.svc.cluster.local",
		UpstreamLocal: netip.MustParseAddrPort("10.0.0.3:41234"), Attempts: 2, RouteName: "default",
		ConnectionID: 42, DownstreamRemote: netip.MustParseAddrPort("[::ffff:10.0.0.3]:5555"),
		DownstreamDirect: netip.MustParseAddrPort("[fd00::1]:6666"), DownstreamLocal: netip.MustParseAddrPort("10.96.0.1:80"),
		StreamID: "id-1",
	}
}

func TestOperatorsSayWhatEnvoySays(t *testing.T) {
	t.Setenv("SOCKMESH_TEST_ENV", "value")
	for format, want := range map[string]string{
		"":                                   "",
		"plain 100%%":                        "plain 100%",
		"%START_TIME%":                       "2026-11-22T18:05:09.012Z",
		"%START_TIME(%Y/%m/%d %H:%M:%S)%":    "2026/11/22 18:05:09",
		"%START_TIME(%s.%3f %6f %9f %f)%":    "1795370709.012 012345 012345678 012345678",
		"%START_TIME(%a %b %e %T %y %j %z)%": "Sun Nov 22 18:05:09 26 326 +0000",
		"%REQ(:METHOD)% %REQ(:path)% %REQ(:AUTHORITY)% %REQ(:SCHEME)%":                                   "GET /rewritten?q=1&r=two reviews:9080 http",
		"%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%":                                                             "/original?q=1",
		"%REQ(X-ABSENT?:PATH)%":                                                                          "/rewritten?q=1&r=two",
		"%REQ(X-ABSENT)%|%REQ(X-ABSENT?Y-ABSENT)%":                                                       "-|-",
		"%REQ(USER-AGENT):4%":                                                                            "curl",
		"%REQ(USER-AGENT):100%":                                                                          "curl/8.5.0",
		"%REQ_WITHOUT_QUERY(X-ENVOY-ORIGINAL-PATH?:PATH)%":                                               "/original",
		"%PATH(NQ:PATH)% %PATH(WQ:ORIG)% %PATH%":                                                         "/rewritten /original?q=1 /original?q=1",
		"%QUERY_PARAM(r)% %QUERY_PARAM(s)%":                                                              "two -",
		"%RESP(X-Envoy-Upstream-Service-Time)% %TRAILER(GRPC-STATUS)%":                                   "7 14",
		"%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS_NUMBER%":                                 "Unavailable UNAVAILABLE 14",
		"%PROTOCOL% %UPSTREAM_PROTOCOL%":                                                                 "HTTP/1.1 -",
		"%RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS%":                                       "200 via_upstream -",
		"%BYTES_RECEIVED% %BYTES_SENT%":                                                                  "5 1234",
		"%DURATION% %REQUEST_DURATION% %REQUEST_TX_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%": "16 2 3 10 5",
		"%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS% %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%": "10.0.0.7:9080 10.0.0.7:9080 10.0.0.7 9080",
		"%UPSTREAM_CLUSTER% %UPSTREAM_LOCAL_ADDRESS%":                                                             "outbound|9080||reviews.default.svc.cluster.local 10.0.0.3:41234",
		"%UPSTREAM_TRANSPORT_FAILURE_REASON% %UPSTREAM_REQUEST_ATTEMPT_COUNT%":                                    "- 2",
		"%ROUTE_NAME% %VIRTUAL_CLUSTER_NAME% %FILTER_CHAIN_NAME% %REQUESTED_SERVER_NAME%":                         "default - - -",
		"%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%":           "10.0.0.3:5555 10.0.0.3 5555",
		"%DOWNSTREAM_DIRECT_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%":                      "[fd00::1]:6666 fd00::1",
		"%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_PORT%":                                                      "10.96.0.1:80 80",
		"%CONNECTION_ID% %STREAM_ID%":                                                     "42 id-1",
		"%ENVIRONMENT(SOCKMESH_TEST_ENV)% %ENVIRONMENT(SOCKMESH_TEST_NONE)%":              "value -",
		"%DYNAMIC_METADATA(a:b)% %FILTER_STATE(x:PLAIN)%":                                 "- -",
		"%CEL(request.method)% %CEL(request.headers['USER-AGENT'])% %CEL(response.code)%": "GET curl/8.5.0 200",
	} {
		f, err := CompileFormat(format)
		if err != nil {
			t.Errorf("%s: %v", format, err)
			continue
		}
		if got := string(f.AppendText(nil, sampleRecord(), "-")); got != want {
			t.Errorf("%s:\ngot  %s\nwant %s", format, got, want)
		}
	}
	name, _ := os.Hostname()
	f, err := CompileFormat("%HOSTNAME%")
	if err != nil || string(f.Append(nil, &Record{})) != name {
		t.Errorf("HOSTNAME: %v", err)
	}
}

func TestAFailureReasonHasNoBlanks(t *testing.T) {
	f, err := CompileFormat("%UPSTREAM_TRANSPORT_FAILURE_REASON%")
	if err != nil {
		t.Fatal(err)
	}
	r := sampleRecord()
	r.UpstreamTransportFailure = "delayed connect error: Connection refused"
	if got := string(f.AppendText(nil, r, "-")); got != "delayed_connect_error:_Connection_refused" {
		t.Error(got)
	}
}

func TestAHeaderValueIsTakenAsItIs(t *testing.T) {
	f, err := CompileFormat("<%REQ(USER-AGENT)%|%REQ(X-ABSENT)%|\"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\">")
	if err != nil {
		t.Fatal(err)
	}
	if got := string(f.Append(nil, sampleRecord())); got != "<curl/8.5.0||\"10.0.0.3\">" {
		t.Error(got)
	}
}

func TestNothingKnownPrintsDashes(t *testing.T) {
	f, err := CompileFormat(DefaultFormat)
	if err != nil {
		t.Fatal(err)
	}
	want := "[-] \"- - -\" 0 - 0 0 - - \"-\" \"-\" \"-\" \"-\" \"-\"\n"
	if got := string(f.AppendText(nil, &Record{}, "-")); got != want {
		t.Errorf("got  %swant %s", got, want)
	}
}

func TestTheDefaultFormatIsEnvoys(t *testing.T) {
	lg, err := Compile(&mesh.AccessLog{})
	if err != nil {
		t.Fatal(err)
	}
	r := sampleRecord()
	r.Flags = UF | URX
	want := `[2026-11-22T18:05:09.012Z] "GET /original?q=1 HTTP/1.1" 200 UF,URX 5 1234 16 7 "-" "curl/8.5.0" "id-1" ` +
		`"reviews:9080" "10.0.0.7:9080"` + "\n"
	if got := string(lg.AppendLine(nil, r)); got != want {
		t.Errorf("got  %swant %s", got, want)
	}
}

func TestAWrongFormatNamesTheOperator(t *testing.T) {
	for format, want := range map[string]string{
		"a %NO_SUCH_THING% b":  `at offset 2: %NO_SUCH_THING%: unknown command operator "NO_SUCH_THING"`,
		"%REQ%":                "%REQ%: REQ needs an argument",
		"%REQ()%":              `"" is not NAME or NAME?ALTERNATIVE`,
		"%REQ(a?)%":            `"a?" is not NAME or NAME?ALTERNATIVE`,
		"%PROTOCOL(x)%":        "PROTOCOL takes no argument",
		"%REQ(a%":              "the parenthesis is not closed",
		"%REQ(a):x%":           "the length after the colon must be a positive number",
		"%PROTOCOL":            "does not end in %",
		"100% sure":            "a % must begin a command operator",
		"%START_TIME(%Q)%":     "unknown specifier %Q",
		"%START_TIME(%3d)%":    "a digit must be followed by f",
		"%CEL(a ? b : c)%":     "only a bare attribute",
		"%GRPC_STATUS(ROMAN)%": "is not CAMEL_STRING",
		"%PATH(XX)%":           "is not WQ or NQ",
	} {
		_, err := CompileFormat(format)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want …%s…", format, err, want)
		}
	}
	_, err := Compile(&mesh.AccessLog{JSON: map[string]any{"a": map[string]any{"b": []any{"x", "%NOPE%"}}}})
	if err == nil || !strings.HasPrefix(err.Error(), "json_format.a.b[1]: ") {
		t.Errorf("JSON: %v", err)
	}
}

func TestHostileValuesCannotForgeALine(t *testing.T) {
	r := sampleRecord()
	// A value that no parser would let through.
	evil := "a\"b\nc\x7f\x00\\\xff\u00e9"
	raw := "x" + evil
	r.Request.Reset()
	r.Request.StageField(0, 1, 1, len(evil))
	r.Request.Import([]byte(raw), 0)

	f, err := CompileFormat("%REQ(x)% \"%REQ(x)%\"")
	if err != nil {
		t.Fatal(err)
	}
	want := `a"b\x0ac\x7f\x00\` + "\xffé" + ` "a\"b\x0ac\x7f\x00\` + "\xffé\""
	if got := string(f.AppendText(nil, r, "-")); got != want {
		t.Errorf("text\ngot  %q\nwant %q", got, want)
	}
	lg, err := Compile(&mesh.AccessLog{JSON: map[string]any{"x": "%REQ(x)%", "y": "<%REQ(x)%>"}})
	if err != nil {
		t.Fatal(err)
	}
	esc := `a\"b\nc\u007f\u0000\\\u00ffé`
	if got, want := string(lg.AppendLine(nil, r)), `{"x":"`+esc+`","y":"<`+esc+`>"}`+"\n"; got != want {
		t.Errorf("JSON\ngot  %s\nwant %s", got, want)
	}
}

// The expected lines are what Envoy 1.40 writes for the same configuration.
func TestJSONKeepsTypes(t *testing.T) {
	config := map[string]any{
		"code": "%RESPONSE_CODE%", "took": "%DURATION%", "none": "%REQ(X-ABSENT)%", "mixed": "%PROTOCOL%/%REQ(X-ABSENT)%",
		"flags": "%RESPONSE_FLAGS%", "lit": "a\"b", "list": []any{"%BYTES_SENT%", 1.5, true, nil},
		"nested": map[string]any{"late": "%RESPONSE_DURATION%", "z": "%REQ(:METHOD)%"}, "empty": map[string]any{"a": "%REQ(X-ABSENT)%"},
		"env": "%ENVIRONMENT(SOCKMESH_TEST_NONE)%",
	}
	r := sampleRecord()
	r.ResponseBegin = 0
	for omit, want := range map[bool]string{
		false: `{"code":200,"empty":{"a":null},"env":"-","flags":"-","list":[1234,"1.5",true,null],"lit":"a\"b","mixed":"HTTP/1.1/-","nested":{"late":null,"z":"GET"},"none":null,"took":16}`,
		true:  `{"code":200,"env":"-","flags":"-","list":[1234,"1.5",true],"lit":"a\"b","mixed":"HTTP/1.1/","nested":{"z":"GET"},"took":16}`,
	} {
		lg, err := Compile(&mesh.AccessLog{JSON: config, OmitEmpty: omit})
		if err != nil {
			t.Fatal(err)
		}
		if got := string(lg.AppendLine(nil, r)); got != want+"\n" {
			t.Errorf("omit %v\ngot  %swant %s", omit, got, want)
		}
	}
}

func TestFlagsHaveEnvoysNames(t *testing.T) {
	if got := (UF | URX | NR).String(); got != "UF,NR,URX" {
		t.Error(got)
	}
	if got := string((DC | NC).Append(nil, true)); got != "DownstreamConnectionTermination,NoClusterFound" {
		t.Error(got)
	}
	if got := Flags(0).String(); got != "-" {
		t.Error(got)
	}
	if len(flagNames) != 30 || endOfFlags != 1<<30 {
		t.Errorf("%d names for %b", len(flagNames), endOfFlags)
	}
	for i := range flagNames {
		if f, ok := ParseFlag(flagNames[i].short); !ok || f != 1<<i || f.String() != flagNames[i].short {
			t.Errorf("%s does not come back: %s", flagNames[i].short, f)
		}
	}
}

func TestFiltersDecide(t *testing.T) {
	ppm := func(n uint32) *mesh.AccessLogFilter { return &mesh.AccessLogFilter{FractionPPM: &n} }
	status := func(op byte, v uint64) *mesh.AccessLogFilter {
		return &mesh.AccessLogFilter{StatusCode: &mesh.Comparison{Op: op, Value: v}}
	}
	for name, c := range map[string]struct {
		f    *mesh.AccessLogFilter
		want bool
	}{
		"none":                 {nil, true},
		"status =":             {status('=', 200), true},
		"status >=":            {status('>', 500), false},
		"status <=":            {status('<', 200), true},
		"status !=":            {status('!', 200), false},
		"duration":             {&mesh.AccessLogFilter{DurationMS: &mesh.Comparison{Op: '>', Value: 16}}, true},
		"longer duration":      {&mesh.AccessLogFilter{DurationMS: &mesh.Comparison{Op: '>', Value: 17}}, false},
		"a flag":               {&mesh.AccessLogFilter{ResponseFlags: []string{"NR", "UF"}}, true},
		"another flag":         {&mesh.AccessLogFilter{ResponseFlags: []string{"NR"}}, false},
		"any flag":             {&mesh.AccessLogFilter{ResponseFlags: []string{}}, true},
		"health checks":        {&mesh.AccessLogFilter{NotHealth: true}, true},
		"all":                  {ppm(1_000_000), true},
		"nothing":              {ppm(0), false},
		"and":                  {&mesh.AccessLogFilter{And: []*mesh.AccessLogFilter{status('=', 200), status('>', 300)}}, false},
		"or":                   {&mesh.AccessLogFilter{Or: []*mesh.AccessLogFilter{status('=', 1), status('<', 300)}}, true},
		"a header that is":     {&mesh.AccessLogFilter{Header: &mesh.HeaderMatcher{Name: "user-agent", Kind: mesh.MatchPresent, Present: true}}, true},
		"a header that is not": {&mesh.AccessLogFilter{Header: &mesh.HeaderMatcher{Name: "x", Kind: mesh.MatchPresent, Present: true}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := compileFilter(c.f)
			if err != nil {
				t.Fatal(err)
			}
			r := sampleRecord()
			r.Flags = UF
			if got := f == nil || f(r, 12345); got != c.want {
				t.Errorf("logged: %v", got)
			}
		})
	}
	if _, err := compileFilter(&mesh.AccessLogFilter{ResponseFlags: []string{"XX"}}); err == nil {
		t.Error("an unknown flag is accepted")
	}
}

func TestAFractionIsLogged(t *testing.T) {
	n := uint32(250_000)
	f, _ := compileFilter(&mesh.AccessLogFilter{FractionPPM: &n})
	logged := 0
	for i := range uint64(10_000) {
		if f(&Record{}, i*0xd1342543de82ef95+1) {
			logged++
		}
	}
	if logged < 2300 || logged > 2700 {
		t.Errorf("%d of 10000 with a quarter", logged)
	}
}
