package telemetry

import "github.com/prometheus/client_golang/prometheus"

// Metrics collects the shards of all loops. It is a prometheus.Collector.
type Metrics struct{}

// NewMetrics returns an empty collector.
func NewMetrics() *Metrics { return &Metrics{} }

// Describe implements prometheus.Collector: unchecked, as label values come and go.
func (m *Metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {}

// NewShard returns a shard for one loop. post runs a function on that loop's goroutine soon (loop.Post); it is
// used at scrape only.
func (m *Metrics) NewShard(post func(func())) *Shard { return &Shard{} }

// Shard is one loop's counters. Only its loop may touch it.
type Shard struct {
	// Stats are the plain counters of the loop.
	Stats Stats
}

// Stats are plain counters and gauges; their owner just adds to them.
type Stats struct {
	ConnectionsAccepted, ConnectionsClosed           uint64
	RequestsStarted, RequestsEnded                   uint64
	UpstreamConnects, UpstreamConnectFailures        uint64
	UpstreamClosed, UpstreamReused                   uint64
	Retries, Timeouts, ProtocolErrors, NoOriginalDst uint64
}

// Handle remembers the series of the last record, so that the next request of the same connection to the same
// cluster with the same outcome needs no look-up. Embed one in each connection. The zero value is ready.
type Handle struct{}

// Request counts a finished HTTP request.
func (s *Shard) Request(h *Handle, r *Record) {}

// TCPOpened counts a TCP connection once its upstream is known.
func (s *Shard) TCPOpened(h *Handle, r *Record) {}

// TCPBytes adds bytes (sent to the client, received from it) of a TCP connection that is open.
func (s *Shard) TCPBytes(h *Handle, r *Record, sent, received uint64) {}

// TCPClosed counts the end of a TCP connection.
func (s *Shard) TCPClosed(h *Handle, r *Record) {}

// Close ends the shard: its counters stay in the sums. No call on it may follow.
func (s *Shard) Close() {}
