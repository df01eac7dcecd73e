package telemetry

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// testLoop runs what is posted to it on a goroutine, as a loop does.
type testLoop struct {
	work chan func()
	done chan struct{}
}

func newTestLoop(t *testing.T) *testLoop {
	l := &testLoop{work: make(chan func(), 16), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		for f := range l.work {
			f()
		}
	}()
	t.Cleanup(func() { close(l.work); <-l.done })
	return l
}

func (l *testLoop) post(f func()) { l.work <- f }

// do runs f on the loop and waits.
func (l *testLoop) do(f func()) {
	done := make(chan struct{})
	l.post(func() { f(); close(done) })
	<-done
}

// scrape returns every sample as "name{labels}" -> value; of a histogram its count and sum.
func scrape(t *testing.T, c prometheus.Collector) map[string]float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			key := f.GetName() + "{" + strings.Join(labels, ",") + "}"
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				out[key] = m.Counter.GetValue()
			case dto.MetricType_GAUGE:
				out[key] = m.Gauge.GetValue()
			case dto.MetricType_HISTOGRAM:
				out[key+"_count"] = float64(m.Histogram.GetSampleCount())
				out[key+"_sum"] = m.Histogram.GetSampleSum()
			}
		}
	}
	return out
}

// sum adds up the samples whose name begins with prefix and has all the parts.
func sum(samples map[string]float64, prefix string, parts ...string) (total float64) {
next:
	for k, v := range samples {
		if !strings.HasPrefix(k, prefix) {
			continue
		}
		for _, p := range parts {
			if !strings.Contains(k, p) {
				continue next
			}
		}
		total += v
	}
	return total
}

func TestLoopsAreSummedAtAScrape(t *testing.T) {
	m := NewMetrics()
	var handles [2]Handle
	var shards [2]*Shard
	for i := range shards {
		l := newTestLoop(t)
		shards[i] = m.NewShard(l.post)
		l.do(func() {
			for n := range 10 {
				r := sampleRecord()
				r.Source = &Workload{Namespace: "default", Name: "client", Pod: fmt.Sprintf("client-%d-%d", i, n)}
				if n == 9 {
					r.Status, r.Flags = 503, UF
				}
				shards[i].Request(&handles[i], r)
			}
			shards[i].Stats.ConnectionsAccepted += 3
			shards[i].Stats.ConnectionsClosed++
		})
	}
	for range 2 { // a second scrape finds the same
		got := scrape(t, m)
		want := map[string]float64{
			"ok": sum(got, "istio_requests_total", "response_code=200", "response_flags=-", "source_workload=client,", "source_workload_namespace=default",
				"destination_service=reviews.default.svc.cluster.local", "destination_service_name=reviews,", "destination_service_namespace=default",
				"request_protocol=http", "reporter=source", "connection_security_policy=unknown"),
			"failed":    sum(got, "istio_requests_total", "response_code=503", "response_flags=UF"),
			"all":       sum(got, "istio_requests_total"),
			"durations": sum(got, "istio_request_duration_milliseconds{", "_count"),
			"bytes":     sum(got, "istio_response_bytes{", "_sum"),
			"accepted":  got["sockmesh_proxy_downstream_connections_total{}"],
			"open":      got["sockmesh_proxy_downstream_connections{}"],
		}
		for k, v := range map[string]float64{"ok": 18, "failed": 2, "all": 20, "durations": 20, "bytes": 20 * 1234, "accepted": 6, "open": 4} {
			if want[k] != v {
				t.Errorf("%s: %v, want %v", k, want[k], v)
			}
		}
	}
}

func TestAClosedShardStaysInTheSums(t *testing.T) {
	m := NewMetrics()
	l := newTestLoop(t)
	s := m.NewShard(l.post)
	l.do(func() {
		s.Request(&Handle{}, sampleRecord())
		s.Stats.Retries = 5
		s.Close()
		s.Close() // twice is once
	})
	got := scrape(t, m)
	if got["sockmesh_proxy_retries_total{}"] != 5 || sum(got, "istio_requests_total") != 1 {
		t.Errorf("%v", got)
	}
	if m.Summary().Retries != 5 {
		t.Error("the summary has forgotten it")
	}
}

func TestTCPConnectionsAreCounted(t *testing.T) {
	m := NewMetrics()
	l := newTestLoop(t)
	s := m.NewShard(l.post)
	l.do(func() {
		var h Handle
		r := &Record{UpstreamCluster: "redis", Source: &Workload{Namespace: "a", Name: "b"}}
		s.TCPOpened(&h, r)
		s.TCPBytes(&h, r, 100, 7)
		s.TCPBytes(&h, r, 100, 7)
		r.Flags = DC // known at the end only: must not make another series
		s.TCPClosed(&h, r)
	})
	got := scrape(t, m)
	for name, want := range map[string]float64{
		"istio_tcp_connections_opened_total": 1, "istio_tcp_connections_closed_total": 1, "istio_tcp_sent_bytes_total": 200,
		"istio_tcp_received_bytes_total": 14,
	} {
		if v := sum(got, name, "request_protocol=tcp", "destination_service=redis"); v != want {
			t.Errorf("%s: %v", name, v)
		}
	}
	if v := sum(got, "istio_requests_total"); v != 0 {
		t.Errorf("%v HTTP requests", v)
	}
}

