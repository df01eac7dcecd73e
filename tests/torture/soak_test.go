package torture

import (
	"encoding/csv"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// The soak is an hour, or as long as asked, of a low load with churn: pods, endpoints, weights, Services, connections,
// agents. Once a minute everything that could grow is counted.
//
// Agents are replaced in the first quarter only (stopped, killed, upgraded), so that one and the same process is watched
// for the other three: what a process leaks must not be forgotten with it, and what replacements leak in the kernel
// shows as well.
//
// The rule: of the samples since the last replacement, the median of each figure over the last third may exceed that
// over the first third by a tenth and by the slack given in growth, no more. Half an hour lies between the two in a run
// of an hour, so a descriptor in two minutes is seen. Medians, because connections come and go. Afterwards,
// with the load gone, everything must be exactly as it was before it.

var (
	soakFor = flag.Duration("soak", 30*time.Second, "how long TestSoak lasts")
	soakCSV = flag.String("soak.csv", "", "where TestSoak writes its samples")
)

// growth is the slack of figures, beside a tenth: what the load's coming and going makes of them. A map without one has
// that of the maps.
var growth = map[string]int{
	"memory_kib": 8 << 10, "control_memory_kib": 8 << 10, descriptors: 16, goroutines: 8, threads: 4, sockets: 32, tcpSockets: 32, anyMap: 16,
}

// anyMap stands for every map that has no slack of its own.
const anyMap = "any map"

// warmUp is a short run's slack of memory: a heap takes a few collections to find its size.
const warmUp, shortRun = 24 << 10, 10 * time.Minute

// enough samples for a judgement; a run that is too short for them goes on until it has them.
const enough = 9

// settle is what the load takes to find its way back to the proxy after an agent was replaced.
const settle = 7 * time.Second

func slackOf(name string) int {
	if strings.HasSuffix(name, "memory_kib") && *soakFor < shortRun {
		return warmUp
	}
	if n, ok := growth[name]; ok {
		return n
	}
	return growth[anyMap]
}

// grown names the figures that the rule objects to. Samples are in the order in which they were taken.
func grown(samples []map[string]int, slack func(string) int) []string {
	third := len(samples) / 3
	var out []string
	for name := range samples[len(samples)-1] {
		first, last := median(samples[:third], name), median(samples[len(samples)-third:], name)
		if limit := first + first/10 + slack(name); last > limit {
			out = append(out, fmt.Sprintf("%s: median of the first third %d, of the last %d; at most %d", name, first, last, limit))
		}
	}
	sort.Strings(out)
	return out
}

func median(samples []map[string]int, name string) int {
	values := make([]int, 0, len(samples))
	for _, s := range samples {
		values = append(values, s[name])
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// The rule finds a leak among noise, and leaves noise alone.
func TestGrowthIsFoundAmongNoise(t *testing.T) {
	slack := func(string) int { return 8 }
	for name, tt := range map[string]struct {
		at   func(i int) int
		want bool
	}{
		"flat":                  {func(i int) int { return 1000 + i*7919%50 }, false},
		"one spike at the end":  {func(i int) int { return 1000 + i/59*500 }, false},
		"one a minute":          {func(i int) int { return 20 + i }, true},
		"a third in an hour":    {func(i int) int { return 3000 + i*3000/180 }, true},
		"grows, then is freed":  {func(i int) int { return 1000 + i%10*20 }, false},
		"warm-up, then flat":    {func(i int) int { return 100 + min(i, 8)*50 }, false},
		"from nothing to a few": {func(i int) int { return i / 10 }, false},
	} {
		var samples []map[string]int
		for i := range 60 {
			samples = append(samples, map[string]int{"x": tt.at(i)})
		}
		if got := grown(samples, slack); (len(got) > 0) != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// Under churn nothing grows and nothing fails.
func TestSoak(t *testing.T) {
	w := newTown(t, *soakFor+10*time.Minute)
	began := time.Now()
	load := w.load(w.client, 300*time.Millisecond)
	c := &churn{w: w, load: load, began: began, replaced: began}
	every := min(time.Minute, *soakFor/20)
	report := w.newReport()
	var samples []map[string]int
	for next := began.Add(every); time.Since(began) < *soakFor || len(samples) < enough; next = next.Add(every) {
		for time.Now().Before(next) {
			c.step()
			time.Sleep(min(time.Until(next), *soakFor/600+time.Second/2))
		}
		if s := report.sample(time.Since(began), load); time.Since(c.replaced) > settle {
			samples = append(samples, s)
		}
	}
	c.finish()
	for _, g := range grown(samples, slackOf) {
		t.Error("it grows: ", g)
	}
	w.judge(fmt.Sprintf("soak of %s: %s", *soakFor, c), load.stop(killed(c.kills)), len(c.kills))
	w.nothingLeaked("soak")
}

// churn changes something at every step.
type churn struct {
	w     *town
	load  *mixed
	began time.Time
	steps int
	// replaced is when the agent was started last.
	replaced time.Time
	kills    []lab.Window

	stops, upgrades, pods, servers, weights, services int
	late                                              lab.ServiceSpec
}

// String is what happened so far.
func (c *churn) String() string {
	return fmt.Sprintf("%d stops, %d kills and %d upgrades of the agent, %d pods, %d servers, %d changes of weights, %d Services",
		c.stops, len(c.kills), c.upgrades, c.pods, c.servers, c.weights, c.services)
}

// replacements of the agent, in the first quarter of a run.
func replacements() int {
	if *soakFor < shortRun {
		return 3
	}
	return 6
}

func (c *churn) step() {
	w := c.w
	done := c.stops + len(c.kills) + c.upgrades
	if done < replacements() && time.Since(c.began) > *soakFor/4*time.Duration(done+1)/time.Duration(replacements()+1) {
		switch done % 3 {
		case 0:
			w.must(w.agent.Stop(time.Minute))
			w.agent = w.startAgent()
			c.stops++
		case 1:
			c.kills = append(c.kills, w.kill())
			w.agent = w.startAgent()
		case 2:
			w.upgrade()
			c.upgrades++
		}
		c.replaced = time.Now()
		return
	}
	c.steps++
	switch c.steps % 4 {
	case 0: // a pod comes, talks, and goes
		p := w.pod("passer-by", true)
		l, err := p.StartTraffic(mix[1].config(1, 4, 20*time.Millisecond))
		w.must(err)
		w.must(l.WaitRequests(w.ctx, 20))
		_, err = l.Stop()
		w.must(err)
		w.remove(p)
		c.pods++
	case 1: // a server is replaced
		w.replaceServer(c.steps/4%2, c.load)
		c.servers++
	case 2: // weights
		a, b := w.servers[0], w.servers[1]
		w.serveBy([]*lab.Pod{b, a}...)
		w.routes(1 + c.steps%100)
		c.weights++
	case 3: // a Service comes, and goes the next time
		if c.late.Name == "" {
			c.late = service{"late", 99, tcpPort, echoPort}.spec(w.servers)
			w.must(w.SetService(c.late))
			c.services++
		} else {
			c.finish()
		}
	}
}

// finish takes back what is there only for a while.
func (c *churn) finish() {
	c.w.t.Helper()
	if c.late.Name != "" {
		c.w.must(c.w.DeleteService(c.late))
		c.late.Name = ""
	}
}

// report writes the samples.
type report struct {
	w    *town
	csv  *csv.Writer
	cols []string
	cpu  time.Duration
	at   time.Time
}

func (w *town) newReport() *report {
	w.t.Helper()
	r := &report{w: w, at: time.Now(), cpu: w.cpu()}
	if *soakCSV != "" {
		w.must(os.MkdirAll(filepath.Dir(*soakCSV), 0o755))
		f, err := os.Create(*soakCSV)
		w.must(err)
		w.t.Cleanup(func() { f.Close() })
		r.csv = csv.NewWriter(f)
	}
	return r
}

// sample counts, writes a line and shows the most telling figures.
func (r *report) sample(after time.Duration, load *mixed) map[string]int {
	w := r.w
	w.t.Helper()
	var c census
	w.eventually("count", func() (err error) { c, err = w.take(); return err })
	s := c.figures
	s["memory_kib"] = int(c.RSS >> 10)
	control := census{figures: map[string]int{}}
	w.must(control.process(w.control))
	s["control_memory_kib"] = int(control.RSS >> 10)
	var exchanges, failed uint64
	for _, l := range load.loads {
		now := l.Now()
		exchanges, failed = exchanges+now.Requests, failed+now.Failed
	}
	cpu, at := w.cpu(), time.Now()
	cores := (cpu - r.cpu).Seconds() / at.Sub(r.at).Seconds()
	r.cpu, r.at = cpu, at
	if r.cols == nil {
		for name := range s {
			r.cols = append(r.cols, name)
		}
		sort.Strings(r.cols)
		r.write(append([]string{"seconds", "agent_pid", "exchanges", "failed", "cores"}, r.cols...))
		w.t.Logf("%8s %9s %7s %6s %8s %6s %10s %7s %7s %6s %5s", "after", "exchanges", "failed", "cores", "mem KiB", "fds", "goroutines", "threads", "sockets", "pairs", "tcp")
	}
	line := []string{strconv.Itoa(int(after.Seconds())), strconv.Itoa(w.agent.PID()), fmt.Sprint(exchanges), fmt.Sprint(failed), fmt.Sprintf("%.2f", cores)}
	for _, name := range r.cols {
		line = append(line, strconv.Itoa(s[name]))
	}
	r.write(line)
	w.t.Logf("%8s %9d %7d %6.2f %8d %6d %10d %7d %7d %6d %5d", after.Round(time.Second), exchanges, failed, cores, s["memory_kib"], s[descriptors],
		s[goroutines], s[threads], s[sockets], s["sm_pairs"], s[tcpSockets])
	return s
}

func (r *report) write(line []string) {
	if r.csv == nil {
		return
	}
	r.w.must(r.csv.Write(line))
	r.csv.Flush()
	r.w.must(r.csv.Error())
}

// cpu is the time that everything in the lab has had so far: agent, control plane, servers and clients.
func (w *town) cpu() time.Duration {
	w.t.Helper()
	text, err := os.ReadFile(filepath.Join(w.Cgroup, "cpu.stat"))
	w.must(err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "usage_usec "); ok {
			n, err := strconv.Atoi(strings.TrimSpace(value))
			w.must(err)
			return time.Duration(n) * time.Microsecond
		}
	}
	w.t.Fatal("cpu.stat has no usage_usec")
	return 0
}
