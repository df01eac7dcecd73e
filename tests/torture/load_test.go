package torture

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// connections of a mixed load, all kinds together: 64 of TCP, 8 sockets of UDP.
const connections = 72

// perConnection is how many exchanges a connection carries that nobody can end but its client.
const perConnection = 10

// leave is how long a connection of such a load may live: a server that is on its way out waits for it.
func leave(pause time.Duration) time.Duration { return perConnection*pause + 2*time.Second }

// stream is one kind of traffic of the mix.
type stream struct {
	name string
	to   service
	cfg  traffic.Config
	// proxied: the bytes are in the agent's hands, so its sudden death breaks the connections that there are.
	proxied bool
}

var mix = []stream{
	{"small HTTP", web, traffic.Config{Kind: traffic.HTTP, PerConnection: 20}, true},
	{"HTTP, a connection each", web, traffic.Config{Kind: traffic.HTTP, NewConnection: true}, true},
	{"large bodies", web, traffic.Config{Kind: traffic.Large, Size: 256 << 10, PerConnection: perConnection}, true},
	{"streaming", web, traffic.Config{Kind: traffic.Streaming, Size: 64 << 10, PerConnection: perConnection}, true},
	{"WebSocket", web, traffic.Config{Kind: traffic.WebSocket, Size: 4 << 10, PerConnection: perConnection}, true},
	{"TCP, proxied", proxied, traffic.Config{Kind: traffic.TCP, Size: 16 << 10, PerConnection: perConnection}, true},
	{"TCP, offloaded", offloaded, traffic.Config{Kind: traffic.TCP, Size: 16 << 10, PerConnection: perConnection}, false},
	{"TCP Service", plain, traffic.Config{Kind: traffic.TCP, Size: 16 << 10, PerConnection: perConnection}, false},
	// A failed exchange is a datagram that was lost on its way there or back.
	{"UDP Service", datagrams, traffic.Config{Kind: traffic.UDP, Size: 1200, PerConnection: 2 * perConnection}, false},
}

// config of n connections to the address of the given family, each of which rests for the pause after each exchange.
func (s stream) config(family, n int, pause time.Duration) traffic.Config {
	cfg := s.cfg
	cfg.Addr, cfg.Host, cfg.Pause, cfg.Connections = s.to.addrs()[family%2].String(), "web", pause, n
	cfg.Timeout = 20 * time.Second // the machine may be busy
	cfg.Every = max(pause, 50*time.Millisecond)
	return cfg
}

// mixed is the load of a client: every kind at once.
type mixed struct {
	w     *town
	pause time.Duration
	loads []*lab.Load
}

// load starts it and returns when every kind flows.
func (w *town) load(from *lab.Pod, pause time.Duration) *mixed {
	w.t.Helper()
	m := &mixed{w: w, pause: pause}
	for i, s := range mix {
		cfg := s.config(i, connections/len(mix), pause)
		if w.patience > 0 {
			cfg.Timeout = w.patience
		}
		l, err := from.StartTraffic(cfg)
		w.must(err)
		m.loads = append(m.loads, l)
	}
	m.flow(20)
	return m
}

// flow waits until every kind has had n more exchanges that went well.
func (m *mixed) flow(n uint64) {
	m.w.t.Helper()
	start := make([]uint64, len(m.loads))
	for i, l := range m.loads {
		start[i] = l.Now().OK
	}
	for i, l := range m.loads {
		if had := l.Now().OK - start[i]; had < n {
			if err := l.WaitRequests(m.w.ctx, n-had); err != nil {
				m.w.t.Fatalf("%s: %v", mix[i].name, err)
			}
		}
	}
}

// tally is what a kind of traffic lived through.
type tally struct {
	exchanges, bytes            uint64
	connects, requests, excused int // failed connects, failed exchanges, and those that the event explains
	corrupt                     int
	first                       *traffic.Failure // that nothing explains
	wrong                       *traffic.Failure // the first answer that was not what was sent
}

// soFar counts while the load goes on.
func (m *mixed) soFar(why excuse) []tally {
	out := make([]tally, len(m.loads))
	for i, l := range m.loads {
		out[i] = count(mix[i], l.Now(), why)
	}
	return out
}

// excuse tells whether an event explains a failure. Everything else is the product's fault.
type excuse func(s stream, f traffic.Failure) bool

// nothing can explain a failure.
func nothing(stream, traffic.Failure) bool { return false }

// killed explains what broke with a process that had the connection in hand.
func killed(kills []lab.Window) excuse {
	return func(s stream, f traffic.Failure) bool {
		return s.proxied && slices.ContainsFunc(kills, func(k lab.Window) bool { return len(k.OutsideOf([]traffic.Failure{f})) == 0 })
	}
}

