package kube

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/service"
)

const webYAML = `
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.1
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  labels: {kubernetes.io/service-name: web}
addressType: IPv4
ports: [{port: 8080}]
endpoints:
- addresses: [10.0.0.1]
`

const webView = "10.96.0.1:80 -> 10.0.0.1:8080"

// folder is a folder of manifests with a running source.
type testFolder struct {
	*ledger
	t      *testing.T
	dir    string
	source Source
}

func newFolder(t *testing.T, files map[string]string) *testFolder {
	t.Helper()
	f := &testFolder{ledger: newLedger(t), t: t, dir: t.TempDir()}
	for name, content := range files {
		f.write(name, content)
	}
	source, err := NewManifests(Config{NodeName: "here", Handler: f.ledger, Logger: slog.New(slog.DiscardHandler)}, f.dir)
	if err != nil {
		t.Fatal(err)
	}
	f.source = source
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- source.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	eventually(t, "synced", func() bool { return source.Status().Synced })
	return f
}

func (f *testFolder) write(name, content string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *testFolder) remove(name string) {
	f.t.Helper()
	if err := os.RemoveAll(filepath.Join(f.dir, name)); err != nil {
		f.t.Fatal(err)
	}
}

// errors waits until Status shows exactly so many errors, which contain the texts.
func (f *testFolder) errors(count int, texts ...string) {
	f.t.Helper()
	ok := func() bool {
		errs := f.source.Status().Errors
		all := strings.Join(errs, "\n")
		for _, text := range texts {
			if !strings.Contains(all, text) {
				return false
			}
		}
		return len(errs) == count
	}
	defer func() {
		if f.t.Failed() {
			f.t.Logf("errors: %q", f.source.Status().Errors)
		}
	}()
	eventually(f.t, strings.Join(texts, ", "), ok)
}

func TestAFolderIsServedAndFollowed(t *testing.T) {
	f := newFolder(t, map[string]string{"web.yaml": webYAML})
	f.eventually(webView)
	if st := f.source.Status(); st.Services != 1 || st.Endpoints != 1 || st.Source != f.dir || len(st.Errors) > 0 {
		t.Errorf("%+v", st)
	}
	f.write("web.yaml", strings.Replace(webYAML, "10.0.0.1", "10.0.0.2", 1))
	f.eventually("10.96.0.1:80 -> 10.0.0.2:8080")

	f.write("more/deep/b.yml", strings.NewReplacer("web", "b", "10.96.0.1", "10.96.0.2").Replace(webYAML))
	f.eventually("10.96.0.1:80 -> 10.0.0.2:8080", "10.96.0.2:80 -> 10.0.0.1:8080")
	f.write("more/deep/b.yml", strings.NewReplacer("web", "b", "10.96.0.1", "10.96.0.3").Replace(webYAML))
	f.eventually("10.96.0.1:80 -> 10.0.0.2:8080", "10.96.0.3:80 -> 10.0.0.1:8080")

	f.remove("more")
	f.eventually("10.96.0.1:80 -> 10.0.0.2:8080")
	f.write("more/deep/b.yml", strings.NewReplacer("web", "b", "10.96.0.1", "10.96.0.2").Replace(webYAML))
	f.eventually("10.96.0.1:80 -> 10.0.0.2:8080", "10.96.0.2:80 -> 10.0.0.1:8080")
	f.remove("web.yaml")
	f.eventually("10.96.0.2:80 -> 10.0.0.1:8080")
}

func TestJSONAndListsAreManifestsToo(t *testing.T) {
	f := newFolder(t, map[string]string{
		"service.json": "{\n\t\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"web\"},\n\t\"spec\": {\"clusterIPs\": [\"10.96.0.1\", \"fd00::1\"], \"ports\": [{\"port\": 80}]}}\n",
		"list.yaml": `
apiVersion: v1
kind: List
items:
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: four, labels: {kubernetes.io/service-name: web}}
  addressType: IPv4
  ports: [{port: 8080}]
  endpoints: [{addresses: [10.0.0.1]}]
`,
		"typed.yaml": `
kind: EndpointSliceList
apiVersion: discovery.k8s.io/v1
items:
- metadata: {name: six, labels: {kubernetes.io/service-name: web}}
  addressType: IPv6
  ports: [{port: 8080}]
  endpoints: [{addresses: ["fd01::1"]}]
`,
		"two.json": `{"kind":"Namespace","apiVersion":"v1","metadata":{"name":"x","labels":{"sockmesh.io/enroll":"true"}}}
{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p","namespace":"x"},"spec":{"nodeName":"here"},"status":{"podIPs":[{"ip":"10.0.0.9"},{"ip":"fd01::9"}]}}`,
	})
	f.eventually("10.96.0.1:80 -> 10.0.0.1:8080", "[fd00::1]:80 -> [fd01::1]:8080", "pod x/p [10.0.0.9 fd01::9] enrolled")
	f.errors(0)
}

