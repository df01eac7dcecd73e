package xds

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
)

var update = flag.Bool("update", false, "write testdata anew")

// corpus is real control-plane output, kept outside the project.
const corpus = "../../../shared/corpora/envoy-gateway"

// TestEnvoyGatewayCorpus compiles what a real control plane emits: each resource is accepted, or refused with a
// reason that names the field. The counts by reason are kept in testdata, so that a change of what is supported
// shows in a diff; `go test -run Corpus -update` writes them.
func TestEnvoyGatewayCorpus(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(corpus, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Skipf("%s is not here: this part runs where the corpus is", corpus)
	}
	files = slices.DeleteFunc(files, func(f string) bool { return typeByFileName(f) == "" }) // patches, which are no resources
	counts := map[string]int{}
	total, accepted := map[string]int{}, map[string]int{}
	for _, v := range ValidateFiles(files) {
		total[v.Type]++
		if v.OK() {
			accepted[v.Type]++
		}
		for _, r := range v.Refused {
			if r.Field == "" {
				t.Errorf("%s: %s %q: refused without a field: %s", v.File, v.Type, v.Name, r.Reason)
			}
			counts["refused "+v.Type+" "+summary(r.Field)+": "+summary(r.Reason)]++
		}
		for _, field := range v.Ignored {
			counts["ignored "+v.Type+" "+summary(field)]++
		}
	}
	var b bytes.Buffer
	b.WriteString("# Envoy Gateway's golden cases: what is accepted, and why the rest is not. Written by go test ./pkg/xds -run Corpus -update\n")
	for _, kind := range slices.Sorted(maps.Keys(total)) {
		fmt.Fprintf(&b, "%5d of %5d %ss accepted\n", accepted[kind], total[kind], kind)
	}
	for _, reason := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(&b, "%5d %s\n", counts[reason], reason)
	}
	golden(t, "envoy-gateway.txt", b.Bytes())
}

var (
	indices = regexp.MustCompile(`\[[^\]]*\]`)
	quoted  = regexp.MustCompile(`"[^"]*"`)
)

// summary leaves out what differs from case to case.
func summary(s string) string {
	return quoted.ReplaceAllString(indices.ReplaceAllString(s, ""), `"…"`)
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		wantLines := strings.Split(string(want), "\n")
		for line := range strings.Lines(string(got)) {
			if !slices.Contains(wantLines, strings.TrimSuffix(line, "\n")) {
				t.Errorf("new: %s", line)
			}
		}
		t.Errorf("%s differs; if that is meant, write it with -update", file)
	}
}

func TestTheFileNameTellsTheType(t *testing.T) {
	v := Validate("x.clusters.yaml", []byte("- "+staticClusterYAML("a", 80)+"\n- {name: b, type: STATIC, bogus: 1}"))
	if len(v) != 2 || v[0].OK() || v[0].Where != "resource 2" || !strings.Contains(v[0].Refused[0].Reason, `line 2: "b": unknown field "bogus"`) || !v[1].OK() || v[1].Name != "a" {
		t.Errorf("%+v", v)
	}
	if v = Validate("x.yaml", []byte("{name: a}")); v[0].OK() || !strings.Contains(v[0].Refused[0].Reason, "no @type") {
		t.Errorf("%+v", v)
	}
}

func TestValidateABootstrapWithItsStaticResources(t *testing.T) {
	v := Validate("envoy.yaml", []byte(`
admin: {}
static_resources: {clusters: [`+staticClusterYAML("a", 80)+`, `+badClusterYAML("b")+`]}
dynamic_resources: {lds_config: {ads: {}}}
`))
	if len(v) != 3 || v[0].Type != "bootstrap" || v[0].OK() || !strings.Contains(v[0].Refused[0].Reason, "dynamic_resources.lds_config: ads: the bootstrap has no dynamic_resources.ads_config") {
		t.Fatalf("%+v", v)
	}
	if !slices.Equal(v[0].Ignored, []string{"admin"}) || !v[1].OK() || v[2].OK() || v[2].Refused[0].Field != "lb_policy" {
		t.Errorf("%+v", v)
	}
}

func TestWrongBootstrapsNameFileAndField(t *testing.T) {
	for text, want := range map[string]string{
		"static_resource: {}": `b.yaml: line 1: unknown field "static_resource"`,
		"node: [":             "b.yaml: ",
		"dynamic_resources: {lds_resources_locator: 'xdstp://x'}": "b.yaml: dynamic_resources.lds_resources_locator",
	} {
		if _, err := ParseBootstrap("b.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for text, want := range map[string]string{
		"{cds_config: {api_config_source: {api_type: REST, cluster_names: [x]}}}":                                              "b.yaml: dynamic_resources.cds_config: api_type: REST",
		"{cds_config: {api_config_source: {api_type: GRPC, grpc_services: [{envoy_grpc: {cluster_name: x}}]}}}":                `grpc_services[0]: envoy_grpc.cluster_name: "x" is not in static_resources.clusters`,
		"{cds_config: {api_config_source: {api_type: GRPC, grpc_services: [{google_grpc: {target_uri: x, stat_prefix: x}}]}}}": "google_grpc.target_uri",
	} {
		b, err := ParseBootstrap("b.yaml", []byte("dynamic_resources: "+text))
		if err == nil {
			_, err = New(Config{Bootstrap: b})
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for _, address := range []string{"", "host", "host:0", ":80", "unix://"} {
		if _, err := BootstrapForServer(address); err == nil || !strings.Contains(err.Error(), "--xds") {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestDumpsHoldNoSecrets(t *testing.T) {
	b, err := ParseBootstrap("b.yaml", []byte(`
static_resources:
  clusters:
  - name: c
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context: {tls_certificates: [{certificate_chain: {inline_string: public}, private_key: {inline_string: hidden}, password: {inline_string: hidden}}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	dump := string(Redacted(b.proto))
	if strings.Contains(dump, "hidden") || !strings.Contains(dump, "public") || !strings.Contains(dump, redacted) {
		t.Error(dump)
	}
	secret := &tlsv3.Secret{}
	if err := unmarshalYAML([]byte(`{name: s, generic_secret: {secret: {inline_string: hidden}}}`), secret); err != nil {
		t.Fatal(err)
	}
	if dump = string(Redacted(secret)); strings.Contains(dump, "hidden") {
		t.Error(dump)
	}
}

func FuzzParseResources(f *testing.F) {
	f.Add("x.clusters.yaml", []byte("- "+staticClusterYAML("a", 80)))
	f.Add("x.yaml", []byte(`{"@type": type.googleapis.com/envoy.config.listener.v3.Listener, name: l}`))
	f.Add("b.yaml", []byte("static_resources: {clusters: [{name: c}]}\n---\n[]"))
	f.Fuzz(func(_ *testing.T, name string, data []byte) {
		Validate(name, data)
	})
}
