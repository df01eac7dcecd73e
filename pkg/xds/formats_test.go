package xds

import (
	"strings"
	"testing"
)

func TestAnUnknownCommandOperatorIsRefusedByItsName(t *testing.T) {
	got := Validate("x.routes.yaml", []byte(`
name: r
virtual_hosts:
- name: v
  domains: ["*"]
  request_headers_to_add:
  - header: {key: x-a, value: "%REQ(x-b)% %NO_SUCH_THING%"}
  routes:
  - match: {prefix: /}
    direct_response: {status: 200}
`))
	if len(got) != 1 || len(got[0].Refused) != 1 {
		t.Fatalf("%+v", got)
	}
	r := got[0].Refused[0]
	if !strings.Contains(r.Reason, "NO_SUCH_THING") || !strings.HasSuffix(r.Field, "request_headers_to_add[0].header.value") {
		t.Errorf("refused %+v", r)
	}
}
