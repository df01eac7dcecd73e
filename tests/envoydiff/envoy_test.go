package envoydiff

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// binary is Envoy; scripts/envoy.sh brings it.
func binary(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../../build/envoy/envoy/_bin/envoy")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("../../scripts/envoy.sh").CombinedOutput(); err != nil {
		t.Fatalf("envoy.sh: %v\n%s", err, out)
	}
	return path
}

// envoy is a running Envoy with one listener.
type envoy struct {
	addr   string
	log    string
	offset int
}

// logFormat is one line per request: what a proxytest.Record has too.
const logFormat = "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_REQUEST_ATTEMPT_COUNT% %BYTES_RECEIVED% %BYTES_SENT%\n"

// startEnvoy runs the bootstrap, with the listener on a free port and an access log added to it.
func startEnvoy(t *testing.T, bootstrap string) *envoy {
	t.Helper()
	dir := t.TempDir()
	e := &envoy{log: filepath.Join(dir, "access.log")}
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.addr = ln.Addr().String()
	port := ln.Addr().(*net.TCPAddr).Port
	_ = ln.Close()

	var doc map[string]any
	if err := yaml.Unmarshal([]byte(bootstrap), &doc); err != nil {
		t.Fatal(err)
	}
	listener := doc["static_resources"].(map[string]any)["listeners"].([]any)[0].(map[string]any)
	listener["address"].(map[string]any)["socket_address"].(map[string]any)["port_value"] = port
	hcm := listener["filter_chains"].([]any)[0].(map[string]any)["filters"].([]any)[0].(map[string]any)["typed_config"].(map[string]any)
	hcm["access_log"] = []any{map[string]any{
		"name": "envoy.access_loggers.file",
		"typed_config": map[string]any{
			"@type":      "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
			"path":       e.log,
			"log_format": map[string]any{"text_format_source": map[string]any{"inline_string": logFormat}},
		},
	}}
	config, err := yaml.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(binary(t), "-c", file, "--concurrency", "1", "--disable-hot-restart", "--use-dynamic-base-id",
		"-l", "warning", "--file-flush-interval-msec", "20", "--drain-time-s", "1")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() { _ = cmd.Wait(); close(gone) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-gone })
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", e.addr); err == nil {
			_ = c.Close()
			return e
		}
		select {
		case <-gone:
			t.Fatalf("envoy did not start:\n%s\n%s", out.String(), config)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("envoy does not listen:\n%s", out.String())
		}
	}
}

// lines returns the next n access log lines.
func (e *envoy) lines(t *testing.T, n int) []string {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b, _ := os.ReadFile(e.log)
		if b = b[min(e.offset, len(b)):]; bytes.Count(b, []byte("\n")) >= n {
			e.offset += len(b)
			return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
		}
		if time.Now().After(deadline) {
			return append(strings.Split(string(b), "\n"), fmt.Sprintf("(%d lines wanted)", n))
		}
	}
}
