package envoydiff

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/proxy/proxytest"
)

// exchange is what a client sends on one connection, and what is compared.
type exchange struct {
	name string
	// send is written piece by piece, with a short wait between: "|" in the text stands for CRLF.
	send []string
	// half closes the client's direction after sending; requests is how many access log lines there will be
	// (default 1).
	half     bool
	requests int
	// differs says what is different on purpose; the case is then only run, and must differ.
	differs string
	// ignore are header names that are not compared, skip parts: "details", "flags", "upstream", "sizes", "body", "end".
	ignore []string
	skip   []string
}

// world is one configuration and the exchanges to run under it.
type world struct {
	name, hcm, hosts string
	// clusters are more of them, with %d for the scripted upstream's port.
	clusters  string
	exchanges []exchange
}

func (w *world) bootstrap(t *testing.T, up *scripted) string {
	hosts := w.hosts
	if hosts == "" {
		hosts = `
- name: all
  domains: ["*"]
  routes:
  - match: {prefix: /}
    route: {cluster: u}
`
	}
	clusters := proxytest.Cluster("u", "", up.Port) + proxytest.Cluster("dead", "", proxytest.ClosedPort(t)) + proxytest.Cluster("empty", "") +
		strings.ReplaceAll(w.clusters, "%d", fmt.Sprint(up.Port))
	b := proxytest.Bootstrap(w.hcm, "- match: {prefix: /}", clusters)
	i, j := strings.Index(b, "            virtual_hosts:\n"), strings.Index(b, "  clusters:\n")
	return b[:i] + "            validate_clusters: false\n" + "            virtual_hosts:\n" + indent(hosts, 12) + b[j:]
}

func indent(s string, n int) string {
	lines := strings.Split(strings.Trim(s, "\n"), "\n")
	for i := range lines {
		lines[i] = strings.Repeat(" ", n) + lines[i]
	}
	return strings.Join(lines, "\n") + "\n"
}

// outcome is what was seen of one exchange.
type outcome struct{ client, upstream, log string }

func TestAnswersAreEnvoys(t *testing.T) {
	for _, w := range worlds {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			upE, upS := newScripted(t), newScripted(t)
			env := startEnvoy(t, w.bootstrap(t, upE))
			own := proxytest.Start(t, w.bootstrap(t, upS))
			for _, x := range w.exchanges {
				t.Run(x.name, func(t *testing.T) {
					n := max(x.requests, 1)
					var theirs, ours outcome
					done := make(chan struct{})
					go func() { theirs = x.run(t, env.addr, upE); close(done) }()
					ours = x.run(t, own.Addr, upS)
					<-done
					lines := env.lines(t, n)
					var records []string
					for range n {
						records = append(records, line(own.Record(t)))
					}
					theirs.log, ours.log = x.trim(lines), x.trim(records)
					report(t, &x, theirs, ours)
				})
			}
		})
	}
}

