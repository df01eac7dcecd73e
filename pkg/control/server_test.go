package control

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/xds"
)

const patience = 20 * time.Second

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func clusterFile(name, ip string) string {
	return `
- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: ` + name + `
  type: EDS
  eds_cluster_config: {eds_config: {self: {}}}
- "@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment
  cluster_name: ` + name + `
  endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: ` + ip + `, port_value: 80}}}}]}]
`
}

const listenerFile = `
name: l
address: {socket_address: {address: 10.96.0.10, port_value: 80}}
bind_to_port: false
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: x
      rds: {route_config_name: r, config_source: {self: {}}}
      http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
---
"@type": type.googleapis.com/envoy.config.route.v3.RouteConfiguration
name: r
virtual_hosts: [{name: v, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: a}}]}]
`

// folder makes a folder with one listener, route, cluster and endpoint, and serves it.
func folder(t *testing.T, cfg Config) (server *Server, address string, stop func()) {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
		write(t, filepath.Join(cfg.Dir, "clusters.yaml"), clusterFile("a", "192.0.2.1"))
		write(t, filepath.Join(cfg.Dir, "x.listeners.yaml"), listenerFile)
	}
	cfg.Logger = slog.New(slog.DiscardHandler)
	server, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			t.Error("Serve does not end")
		}
	}
	t.Cleanup(stop)
	return server, l.Addr().String(), stop
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func client(t *testing.T, b *xds.Bootstrap) *xds.Client {
	t.Helper()
	c, err := xds.New(xds.Config{Bootstrap: b, NodeID: "node-1", Logger: slog.New(slog.DiscardHandler), BackoffBase: 10 * time.Millisecond, BackoffMax: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return c
}

func endpointIs(c *xds.Client, ip string) func() bool {
	return func() bool {
		s := c.Snapshot()
		return s != nil && s.Listener("l") != nil && len(s.Listener("l").Chains[0].HTTP.Routes.Hosts) == 1 &&
			s.Clusters["a"] != nil && len(s.Clusters["a"].Endpoints) == 1 && s.Clusters["a"].Endpoints[0].Addr.Addr().String() == ip
	}
}

// bootstrap is one of the four gRPC variants.
func bootstrap(t *testing.T, address string, ads, delta bool) *xds.Bootstrap {
	t.Helper()
	api := "GRPC"
	if delta {
		api = "DELTA_GRPC"
	}
	source := `{api_type: ` + api + `, transport_api_version: V3, grpc_services: [{google_grpc: {target_uri: "` + address + `", stat_prefix: x}}]}`
	text := `dynamic_resources: {lds_config: {api_config_source: ` + source + `}, cds_config: {api_config_source: ` + source + `}}`
	if ads {
		text = `dynamic_resources: {ads_config: ` + source + `, lds_config: {ads: {}}, cds_config: {ads: {}}}`
	}
	b, err := xds.ParseBootstrap("b.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestEveryVariantServesTheFolderAndItsChanges(t *testing.T) {
	for _, ads := range []bool{true, false} {
		for _, delta := range []bool{true, false} {
			t.Run(fmt.Sprintf("ads=%v delta=%v", ads, delta), func(t *testing.T) {
				server, address, _ := folder(t, Config{})
				c := client(t, bootstrap(t, address, ads, delta))
				eventually(t, "the first set", endpointIs(c, "192.0.2.1"))
				write(t, filepath.Join(server.cfg.Dir, "clusters.yaml"), clusterFile("a", "192.0.2.2"))
				eventually(t, "the change", endpointIs(c, "192.0.2.2"))
			})
		}
	}
}

func TestABrokenFileLeavesTheLastGoodSetAndIsShown(t *testing.T) {
	server, address, _ := folder(t, Config{})
	c := client(t, bootstrap(t, address, true, true))
	eventually(t, "the first set", endpointIs(c, "192.0.2.1"))
	version := server.Status().Version
	broken := filepath.Join(server.cfg.Dir, "clusters.yaml")
	write(t, broken, clusterFile("a", "192.0.2.9")+"\n- {\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: b, conect_timeout: 1s}\n")
	eventually(t, "the error", func() bool { return len(server.Status().Errors) == 1 })
	problem := server.Status().Errors[0]
	if problem.File != broken || problem.Where != "resource 3" || !strings.Contains(problem.Error, `"conect_timeout"`) || !strings.Contains(problem.Error, `"b"`) {
		t.Errorf("%+v", problem)
	}
	if !endpointIs(c, "192.0.2.1")() || server.Status().Version != version {
		t.Error("the last good set does not serve any more")
	}
	write(t, broken, clusterFile("a", "192.0.2.3"))
	eventually(t, "the mended set", endpointIs(c, "192.0.2.3"))
	if len(server.Status().Errors) != 0 {
		t.Errorf("%+v", server.Status().Errors)
	}
}

func TestStatusShowsStreamsAndRefusals(t *testing.T) {
	server, address, _ := folder(t, Config{})
	c := client(t, bootstrap(t, address, true, false))
	eventually(t, "the first set", endpointIs(c, "192.0.2.1"))
	write(t, filepath.Join(server.cfg.Dir, "bad.yaml"), `{"@type": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: b, lb_policy: MAGLEV}`)
	eventually(t, "the refusal", func() bool {
		st := server.Status()
		return len(st.Streams) == 1 && strings.Contains(fmt.Sprint(st.Streams[0].Refused), `cluster "b": lb_policy`)
	})
	response, err := http.Get("http://" + address + "/status")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var st Status
	if err := json.NewDecoder(response.Body).Decode(&st); err != nil || st.Streams[0].Node != "node-1" || st.Resources["envoy.config.cluster.v3.Cluster"] != 2 {
		t.Errorf("%v %+v", err, st)
	}
}

func TestREST(t *testing.T) {
	_, address, _ := folder(t, Config{})
	fetch := func(body string) (int, string) {
		t.Helper()
		response, err := http.Post("http://"+address+"/v3/discovery:clusters", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		data, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, string(data)
	}
	code, body := fetch(`{"node": {"id": "n"}}`)
	var answer struct {
		Version   string `json:"version_info"`
		Resources []struct{ Name string }
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || code != http.StatusOK || len(answer.Resources) != 1 || answer.Resources[0].Name != "a" {
		t.Fatalf("%d %s %v", code, body, err)
	}
	if code, _ = fetch(`{"version_info": "` + answer.Version + `"}`); code != http.StatusNotModified {
		t.Errorf("the same version again: %d", code)
	}
	if code, _ = fetch(`{`); code != http.StatusBadRequest {
		t.Errorf("not JSON: %d", code)
	}
}

func TestStopEndsOpenStreams(t *testing.T) {
	_, address, stop := folder(t, Config{})
	c := client(t, bootstrap(t, address, true, true))
	eventually(t, "the first set", endpointIs(c, "192.0.2.1"))
	stop()
	eventually(t, "the loss", func() bool { return !c.Status().Servers[0].Connected })
	if !endpointIs(c, "192.0.2.1")() {
		t.Error("the client lost its configuration with the server")
	}
}

func TestErrorsOfTheFolder(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), `{"@type": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: c}`)
	write(t, filepath.Join(dir, "b.json"), `{"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "c"}`)
	write(t, filepath.Join(dir, "c.yaml"), `{name: who}`)
	write(t, filepath.Join(dir, "d.yaml"), "a: [")
	write(t, filepath.Join(dir, "e.yaml"), `{"@type": type.googleapis.com/envoy.config.core.v3.Node}`)
	write(t, filepath.Join(dir, ".hidden.yaml"), "a: [")
	write(t, filepath.Join(dir, "notes.txt"), "a: [")
	set, errs := LoadDir(dir)
	if set != nil || len(errs) != 4 {
		t.Fatalf("%v", errs)
	}
	text := fmt.Sprint(errs)
	for _, want := range []string{"b.json: name: \"c\" is there already (" + dir + "/a.yaml)", "c.yaml: \"who\": no @type", "d.yaml: document 1", "e.yaml: @type: "} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %s", want, text)
		}
	}
	if _, err := New(Config{Dir: filepath.Join(dir, "none")}); err == nil || !strings.Contains(err.Error(), "--dir") {
		t.Errorf("%v", err)
	}
}

func TestTLSWithClientCertificates(t *testing.T) {
	dir := t.TempDir()
	certificate, key := selfSigned(t, dir)
	server, address, _ := folder(t, Config{TLSCert: certificate, TLSKey: key, TLSClientCA: certificate})
	host, port, _ := net.SplitHostPort(address)
	tls := func(own string) string {
		return `{name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: localhost,
 common_tls_context: {` + own + `validation_context: {trusted_ca: {filename: ` + certificate + `}}}}}`
	}
	boot := func(socket string) *xds.Bootstrap {
		b, err := xds.ParseBootstrap("b.yaml", []byte(`
dynamic_resources: {ads_config: {api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}, lds_config: {ads: {}}, cds_config: {ads: {}}}
static_resources: {clusters: [{name: xds, load_assignment: {cluster_name: xds, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: `+host+`, port_value: `+port+`}}}}]}]}, transport_socket: `+socket+`}]}`))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := client(t, boot(tls(`tls_certificates: [{certificate_chain: {filename: `+certificate+`}, private_key: {filename: `+key+`}}], `)))
	eventually(t, "the set over TLS", endpointIs(good, "192.0.2.1"))
	client(t, boot(tls("")))
	time.Sleep(200 * time.Millisecond)
	if n := len(server.Status().Streams); n != 1 {
		t.Errorf("%d streams: a client without a certificate got in", n)
	}
}

func selfSigned(t *testing.T, dir string) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	certificate, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write(t, certificate, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	write(t, key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	return certificate, key
}
