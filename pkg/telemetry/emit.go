package telemetry

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

// Stats are plain counters of one loop; their owner just adds to them.
type Stats struct {
	// Connections that pods or clients made to the proxy.
	ConnectionsAccepted, ConnectionsClosed uint64
	// Connections closed because there is no original destination, no listener, no chain.
	NoOriginalDst, NoListener, NoChain uint64
	// Connections over the limits of a pod or of the proxy.
	OverLimit uint64
	// Requests whose head was complete, and those that ended.
	RequestsStarted, RequestsEnded uint64
	// Requests that were refused as malformed.
	ProtocolErrors uint64
	// Connections to upstream hosts.
	UpstreamConnects, UpstreamConnectFailures, UpstreamClosed uint64
	// Requests that found a pooled connection.
	UpstreamReused uint64
	// Attempts after the first, and attempts that were given up for time.
	Retries, Timeouts uint64
}

// statDefs name the plain counters.
var statDefs = []struct {
	desc *prometheus.Desc
	get  func(*Stats) *uint64
}{
	{stat("downstream_connections_total", "Connections accepted from pods and clients."), func(s *Stats) *uint64 { return &s.ConnectionsAccepted }},
	{stat("downstream_connections_closed_total", "Of these, connections that ended."), func(s *Stats) *uint64 { return &s.ConnectionsClosed }},
	{stat("downstream_connections_no_original_dst_total", "Connections closed because nobody knows where they were to go."), func(s *Stats) *uint64 { return &s.NoOriginalDst }},
	{stat("downstream_connections_no_listener_total", "Connections closed because their listener is gone."), func(s *Stats) *uint64 { return &s.NoListener }},
	{stat("downstream_connections_no_filter_chain_total", "Connections closed because no filter chain matches."), func(s *Stats) *uint64 { return &s.NoChain }},
	{stat("downstream_connections_over_limit_total", "Connections closed because of a limit."), func(s *Stats) *uint64 { return &s.OverLimit }},
	{stat("requests_started_total", "HTTP requests begun."), func(s *Stats) *uint64 { return &s.RequestsStarted }},
	{stat("requests_ended_total", "HTTP requests ended, in any way."), func(s *Stats) *uint64 { return &s.RequestsEnded }},
	{stat("downstream_protocol_errors_total", "HTTP requests refused as malformed."), func(s *Stats) *uint64 { return &s.ProtocolErrors }},
	{stat("upstream_connects_total", "Connections begun to upstream hosts."), func(s *Stats) *uint64 { return &s.UpstreamConnects }},
	{stat("upstream_connect_failures_total", "Of these, connections that failed or timed out."), func(s *Stats) *uint64 { return &s.UpstreamConnectFailures }},
	{stat("upstream_connections_closed_total", "Connections to upstream hosts that ended."), func(s *Stats) *uint64 { return &s.UpstreamClosed }},
	{stat("upstream_connections_reused_total", "Requests that found a pooled connection."), func(s *Stats) *uint64 { return &s.UpstreamReused }},
	{stat("retries_total", "Attempts after a request's first."), func(s *Stats) *uint64 { return &s.Retries }},
	{stat("timeouts_total", "Requests and attempts given up for time."), func(s *Stats) *uint64 { return &s.Timeouts }},
}

func stat(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("sockmesh_proxy_"+name, help, nil, nil)
}

func (s *Stats) add(o *Stats) {
	for _, d := range statDefs {
		*d.get(s) += *d.get(o)
	}
}