// line gives a record the form of Envoy's log.
func line(r proxytest.Record) string {
	return fmt.Sprintf("%d %s %s %d %d %d", r.Status, r.Flags, orDash(r.Details), r.Attempts, r.Received, r.Sent)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (x *exchange) skips(part string) bool { return slices.Contains(x.skip, part) }

// trim leaves out of log lines what is not compared.
func (x *exchange) trim(lines []string) string {
	for i, l := range lines {
		f := strings.SplitN(l, " ", 6)
		if len(f) < 6 {
			continue
		}
		flags := strings.Split(f[1], ",")
		sort.Strings(flags) // Envoy prints them as they happened
		f[1] = strings.Join(flags, ",")
		if x.skips("flags") {
			f[1] = "?"
		}
		if x.skips("details") {
			f[2] = "?"
		}
		if x.skips("sizes") {
			f[4], f[5] = "?", "?"
		}
		lines[i] = strings.Join(f, " ")
	}
	return strings.Join(lines, "\n")
}

func (x *exchange) run(t *testing.T, addr string, up *scripted) outcome {
	up.take()
	c := proxytest.Dial(t, addr)
	defer c.Close()
	for i, s := range x.send {
		if i > 0 {
			time.Sleep(150 * time.Millisecond)
		}
		c.Send(strings.ReplaceAll(s, "|", "\r\n"))
	}
	if x.half {
		time.Sleep(100 * time.Millisecond)
		_ = c.CloseWrite()
	}
	// A connection that is kept open is read until it has been quiet for a while.
	var got []byte
	end := "open"
	buf := make([]byte, 64<<10)
	wait := 300 * time.Millisecond
	if strings.Contains(strings.Join(x.send, ""), "hang") {
		wait = 2500 * time.Millisecond
	}
	for {
		_ = c.SetReadDeadline(time.Now().Add(wait))
		n, err := c.TCPConn.Read(buf)
		got = append(got, buf[:n]...)
		if err == nil {
			continue
		}
		if err == io.EOF {
			end = "closed"
		} else if strings.Contains(err.Error(), "reset") {
			end = "reset"
		}
		break
	}
	_ = c.Close()
	time.Sleep(30 * time.Millisecond)
	var upstream []string
	for _, m := range up.take() {
		upstream = append(upstream, x.normal(m))
	}
	if x.skips("end") || strings.Contains(strings.ToLower(string(got)), "\r\nconnection: close\r\n") {
		end = "closed" // Envoy waits a second for the client to close first
	}
	o := outcome{client: x.responses(string(got)) + "\n[" + end + "]", upstream: strings.Join(upstream, "\n---\n")}
	if x.skips("upstream") {
		o.upstream = ""
	}
	return o
}

// responses normalises each of the heads in a client's input.
func (x *exchange) responses(s string) string {
	var out strings.Builder
	for s != "" {
		i := strings.Index(s, "HTTP/1.")
		if i < 0 {
			out.WriteString(s)
			break
		}
		j := strings.Index(s[i:], "\r\n\r\n")
		if j < 0 {
			out.WriteString(s)
			break
		}
		out.WriteString(s[:i])
		out.WriteString(x.normal(s[i : i+j+4]))
		chunked := strings.Contains(strings.ToLower(s[i:i+j+4]), "\r\ntransfer-encoding: chunked\r\n")
		s = s[i+j+4:]
		if chunked {
			r := bufio.NewReader(strings.NewReader(s))
			body, _ := readBody(r, "transfer-encoding: chunked\r\n")
			rest, _ := io.ReadAll(r)
			out.WriteString(body + "\n")
			s = string(rest)
		}
	}
	if x.skips("body") {
		return strings.SplitAfter(out.String(), "\r\n\r\n")[0]
	}
	return out.String()
}

// localAddrs are this machine's: Envoy puts one of them into x-forwarded-for for clients on loopback.
var localAddrs = func() (list []string) {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && n.IP.To4() != nil {
			list = append(list, n.IP.String())
		}
	}
	return list
}()

var volatile = regexp.MustCompile(`(?m)^(date|x-request-id|x-envoy-upstream-service-time|x-envoy-expected-rq-timeout-ms): .*`)

// normal sorts the head's fields and hides values that change from run to run.
func (x *exchange) normal(message string) string {
	head, body, _ := strings.Cut(message, "\r\n\r\n")
	lines := strings.Split(head, "\r\n")
	fields := lines[1:]
	kept := fields[:0]
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ":")
		name = strings.ToLower(name)
		if slices.Contains(x.ignore, name) {
			continue
		}
		f = name + ":" + value
		for _, a := range localAddrs {
			f = strings.ReplaceAll(f, a, "127.0.0.1")
		}
		if strings.HasPrefix(f, "connection:") {
			f = strings.ToLower(f)
		}
		if strings.HasPrefix(f, "x-envoy-expected-rq-timeout-ms: 149") {
			f = "x-envoy-expected-rq-timeout-ms: 15000"
		}
		if m := volatile.FindStringSubmatch(f); m != nil && m[1] != "x-envoy-expected-rq-timeout-ms" {
			f = m[1] + ": *"
		}
		kept = append(kept, f)
	}
	sort.Strings(kept)
	return lines[0] + "\n  " + strings.Join(kept, "\n  ") + "\n\n" + body
}

var port = regexp.MustCompile(`127\.0\.0\.1:\d+`)

func report(t *testing.T, x *exchange, theirs, ours outcome) {
	t.Helper()
	differ := false
	show := func(what, a, b string) {
		a, b = port.ReplaceAllString(a, "127.0.0.1:*"), port.ReplaceAllString(b, "127.0.0.1:*")
		if a == b {
			return
		}
		differ = true
		if x.differs == "" {
			t.Errorf("%s differs\n--- envoy\n%s\n--- sockmesh\n%s", what, a, b)
		}
	}
	show("what the client saw", theirs.client, ours.client)
	show("what the upstream saw", theirs.upstream, ours.upstream)
	show("the log", theirs.log, ours.log)
	if x.differs != "" && !differ {
		t.Errorf("no difference any more, though one is expected: %s", x.differs)
	}
}