// madeIn explains what happened to connections that were made, or tried, while a program was missing that connections
// are made with; and to datagrams that were under way then, each of which is translated for itself.
func madeIn(gaps []lab.Window) excuse {
	const slack = time.Second // until a generator's thread gets to look at its clock, on a machine that is busy
	return func(s stream, f traffic.Failure) bool {
		made := f.Connected
		if made.IsZero() {
			made = f.Began
		}
		if s.cfg.Kind == traffic.UDP {
			return slices.ContainsFunc(gaps, func(g lab.Window) bool { return f.At.After(g.From) && f.Began.Before(g.Until.Add(slack)) })
		}
		return slices.ContainsFunc(gaps, func(g lab.Window) bool { return made.After(g.From) && made.Before(g.Until.Add(slack)) })
	}
}

// stop ends the load and counts.
func (m *mixed) stop(why excuse) []tally {
	m.w.t.Helper()
	out := make([]tally, len(m.loads))
	stuck := time.AfterFunc(stuckAfter, m.w.whoWaits)
	defer stuck.Stop()
	for i, l := range m.loads {
		r, err := l.Stop()
		if err != nil {
			m.w.t.Errorf("%s: the generator: %v", mix[i].name, err)
		}
		out[i] = count(mix[i], r, why)
	}
	return out
}

// stuckAfter is how long the end of a load may take before it is written down who waits for what. The generators do the
// same with their goroutines.
const stuckAfter = 5 * time.Second

// whoWaits writes, beside the logs, which are kept where a test fails, every socket of the lab as the agent and as the
// kernel see it.
func (w *town) whoWaits() {
	write := func(name, text string, err error) {
		if err != nil {
			text += "\n" + err.Error() + "\n"
		}
		if err := os.WriteFile(filepath.Join(w.LogDir(), name), []byte(text), 0o644); err != nil {
			w.t.Log(err)
		}
	}
	out, err := w.CLI(w.ctx, "sockets", "-o", "json")
	write("stuck.sockets.json", out, err)
	for _, place := range w.Places() {
		out, err := place.Run(w.ctx, "ss", "-tuinpe")
		write("stuck."+strings.ReplaceAll(place.Name, "/", "_")+".ss", out, err)
	}
}

func count(s stream, r traffic.Report, why excuse) tally {
	c := tally{exchanges: r.Requests, bytes: r.Bytes}
	for i, f := range r.Failures {
		if f.Corrupt {
			c.corrupt++
			if c.wrong == nil {
				c.wrong = &r.Failures[i]
			}
		}
		switch {
		case why(s, f):
			c.excused++
			continue
		case f.Connected.IsZero():
			c.connects++
		default:
			c.requests++
		}
		if c.first == nil {
			c.first = &r.Failures[i]
		}
	}
	if missing := int(r.Failed) - len(r.Failures); missing > 0 { // more than a generator remembers
		c.requests += missing
	}
	return c
}

// judge prints the table of an event and fails the test where anything failed that it does not explain, or more than the
// connections that there are, each once for each time that something broke; breaks negative: without limit.
func (w *town) judge(event string, tallies []tally, breaks int) {
	w.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%-24s %9s %9s %9s %9s %9s %9s\n", event, "", "exchanges", "MB", "connects", "requests", "corrupt", "excused")
	var sum tally
	for i, c := range tallies {
		fmt.Fprintf(&b, "%-24s %9d %9.1f %9d %9d %9d %9d\n", mix[i].name, c.exchanges, float64(c.bytes)/1e6, c.connects, c.requests, c.corrupt, c.excused)
		sum.exchanges, sum.bytes, sum.connects, sum.requests = sum.exchanges+c.exchanges, sum.bytes+c.bytes, sum.connects+c.connects, sum.requests+c.requests
		sum.corrupt, sum.excused = sum.corrupt+c.corrupt, sum.excused+c.excused
		switch each := connections / len(mix); {
		case c.connects+c.requests > 0:
			w.t.Errorf("%s: %s: %d connects and %d exchanges failed with nothing to explain it", event, mix[i].name, c.connects, c.requests)
			if c.first != nil {
				w.t.Errorf("the first at %s, on a connection of %s: %s", c.first.At.Format("15:04:05.000"), c.first.Connected.Format("15:04:05.000"), c.first.Error)
			}
		case c.corrupt > 0:
			w.t.Errorf("%s: %s: %d answers were not what was sent; the first at %s, on a connection of %s: %s", event, mix[i].name, c.corrupt,
				c.wrong.At.Format("15:04:05.000"), c.wrong.Connected.Format("15:04:05.000"), c.wrong.Error)
		case breaks >= 0 && c.excused > breaks*each:
			w.t.Errorf("%s: %s: %d exchanges broke in %d breaks, and there were %d connections", event, mix[i].name, c.excused, breaks, each)
		case c.exchanges == 0:
			w.t.Errorf("%s: %s: nothing flowed", event, mix[i].name)
		}
	}
	fmt.Fprintf(&b, "%-24s %9d %9.1f %9d %9d %9d %9d", "sum", sum.exchanges, float64(sum.bytes)/1e6, sum.connects, sum.requests, sum.corrupt, sum.excused)
	w.t.Log(b.String())
}