func TestOnlyThisNodesPodsCountAndThoseWithoutANode(t *testing.T) {
	pod := func(name, more string) string {
		return "---\napiVersion: v1\nkind: Pod\nmetadata: {name: " + name + "}\n" + more
	}
	f := newFolder(t, map[string]string{"pods.yaml": pod("mine", "spec: {nodeName: here}\nstatus: {podIP: 10.0.0.1}\n") +
		pod("other", "spec: {nodeName: there}\nstatus: {podIP: 10.0.0.2}\n") +
		pod("any", "status: {podIP: 10.0.0.3}\n")})
	f.eventually("pod default/mine [10.0.0.1]", "pod default/any [10.0.0.3]")
	f.write("pods.yaml", pod("mine", "spec: {nodeName: there}\nstatus: {podIP: 10.0.0.1}\n"))
	f.eventually()
}

func TestABadDocumentKeepsItsLastGoodVersionAndTheRestWorks(t *testing.T) {
	good := func(ip string) string {
		return "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  clusterIP: " + ip + "\n  ports: [{port: 80}]\n"
	}
	other := func(ip string) string { return "---\n" + strings.Replace(good(ip), "name: a", "name: b", 1) }
	f := newFolder(t, map[string]string{"x.yaml": good("10.96.0.1") + other("10.96.0.2")})
	f.eventually("10.96.0.1:80 ->", "10.96.0.2:80 ->")
	for _, bad := range []struct{ name, document, complaint string }{
		{"a wrong value", good("nonsense"), `x.yaml, document 1: Service default/a: spec.clusterIPs[0]: Invalid value: "nonsense": expected an IP address`},
		{"a wrong type", strings.Replace(good("10.96.0.1"), "80", "http", 1), `x.yaml, document 1: Service default/a: spec.ports[0].port: Invalid value: "http": expected a whole number`},
		{"a missing field", strings.Replace(good("10.96.0.1"), "ports", "#", 1), `Service default/a: spec.ports: Required value: expected at least one port`},
		{"a port out of range", strings.Replace(good("10.96.0.1"), "80", "65536", 1), `spec.ports[0].port: Invalid value: 65536: expected 1 to 65535`},
		{"no YAML at all", "apiVersion: v1\nkind: Service\n  metadata: {\n", `x.yaml, document 1: not YAML: line 3`},
		{"no kind", "apiVersion: v1\nmetadata: {name: a}\n", `x.yaml, document 1: kind: Required value`},
		{"no name", "apiVersion: v1\nkind: Service\nmetadata: {}\n", `x.yaml, document 1: Service: metadata.name: Required value`},
		{"another version", strings.Replace(good("10.96.0.1"), "v1", "v2", 1), `apiVersion: Unsupported value: "v2": expected v1`},
	} {
		t.Run(bad.name, func(t *testing.T) {
			f.t = t
			f.write("x.yaml", bad.document+other("10.96.0.3"))
			f.errors(1, bad.complaint)
			f.eventually("10.96.0.1:80 ->", "10.96.0.3:80 ->")
			f.write("x.yaml", good("10.96.0.1")+other("10.96.0.2"))
			f.errors(0)
			f.eventually("10.96.0.1:80 ->", "10.96.0.2:80 ->")
		})
	}
	f.t = t
	f.remove("x.yaml")
	f.eventually()
}

func TestErrorsNameTheLineWithinTheFile(t *testing.T) {
	f := newFolder(t, map[string]string{"x.yaml": webYAML + "---\n# comment\nkind: [\n"})
	f.errors(1, "x.yaml, document 3: not YAML: line 20")
	f.eventually(webView)
}

func TestAnObjectInTwoFilesIsAnErrorThatNamesBothAndTheFirstStays(t *testing.T) {
	f := newFolder(t, map[string]string{"b.yaml": webYAML})
	f.eventually(webView)
	f.write("a.yaml", strings.Replace(webYAML, "10.96.0.1", "10.96.0.9", 1))
	f.errors(2, "a.yaml, document 1: Service default/web: Duplicate: it is in b.yaml, document 1 as well, which counts",
		"a.yaml, document 2: EndpointSlice default/web-1: Duplicate")
	f.stays(webView)
	f.remove("b.yaml")
	f.eventually("10.96.0.9:80 -> 10.0.0.1:8080")
	f.errors(0)
}

