package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	adminv3 "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sockmesh/sockmesh/agent/canary"
	"github.com/sockmesh/sockmesh/pkg/xds"
)

func fetch(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestProbesSayWhy(t *testing.T) {
	reasons := []string{"canary: connection refused", "kubernetes: not synced"}
	stuck := []string{"proxy loop 1 has not answered"}
	reg := prometheus.NewRegistry()
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "sockmesh_test"}, func() float64 { return 7 }))
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "istio_requests_total"}, []string{"source_workload"})
	requests.WithLabelValues(canary.Name).Inc()
	requests.WithLabelValues("shop").Inc()
	reg.MustRegister(requests)
	ln, err := bindWeb("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serveWeb(ln, reg, func() []string { return reasons }, func() []string { return stuck }, quiet)
	defer s.close()
	url := "http://" + s.addr.String()
	if code, body := fetch(t, url+"/readyz"); code != 503 || body != "canary: connection refused\nkubernetes: not synced\n" {
		t.Errorf("%d %q", code, body)
	}
	if code, body := fetch(t, url+"/healthz"); code != 503 || body != stuck[0]+"\n" {
		t.Errorf("%d %q", code, body)
	}
	reasons, stuck = nil, nil
	for _, path := range []string{"/readyz", "/healthz"} {
		if code, body := fetch(t, url+path); code != 200 || body != "ok\n" {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	if code, body := fetch(t, url+"/metrics"); code != 200 || !strings.Contains(body, "sockmesh_test 7") {
		t.Errorf("%d %q", code, body)
	}
	if _, body := fetch(t, url+"/metrics"); strings.Contains(body, canary.Name) || !strings.Contains(body, `source_workload="shop"`) {
		t.Errorf("the canary's requests are among the mesh's: %q", body)
	}
	// A second agent, at an upgrade, gets the same port.
	second, err := bindWeb(s.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	_ = second.Close()
}

func TestCanaryResultIsKept(t *testing.T) {
	results := make(chan error, 8)
	c := newCanaryLoop(func(ctx context.Context) (time.Duration, error) {
		select {
		case err := <-results:
			return time.Millisecond, err
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}, quiet)
	if c.status().OK {
		t.Error("ready before a canary was sent")
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); c.run(ctx, func() bool { return false }) }()
	results <- errors.New("refused")
	results <- nil // soon after a failure
	for end := time.Now().Add(10 * time.Second); !c.status().OK && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	stop()
	<-done
	if s := c.status(); !s.OK || s.Successes != 1 || s.Failures != 1 || s.Error != "" || s.Micros != 1000 {
		t.Errorf("%+v", s)
	}
}

func TestConfigDumpIsEnvoys(t *testing.T) {
	raw, err := configDump([]xds.DumpedResource{
		{Type: "listener", Name: "l", Version: "1", Source: "ads", Resource: json.RawMessage(`{"name":"l"}`), Rejected: "field x: no"},
		{Type: "listener", Name: "bad", Source: "ads", Rejected: "no filters"},
		{Type: "cluster", Name: "c", Source: "static", Resource: json.RawMessage(`{"name":"c"}`)},
		{Type: "route", Name: "r", Version: "2", Source: "ads", Resource: json.RawMessage(`{"name":"r"}`)},
		{Type: "endpoint", Name: "c", Version: "3", Source: "ads", Resource: json.RawMessage(`{"cluster_name":"c"}`)},
	})
	if err != nil {
		t.Fatal(err)
	}
	var dump adminv3.ConfigDump
	if err := protojson.Unmarshal(raw, &dump); err != nil {
		t.Fatalf("Envoy's message doesn't take it: %v\n%s", err, raw)
	}
	var listeners adminv3.ListenersConfigDump
	if err := dump.Configs[1].UnmarshalTo(&listeners); err != nil {
		t.Fatal(err)
	}
	if len(listeners.DynamicListeners) != 2 || listeners.DynamicListeners[0].ActiveState.VersionInfo != "1" ||
		listeners.DynamicListeners[1].ErrorState.Details != "no filters" {
		t.Errorf("%s", raw)
	}
}
