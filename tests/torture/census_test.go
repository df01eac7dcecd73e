package torture

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// census counts everything that could leak, by what leaks it: the agent's process, the kernel's maps, and sockets in
// the namespaces of node and pods.
type census struct {
	RSS     int64 // of the agent, in bytes
	figures map[string]int
	tcp     []string // the sockets themselves
}

// Names of figures; those of maps are the maps' own.
const (
	descriptors = "descriptors"
	goroutines  = "goroutines"
	threads     = "threads"
	sockets     = "sockets" // that the programs know, by the iterator over sm_sock
	tcpSockets  = "tcp"     // of all namespaces, by /proc/net, those that wait out TIME_WAIT left out
)

// take counts now.
func (w *town) take() (census, error) {
	c := census{figures: map[string]int{}}
	s, err := w.Status(w.ctx)
	if err != nil {
		return c, err
	}
	for _, m := range s.Datapath.Maps {
		if m.Type != "SkStorage" && m.Type != "LRUHash" { // the one goes with its sockets, the other forgets by itself
			c.figures[m.Name] = m.Entries
		}
	}
	out, err := w.CLI(w.ctx, "sockets", "-o", "json")
	if err != nil {
		return c, err
	}
	var rows []struct{ Pod string }
	if err := json.Unmarshal([]byte(out), &rows); err != nil {
		return c, fmt.Errorf("sockmesh sockets -o json: %w", err)
	}
	c.figures[sockets] = 0
	for _, r := range rows {
		if r.Pod != "(canary)" { // flies now and then
			c.figures[sockets]++
		}
	}
	if c.tcp, err = w.tcpSockets(); err != nil {
		return c, err
	}
	c.figures[tcpSockets] = len(c.tcp)
	metrics, err := w.Metrics(w.ctx, "/metrics")
	if err != nil {
		return c, err
	}
	if c.figures[goroutines], err = metric(metrics, "go_goroutines"); err != nil {
		return c, err
	}
	return c, c.process(w.agent)
}

// process reads what /proc says of the agent.
func (c *census) process(p *lab.Process) error {
	dir := fmt.Sprintf("/proc/%d/", p.PID())
	fds, err := os.ReadDir(dir + "fd")
	if err != nil {
		return err
	}
	c.figures[descriptors] = len(fds)
	text, err := os.ReadFile(dir + "status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		switch name {
		case "VmRSS":
			c.RSS = int64(n) << 10
		case "Threads":
			c.figures[threads] = n
		}
	}
	return nil
}

func metric(text, name string) (int, error) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return int(f), err
		}
	}
	return 0, fmt.Errorf("no metric %s", name)
}

// tcpSockets lists the sockets of all namespaces of the lab as /proc/net does.
func (w *town) tcpSockets() ([]string, error) {
	var out []string
	for _, place := range w.Places() {
		err := place.Do(func() error {
			for _, file := range []string{"tcp", "tcp6"} {
				f, err := os.Open(filepath.Join("/proc/thread-self/net", file))
				if err != nil {
					return err
				}
				const local, remote, state, timeWait = 1, 2, 3, "06"
				for lines := bufio.NewScanner(f); lines.Scan(); {
					if fields := strings.Fields(lines.Text()); len(fields) > state && fields[0] != "sl" && fields[state] != timeWait {
						out = append(out, fmt.Sprintf("%s: %s to %s in state %s", place.Name, fields[local], fields[remote], fields[state]))
					}
				}
				f.Close()
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// bounded are figures with a ceiling of their own, which come and go: threads are Go's to make. Everything else must go
// back to where it was.
var bounded = map[string]bool{threads: true}

// over lists what is more than in the other census.
func (c census) over(other census) []string {
	var out []string
	for name, n := range c.figures {
		if was := other.figures[name]; n > was && !bounded[name] {
			out = append(out, fmt.Sprintf("%s %d instead of %d", name, n, was))
		}
	}
	sort.Strings(out)
	return out
}

// String has every figure that is not zero.
func (c census) String() string {
	var out []string
	for name, n := range c.figures {
		if n != 0 {
			out = append(out, fmt.Sprintf("%s %d", name, n))
		}
	}
	sort.Strings(out)
	return fmt.Sprintf("memory %d MiB, %s", c.RSS>>20, strings.Join(out, ", "))
}

// atRest takes a census twice, until both agree.
func (w *town) atRest() census {
	w.t.Helper()
	var last census
	w.eventually("nothing moves any more", func() error {
		c, err := w.take()
		if err == nil {
			diff := append(c.over(last), last.over(c)...)
			if n := c.figures[sockets] + c.figures["sm_pairs"]; n > 0 { // of the warm-up
				diff = append(diff, fmt.Sprintf("%d sockets are still open", n))
			}
			if len(diff) > 0 {
				err = fmt.Errorf("%s", strings.Join(diff, ", "))
			}
		}
		last = c
		return err
	})
	return last
}

// nothingLeaked waits until everything is as it was at rest.
func (w *town) nothingLeaked(event string) {
	w.t.Helper()
	var c census
	w.eventually(event+": what is left over", func() error {
		var err error
		if c, err = w.take(); err != nil {
			return err
		}
		if more := c.over(w.rest); len(more) > 0 {
			return fmt.Errorf("%s\n%s", strings.Join(more, ", "), strings.Join(c.tcp, "\n"))
		}
		return nil
	})
	w.t.Logf("%s: at rest before: %s", event, w.rest)
	w.t.Logf("%s: at rest after:  %s", event, c)
}