var (
	activeConnections = stat("downstream_connections", "Connections from pods and clients that are open.")
	activeRequests    = stat("requests", "HTTP requests in progress.")
	seriesCount       = stat("metric_series", "Series of the request metrics that are held.")
	seriesEvicted     = stat("metric_series_evicted_total", "Series dropped because nothing moved in them.")
	seriesOverflow    = stat("metric_series_overflow_total", "Publications counted under \"other\" because there were too many series.")

	requestsTotal   = prometheus.NewDesc("istio_requests_total", "HTTP requests.", requestLabelNames, nil)
	requestDuration = prometheus.NewDesc("istio_request_duration_milliseconds", "Duration of HTTP requests.", requestLabelNames, nil)
	requestBytes    = prometheus.NewDesc("istio_request_bytes", "Size of HTTP requests, heads included.", requestLabelNames, nil)
	responseBytes   = prometheus.NewDesc("istio_response_bytes", "Size of HTTP responses, heads included.", requestLabelNames, nil)

	tcpSent     = prometheus.NewDesc("istio_tcp_sent_bytes_total", "Bytes sent to clients of TCP connections.", labelNames, nil)
	tcpReceived = prometheus.NewDesc("istio_tcp_received_bytes_total", "Bytes received from clients of TCP connections.", labelNames, nil)
	tcpOpened   = prometheus.NewDesc("istio_tcp_connections_opened_total", "TCP connections opened.", labelNames, nil)
	tcpClosed   = prometheus.NewDesc("istio_tcp_connections_closed_total", "TCP connections closed.", labelNames, nil)
)

func emitStats(ch chan<- prometheus.Metric, st *Stats) {
	for _, d := range statDefs {
		ch <- counter(d.desc, *d.get(st))
	}
	ch <- gauge(activeConnections, float64(st.ConnectionsAccepted)-float64(st.ConnectionsClosed))
	ch <- gauge(activeRequests, float64(st.RequestsStarted)-float64(st.RequestsEnded))
}

func (s *sample) emit(ch chan<- prometheus.Metric) {
	labels := s.key.labels()
	if s.opened|s.closed|s.sent|s.received != 0 {
		ch <- counter(tcpOpened, s.opened, labels...)
		ch <- counter(tcpClosed, s.closed, labels...)
		ch <- counter(tcpSent, s.sent, labels...)
		ch <- counter(tcpReceived, s.received, labels...)
	}
	if s.requests == 0 {
		return
	}
	labels = append(labels, strconv.Itoa(int(s.key.status)))
	ch <- counter(requestsTotal, s.requests, labels...)
	for _, h := range [...]struct {
		desc *prometheus.Desc
		h    *histogram
	}{{requestDuration, &s.duration}, {requestBytes, &s.requestBytes}, {responseBytes, &s.responseBytes}} {
		n, buckets := h.h.cumulative()
		ch <- orInvalid(h.desc)(prometheus.NewConstHistogram(h.desc, n, h.h.sum, buckets, labels...))
	}
}

// orInvalid reports what cannot be a metric (a label that is not UTF-8) to the scrape instead of a panic.
func orInvalid(d *prometheus.Desc) func(prometheus.Metric, error) prometheus.Metric {
	return func(m prometheus.Metric, err error) prometheus.Metric {
		if err != nil {
			return prometheus.NewInvalidMetric(d, err)
		}
		return m
	}
}

func counter(d *prometheus.Desc, v uint64, labels ...string) prometheus.Metric {
	return orInvalid(d)(prometheus.NewConstMetric(d, prometheus.CounterValue, float64(v), labels...))
}

func gauge(d *prometheus.Desc, v float64) prometheus.Metric {
	return orInvalid(d)(prometheus.NewConstMetric(d, prometheus.GaugeValue, v))
}

var logLines = prometheus.NewDesc("sockmesh_access_log_lines_total", "Access-log lines, by what became of them.",
	[]string{"path", "result"}, nil)

// Describe implements prometheus.Collector; it sends nothing, as files come and go.
func (l *Logs) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (l *Logs) Collect(ch chan<- prometheus.Metric) {
	for _, st := range l.Stats() {
		ch <- counter(logLines, st.Written, st.Path, "written")
		ch <- counter(logLines, st.Dropped, st.Path, "dropped")
		ch <- counter(logLines, st.Failed, st.Path, "failed")
	}
}
