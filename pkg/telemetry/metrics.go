package telemetry

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// How the numbers get from the loops to a scrape. Each loop has a Shard: plain memory that nobody else touches, so
// counting is an addition, without lock or atomic. At a scrape the collector asks every loop to publish: on the
// loop's own goroutine, what was counted since the last time is moved into the totals, which the collector
// then reads. A loop that does not answer soon is left out of that scrape; nothing is lost by it.
//
// Series are bounded. The labels are made of what the configuration and the node's pods offer, never of what a client
// sends, and beyond MaxSeries everything new is counted in one series whose labels say "other". A series that has not
// moved for IdleAfter is dropped from the totals.

// MetricsConfig bounds the metrics; zero values mean the defaults.
type MetricsConfig struct {
	MaxSeries int           // default 10,000
	IdleAfter time.Duration // default 15 minutes
	// PublishTimeout is how long a scrape waits for a loop. Default 1 s.
	PublishTimeout time.Duration
}

// Metrics collects the shards of all loops. It is a prometheus.Collector.
type Metrics struct {
	cfg MetricsConfig
	now func() time.Time

	collecting sync.Mutex // one scrape at a time
	snapshot   []sample   // guarded by collecting

	mu       sync.Mutex
	shards   map[*Shard]struct{}
	totals   map[totalKey]*total
	retired  Stats // of shards that were closed
	evicted  uint64
	overflow uint64
}

// total is a series summed over all loops.
type total struct {
	counts
	moved time.Time
}

// NewMetrics returns an empty collector with the default bounds.
func NewMetrics() *Metrics { return NewMetricsWith(MetricsConfig{}) }

// NewMetricsWith returns an empty collector.
func NewMetricsWith(cfg MetricsConfig) *Metrics {
	if cfg.MaxSeries <= 0 {
		cfg.MaxSeries = 10_000
	}
	if cfg.IdleAfter <= 0 {
		cfg.IdleAfter = 15 * time.Minute
	}
	if cfg.PublishTimeout <= 0 {
		cfg.PublishTimeout = time.Second
	}
	return &Metrics{cfg: cfg, now: time.Now, shards: map[*Shard]struct{}{}, totals: map[totalKey]*total{}}
}

// NewShard returns a shard for one loop. post runs a function on that loop's goroutine soon (loop.Post); it is
// used at scrape only.
func (m *Metrics) NewShard(post func(func())) *Shard {
	s := &Shard{metrics: m, post: post, series: map[seriesKey]*series{}}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shards[s] = struct{}{}
	return s
}

// Describe implements prometheus.Collector; it sends nothing, as series come and go.
func (m *Metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.collecting.Lock()
	defer m.collecting.Unlock()
	m.gather()
	// A loop may be late with its publication: it must wait for a copy at most, not for the reader of ch.
	m.mu.Lock()
	m.evict()
	m.snapshot = m.snapshot[:0]
	for k, t := range m.totals {
		m.snapshot = append(m.snapshot, sample{k, t.counts})
	}
	st, evicted, overflow := m.sum(), m.evicted, m.overflow
	m.mu.Unlock()
	emitStats(ch, &st)
	ch <- gauge(seriesCount, float64(len(m.snapshot)))
	ch <- counter(seriesEvicted, evicted)
	ch <- counter(seriesOverflow, overflow)
	for i := range m.snapshot {
		m.snapshot[i].emit(ch)
	}
}

// sample is a total as of a scrape.
type sample struct {
	key totalKey
	counts
}

// gather has every loop publish, and waits for them.
func (m *Metrics) gather() {
	m.mu.Lock()
	shards := make([]*Shard, 0, len(m.shards))
	for s := range m.shards {
		shards = append(shards, s)
	}
	m.mu.Unlock()
	done := make(chan struct{}, len(shards))
	for _, s := range shards {
		// A loop that has not come round to the last one is not asked again.
		if !s.asked.CompareAndSwap(false, true) {
			done <- struct{}{}
			continue
		}
		s.post(func() {
			s.asked.Store(false)
			s.publish()
			done <- struct{}{}
		})
	}
	timeout := time.NewTimer(m.cfg.PublishTimeout)
	defer timeout.Stop()
	for range shards {
		select {
		case <-done:
		case <-timeout.C:
			return
		}
	}
}

