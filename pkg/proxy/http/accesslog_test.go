package http_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

func TestEveryRequestHasItsLineInTheAccessLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "access.log")
	u := proxytest.Answer(t, ok)
	p := start(t, `
access_log:
- name: envoy.access_loggers.file
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
    path: `+file+`
    log_format: {text_format_source: {inline_string: "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %BYTES_RECEIVED% %BYTES_SENT% %UPSTREAM_HOST% %UPSTREAM_CLUSTER% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %REQUEST_HEADERS_BYTES% %RESP(SERVER)% %DURATION%\n"}}
`, u)
	c := proxytest.Dial(t, p.Addr)
	c.Send("GET /a?b HTTP/1.1\r\nHost: a\r\n\r\n")
	response(t, c)
	c.Send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc")
	response(t, c)
	c.Send("nonsense\r\n\r\n")
	response(t, c)
	want := regexp.MustCompile(`^GET /a\?b HTTP/1\.1 200 - via_upstream 0 2 ` + regexp.QuoteMeta(u.Addr) + ` u 127\.0\.0\.1 \d\d envoy \d+
POST /x HTTP/1\.1 200 - via_upstream 3 2 ` + regexp.QuoteMeta(u.Addr) + ` u 127\.0\.0\.1 \d\d envoy \d+
- - HTTP/1\.1 400 DPE http1\.\w+ 0 11 - - 127\.0\.0\.1 \d+ envoy \d+
$`)
	var got []byte
	for deadline := time.Now().Add(20 * time.Second); strings.Count(string(got), "\n") < 3 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		got, _ = os.ReadFile(file)
	}
	if !want.Match(got) {
		t.Errorf("got\n%s", got)
	}
}