func TestAFileThatCannotBeReadOrIsEmptyKeepsWhatItHad(t *testing.T) {
	f := newFolder(t, map[string]string{"web.yaml": webYAML})
	f.write("web.yaml", "")
	f.errors(1, "web.yaml: the file is empty")
	f.stays(webView)
	f.write("web.yaml", webYAML)
	f.errors(0)

	if err := os.Rename(f.dir, f.dir+"-away"); err != nil {
		t.Fatal(err)
	}
	f.errors(1, "no such file or directory")
	f.stays(webView)
	if err := os.Rename(f.dir+"-away", f.dir); err != nil {
		t.Fatal(err)
	}
	f.errors(0)
	f.write("web.yaml", strings.Replace(webYAML, "10.0.0.1", "10.0.0.2", 1))
	f.eventually("10.96.0.1:80 -> 10.0.0.2:8080")
}

func TestAConfigMapVolumeIsFollowed(t *testing.T) {
	f := newFolder(t, map[string]string{"..v1/web.yaml": webYAML})
	link := func(target, name string) {
		if err := os.Symlink(target, filepath.Join(f.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("..v1", "..data")
	link("..data/web.yaml", "web.yaml")
	f.eventually(webView)
	// The kubelet's way: a new folder, and the link swapped in one step.
	f.write("..v2/web.yaml", strings.Replace(webYAML, "10.0.0.1", "10.0.0.2", 1))
	link("..v2", "..data_tmp")
	if err := os.Rename(filepath.Join(f.dir, "..data_tmp"), filepath.Join(f.dir, "..data")); err != nil {
		t.Fatal(err)
	}
	f.eventually("10.96.0.1:80 -> 10.0.0.2:8080")
}

func TestUnknownFieldsAndUnusedKindsDoNotDisturb(t *testing.T) {
	p := parseFile("x.yaml", []byte(`
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.1, clusterIp: x, ports: [{port: 80, colour: red}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec: {anything: goes}
---
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: web}
---
apiVersion: v1
kind: Endpoints
metadata: {name: web}
---
apiVersion: v1
kind: Namespace
metadata: {name: ns, labels: {sockmesh.io/enroll: "yes"}}
`))
	if len(p.errors) > 0 || len(p.objects) != 2 || len(p.ignored) != 2 {
		t.Errorf("errors %q, objects %v, ignored %q", p.errors, p.objects, p.ignored)
	}
	all := strings.Join(p.warnings, "\n")
	for _, want := range []string{
		`x.yaml, document 1: Service default/web: unknown field "spec.clusterIp" (ignored)`,
		`unknown field "spec.ports[0].colour" (ignored)`,
		`x.yaml, document 4: Endpoints /web is ignored: give an EndpointSlice`,
		`x.yaml, document 5: Namespace ns: metadata.labels[sockmesh.io/enroll]: "yes" says nothing: expected true or false`,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("not warned: %s\nbut: %s", want, all)
		}
	}
}

func TestConversionFillsInTheAPIsDefaults(t *testing.T) {
	p := parseFile("x.yaml", []byte(`
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: "::ffff:10.96.0.1", sessionAffinity: ClientIP, ports: [{port: 80, name: a}, {port: 81, name: s, protocol: SCTP}]}
`))
	o := p.objects[0].value.(*service.Object)
	if o.Affinity.Seconds() != 10800 || o.ClusterIPs[0].String() != "10.96.0.1" || len(o.Ports) != 1 || o.Ports[0].Protocol != service.TCP {
		t.Errorf("%+v", o)
	}
	if len(o.Problems) != 1 || o.Problems[0].Field != "spec.ports[1].protocol" {
		t.Errorf("%+v", o.Problems)
	}
}

func TestNewManifestsRefusesWhatIsNoFolder(t *testing.T) {
	for _, dir := range []string{"/nonexistent", "/etc/hostname"} {
		if _, err := NewManifests(Config{NodeName: "n", Handler: newLedger(t)}, dir); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

func FuzzParseFile(f *testing.F) {
	f.Add("x.yaml", []byte(webYAML))
	f.Add("x.json", []byte(`{"kind":"List","apiVersion":"v1","items":[{}]}`))
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		p := parseFile(name, content)
		for _, o := range p.objects {
			if o.key.name == "" {
				t.Error("an object without a name")
			}
		}
	})
}