// Summary is the sum of the loops' plain counters as of now, for status and top.
func (m *Metrics) Summary() Stats {
	m.collecting.Lock()
	defer m.collecting.Unlock()
	m.gather()
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sum()
}

func (m *Metrics) sum() Stats {
	st := m.retired
	for s := range m.shards {
		st.add(&s.published)
	}
	return st
}

func (m *Metrics) evict() {
	now := m.now()
	for k, t := range m.totals {
		if now.Sub(t.moved) > m.cfg.IdleAfter && t.opened == t.closed {
			delete(m.totals, k)
			m.evicted++
		}
	}
}

// Shard is one loop's counters. Only its loop may touch it.
type Shard struct {
	// Stats are the plain counters of the loop.
	Stats Stats

	metrics *Metrics
	post    func(func())
	asked   atomic.Bool
	series  map[seriesKey]*series
	gen     uint32 // changes when series were dropped, so that Handles look anew

	published Stats // guarded by metrics.mu
}

// series is one loop's part of a series: what was counted since it was last published.
type series struct {
	counts
	idle uint8 // publications without a change
}

// idlePublications is after how many of them a loop forgets a series.
const idlePublications = 8

// publish moves what was counted into the totals. On the loop.
func (s *Shard) publish() {
	m := s.metrics
	m.mu.Lock()
	defer m.mu.Unlock()
	s.published = s.Stats
	now := m.now()
	for k, v := range s.series {
		if v.counts == (counts{}) {
			if v.idle++; v.idle > idlePublications {
				delete(s.series, k)
				s.gen++
			}
			continue
		}
		v.idle = 0
		tk := k.total()
		t := m.totals[tk]
		if t == nil {
			if len(m.totals) >= m.cfg.MaxSeries {
				m.overflow++
				tk = k.other().total()
				t = m.totals[tk]
			}
			if t == nil {
				t = &total{}
				m.totals[tk] = t
			}
		}
		t.add(&v.counts)
		t.moved = now
		v.counts = counts{}
	}
}

// Close ends the shard: its counters stay in the sums. To be called on the loop, or after it has ended; no call on the shard may follow.
func (s *Shard) Close() {
	s.publish()
	m := s.metrics
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.shards[s]; ok {
		delete(m.shards, s)
		m.retired.add(&s.published)
	}
}

// Handle remembers the series of the last record, so that the next request of the same connection to the same
// cluster with the same outcome needs no look-up. Embed one in each connection. The zero value is ready.
type Handle struct {
	shard  *Shard
	key    seriesKey
	series *series
	gen    uint32
}

// find returns the series of r's labels.
func (s *Shard) find(h *Handle, k seriesKey) *series {
	if h.series != nil && h.gen == s.gen && h.shard == s && h.key == k {
		return h.series
	}
	v := s.series[k]
	if v == nil {
		if len(s.series) >= s.metrics.cfg.MaxSeries {
			k = k.other()
			v = s.series[k]
		}
		if v == nil {
			v = &series{}
			s.series[k] = v
		}
	}
	*h = Handle{shard: s, key: k, series: v, gen: s.gen}
	return v
}

// Request counts a finished HTTP request.
func (s *Shard) Request(h *Handle, r *Record) {
	v := s.find(h, keyOf(r))
	v.requests++
	v.duration.observe(float64(r.End-r.Begin) / float64(time.Millisecond))
	v.requestBytes.observe(float64(r.BytesReceived + r.RequestHeaderBytes))
	v.responseBytes.observe(float64(r.BytesSent + r.ResponseHeaderBytes))
}

// TCPOpened counts a TCP connection once its upstream is known.
func (s *Shard) TCPOpened(h *Handle, r *Record) { s.find(h, keyOf(r)).opened++ }

// TCPBytes adds bytes (sent to the client, received from it) of a TCP connection that is open.
func (s *Shard) TCPBytes(h *Handle, r *Record, sent, received uint64) {
	v := s.find(h, keyOf(r))
	v.sent += sent
	v.received += received
}

// TCPClosed counts the end of a TCP connection.
func (s *Shard) TCPClosed(h *Handle, r *Record) { s.find(h, keyOf(r)).closed++ }