func TestIdleSeriesAreDroppedAndComeBack(t *testing.T) {
	m := NewMetricsWith(MetricsConfig{IdleAfter: time.Minute})
	now := time.Now()
	m.now = func() time.Time { return now }
	l := newTestLoop(t)
	s := m.NewShard(l.post)
	var h Handle
	l.do(func() { s.Request(&h, sampleRecord()) })
	if sum(scrape(t, m), "istio_requests_total") != 1 {
		t.Fatal("not there at first")
	}
	for range idlePublications + 2 {
		now = now.Add(10 * time.Second)
		scrape(t, m)
	}
	got := scrape(t, m)
	if sum(got, "istio_requests_total") != 0 || got["sockmesh_proxy_metric_series{}"] != 0 ||
		got["sockmesh_proxy_metric_series_evicted_total{}"] != 1 {
		t.Errorf("still there: %v", got)
	}
	l.do(func() {
		if len(s.series) != 0 {
			t.Errorf("the loop keeps %d", len(s.series))
		}
		s.Request(&h, sampleRecord()) // the handle's series is gone: it must notice
	})
	if sum(scrape(t, m), "istio_requests_total") != 1 {
		t.Error("lost when it came back")
	}
}

func TestSeriesAreBounded(t *testing.T) {
	m := NewMetricsWith(MetricsConfig{MaxSeries: 10})
	for range 2 {
		l := newTestLoop(t)
		s := m.NewShard(l.post)
		l.do(func() {
			for i := range 1000 {
				r := sampleRecord()
				r.UpstreamCluster = fmt.Sprintf("cluster-%d", i)
				s.Request(&Handle{}, r)
			}
		})
	}
	got := scrape(t, m)
	if n := len(m.totals); n > 11 {
		t.Errorf("%d series", n)
	}
	if v := sum(got, "istio_requests_total"); v != 2000 {
		t.Errorf("%v requests of 2000", v)
	}
	if sum(got, "istio_requests_total", "request_protocol=other") == 0 || got["sockmesh_proxy_metric_series_overflow_total{}"] == 0 {
		t.Error("nothing says that there were too many")
	}
}

func TestALoopThatHangsHoldsUpNobody(t *testing.T) {
	m := NewMetricsWith(MetricsConfig{PublishTimeout: 10 * time.Millisecond})
	asked := 0
	m.NewShard(func(func()) { asked++ })
	l := newTestLoop(t)
	s := m.NewShard(l.post)
	l.do(func() { s.Stats.Retries = 1 })
	for range 3 {
		scrape(t, m)
	}
	if got := scrape(t, m); got["sockmesh_proxy_retries_total{}"] != 1 {
		t.Errorf("%v", got)
	}
	if asked != 1 {
		t.Errorf("a loop that did not answer was asked %d times", asked)
	}
}

func TestClustersNameTheirService(t *testing.T) {
	for cluster, want := range map[string][3]string{
		"": {unknown, unknown, unknown},
		"outbound|80|v1|reviews.default.svc.cluster.local": {"reviews.default.svc.cluster.local", "reviews", "default"},
		"a.b.svc.cluster.local:8080":                       {"a.b.svc.cluster.local", "a", "b"},
		"httproute/default/backend/rule/0":                 {"httproute/default/backend/rule/0", "httproute/default/backend/rule/0", unknown},
		"www.example.com":                                  {"www.example.com", "www.example.com", unknown},
	} {
		s, n, ns := destinationOf(cluster)
		if got := [3]string{s, n, ns}; got != want {
			t.Errorf("%q: %v", cluster, got)
		}
	}
}

func TestCountingAllocatesNothing(t *testing.T) {
	s := NewMetrics().NewShard(func(func()) {})
	a, b := sampleRecord(), sampleRecord()
	b.Status = 404
	var h Handle
	count := func() {
		s.Request(&h, a)
		s.Request(&h, a)
		s.Request(&h, b)
		s.TCPBytes(&h, a, 1, 1)
	}
	count()
	if n := testing.AllocsPerRun(100, count); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRequestMetrics(b *testing.B) {
	s := NewMetrics().NewShard(func(func()) {})
	r := sampleRecord()
	var h Handle
	b.ReportAllocs()
	for b.Loop() {
		s.Request(&h, r)
	}
}
