package http1

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// llhttpCase is one input of llhttp's own tests and the log that its parser writes for it.
type llhttpCase struct {
	name  string // "request/sample: curl GET"
	kind  string // "request", "response-lenient-headers", "url"…
	input string
	log   []string
}

// corpusDir finds the shared test data, which is not part of the project.
func corpusDir(t testing.TB) string {
	dirs := []string{os.Getenv("SOCKMESH_SHARED")}
	if wd, err := os.Getwd(); err == nil {
		for d := wd; d != filepath.Dir(d); d = filepath.Dir(d) {
			if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
				dirs = append(dirs, filepath.Join(d, "..", "shared"))
				break
			}
		}
	}
	for _, d := range dirs {
		if d == "" {
			continue
		}
		d = filepath.Join(d, "corpora", "llhttp")
		if _, err := os.Stat(d); err == nil {
			return d
		}
	}
	t.Skip("llhttp's test cases are not here (../shared/corpora/llhttp, or below SOCKMESH_SHARED): nothing to compare with")
	return ""
}

// readCases parses the markdown: headings name a case, an optional meta comment says its kind, a fenced block is the input and
// the next one the log.
func readCases(t testing.TB, dir string) []llhttpCase {
	var files []string
	for _, pattern := range []string{"request/*.md", "response/*.md", "*.md"} {
		f, _ := filepath.Glob(filepath.Join(dir, pattern))
		files = append(files, f...)
	}
	var out []llhttpCase
	for _, file := range files {
		rel, _ := filepath.Rel(dir, file)
		rel = strings.TrimSuffix(rel, ".md")
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		var title, fence, meta string
		var block []string
		seen := map[string]int{}
		var cur *llhttpCase
		sc := bufio.NewScanner(f)
		sc.Buffer(nil, 1<<20)
		for sc.Scan() {
			line := sc.Text()
			switch {
			case fence == "" && strings.HasPrefix(line, "#"):
				title = strings.TrimSpace(strings.TrimLeft(line, "#"))
			case fence == "" && strings.HasPrefix(line, "<!-- meta="):
				meta = strings.TrimSuffix(strings.TrimPrefix(line, "<!-- meta="), "-->")
			case fence == "" && strings.HasPrefix(line, "```"):
				fence, block = line[3:], nil
			case fence != "" && line == "```":
				switch fence {
				case "http", "url":
					var m struct{ Type string }
					if meta != "" {
						if err := json.Unmarshal([]byte(meta), &m); err != nil {
							t.Fatalf("%s: %s: meta: %v", rel, title, err)
						}
					}
					if m.Type == "" {
						m.Type = fence
					}
					name := rel + ": " + title
					if seen[name]++; seen[name] > 1 {
						name += " #" + strconv.Itoa(seen[name])
					}
					cur = &llhttpCase{name: name, kind: m.Type, input: unescape(strings.Join(block, "\n"))}
					meta = ""
				case "log":
					cur.log = block
					out = append(out, *cur)
				}
				fence = ""
			case fence != "":
				block = append(block, line)
			}
		}
		f.Close()
	}
	return out
}

var hexEscape = regexp.MustCompile(`\\x([0-9a-fA-F]+)`)

// unescape does what llhttp's test runner does with an input.
func unescape(s string) string {
	s = strings.ReplaceAll(s, "\\\n", "")
	s = strings.ReplaceAll(s, "\n", "\r\n")
	s = strings.NewReplacer(`\r`, "\r", `\n`, "\n", `\t`, "\t", `\f`, "\f").Replace(s)
	return hexEscape.ReplaceAllStringFunc(s, func(m string) string {
		n, _ := strconv.ParseUint(m[2:], 16, 8)
		return string([]byte{byte(n)})
	})
}

// verdict is what a parser made of an input, in a form that llhttp's log and ours have in common.
type verdict struct {
	messages []string // head, body and whether complete
	err      string
}

func (v verdict) String() string {
	s := strings.Join(v.messages, "\n")
	if v.err != "" {
		s += "\nERROR " + v.err
	}
	return s
}

// agrees compares: the same messages, and an error or none. Where both refuse, what they said of the message that they
// refused is not compared: when one notices is its own affair.
func (v verdict) agrees(o verdict) bool {
	if (v.err == "") != (o.err == "") {
		return false
	}
	return strings.Join(v.comparable(), "\n") == strings.Join(o.comparable(), "\n")
}

func (v verdict) comparable() []string {
	if n := len(v.messages); v.err != "" && n > 0 && !strings.HasSuffix(v.messages[n-1], "|complete") {
		return v.messages[:n-1]
	}
	return v.messages
}

// message under construction from llhttp's log.
type logMessage struct {
	method, url, status     string
	fields, trailers        [][2]string
	body                    strings.Builder
	begun, headed, complete bool
}

func (m *logMessage) render() string {
	return renderMessage(m.method, m.url, m.status, m.fields, m.trailers, m.body.String(), m.complete)
}

func renderMessage(method, url, status string, fields, trailers [][2]string, body string, complete bool) string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s%s %s", method, status, url)
	for _, f := range fields {
		fmt.Fprintf(&s, "|%s=%s", f[0], f[1])
	}
	fmt.Fprintf(&s, "|body %q", body)
	for _, f := range trailers {
		fmt.Fprintf(&s, "|%s=%s", f[0], f[1])
	}
	if complete {
		s.WriteString("|complete")
	}
	return s.String()
}

var (
	spanRE = regexp.MustCompile(`^off=\d+ len=\d+ span\[([a-z_.]+)\]=(.*)$`)
	headRE = regexp.MustCompile(`^off=\d+ headers complete (?:method=\d+ |status=(\d+) )`)
	errRE  = regexp.MustCompile(`^off=\d+ error code=(\d+) reason="(.*)"$`)
)

// Codes by which llhttp says that it stops, not that the input is wrong.
var pauses = map[string]bool{"21": true, "22": true, "23": true}

// fromLog reads the verdict out of llhttp's log. Heads that did not complete are left out, as our parser says
// nothing about them either.
func fromLog(log []string) verdict {
	var v verdict
	m := &logMessage{}
	flush := func() {
		if m.headed {
			v.messages = append(v.messages, m.render())
		}
		m = &logMessage{begun: true}
	}
	for _, line := range log {
		if strings.HasSuffix(line, "message begin") {
			flush()
		}
		if x := errRE.FindStringSubmatch(line); x != nil && !pauses[x[1]] {
			v.err = x[2]
		}
		if x := headRE.FindStringSubmatch(line); x != nil {
			m.headed, m.status = true, x[1]
		}
		if strings.HasSuffix(line, "message complete") {
			m.complete = true
		}
		x := spanRE.FindStringSubmatch(line)
		if x == nil {
			continue
		}
		text := x[2]
		switch text {
		case "cr":
			text = "\r"
		case "lf":
			text = "\n"
		default:
			text = strings.TrimSuffix(strings.TrimPrefix(text, `"`), `"`)
			text = strings.NewReplacer(`\t`, "\t", `\f`, "\f", "ÿ", "\xff").Replace(text)
		}
		list := &m.fields
		if m.headed {
			list = &m.trailers
		}
		switch x[1] {
		case "method":
			m.method = text
		case "url":
			m.url = text
		case "body":
			m.body.WriteString(text)
		case "header_field":
			*list = append(*list, [2]string{strings.ToLower(text), ""})
		case "header_value":
			f := &(*list)[len(*list)-1]
			f[1] = strings.TrimRight(f[1]+text, " \t")
		}
	}
	flush()
	return v
}

// target is the request target in the form that llhttp reports, out of what our parser made of it.
func target(b *header.Block) string {
	switch {
	case string(b.Method()) == "CONNECT":
		return string(b.Authority())
	case b.Scheme() != nil:
		return string(b.Scheme()) + "://" + string(b.Authority()) + string(b.Path())
	}
	return string(b.Path())
}

// ours runs our parser as a server or client would: it stops where a tunnel may begin and where the connection is
// to be closed.
func ours(c llhttpCase) verdict {
	var v verdict
	var head, trailers header.Block
	isRequest := !strings.HasPrefix(c.kind, "response")
	opt := &Options{AcceptHTTP10: true, OptionalHost: true}
	var req RequestParser
	var resp ResponseParser
	req.Init(opt)
	resp.Init(opt)
	next := func() {
		if isRequest {
			req.Next(&head, &trailers)
		} else {
			resp.Next(&head, &trailers, ToUpgrade)
		}
	}
	parse := func(b []byte) (int, Event, []byte, Framing, error) {
		if isRequest {
			n, ev, err := req.Parse(b)
			return n, ev, req.Data(), req.Framing(), err
		}
		n, ev, err := resp.Parse(b)
		return n, ev, resp.Data(), resp.Framing(), err
	}
	b := []byte(c.input)
	next()
	var url, body string
	var fields, trail [][2]string
	headed := false
	flush := func(complete bool) {
		if !headed {
			return
		}
		status := ""
		if !isRequest {
			status = strconv.Itoa(head.Status())
		}
		v.messages = append(v.messages, renderMessage(string(head.Method()), url, status, fields, trail, body, complete))
		headed, body, fields, trail = false, "", nil, nil
	}
	for {
		n, ev, data, framing, err := parse(b)
		b = b[n:]
		if err != nil {
			flush(false)
			v.err = err.Error()
			return v
		}
		switch ev {
		case Headers, Informational:
			headed = true
			url = target(&head)
			fields = append(fields, fieldsOf(&head)...)
			if ev == Informational {
				flush(true)
			}
		case Data:
			body += string(data)
		case Trailers:
			trail = fieldsOf(&trailers)
		case Complete:
			flush(true)
			if framing.Upgrade || string(head.Method()) == "CONNECT" {
				return v
			}
			if !framing.KeepAlive && strings.Trim(string(b), "\r\n") != "" {
				v.err = "data after close"
				return v
			}
			next()
		case Tunnel:
			flush(true)
			return v
		case NeedMore:
			flush(false)
			return v
		}
	}
}

func fieldsOf(b *header.Block) [][2]string {
	var out [][2]string
	for i := range b.Len() {
		out = append(out, [2]string{string(b.Name(i)), string(b.Value(i))})
	}
	return out
}

// Where our Block holds the same in another form than llhttp's spans.
var (
	hostRE     = regexp.MustCompile(`\|host=[^|]*`)                    // a request's Host is the authority, not a field
	emptyPathR = regexp.MustCompile(`^([A-Z]+ http://[^/?| ]+)([?|])`) // an absolute target without path means "/"
)

func normalise(c llhttpCase, v verdict) verdict {
	if strings.HasPrefix(c.kind, "response") {
		return v
	}
	for i, m := range v.messages {
		m = strings.Replace(m, "?q=search#hey|", "?q=search|", 1)
		v.messages[i] = emptyPathR.ReplaceAllString(hostRE.ReplaceAllString(m, ""), "$1/$2")
	}
	return v
}

func TestLLHTTPCases(t *testing.T) {
	n, agreed := 0, 0
	unknown := map[string]bool{}
	for name := range disagreements {
		unknown[name] = true
	}
	for _, c := range readCases(t, corpusDir(t)) {
		n++
		delete(unknown, c.name)
		t.Run(c.name, func(t *testing.T) {
			if c.kind == "url" {
				c = asRequest(c)
			}
			// These are about transfer codings; fragments have cases of their own.
			c.input = strings.Replace(c.input, "?q=search#hey ", "?q=search ", 1)
			want, got := normalise(c, fromLog(c.log)), ours(c)
			why, listed := disagreements[c.name]
			switch {
			case want.agrees(got):
				agreed++
				if listed {
					t.Errorf("listed as a disagreement (%s), but llhttp and we agree: %s", why.reason, got)
				}
			case !listed:
				t.Errorf("%s\n%q\nllhttp: %s\nours:   %s", c.kind, c.input, want, got)
			case why.we == refuse && got.err == "":
				t.Errorf("we should refuse this (%s), but: %s", why.reason, got)
			case why.we == accept && got.err != "":
				t.Errorf("we should accept this (%s), but: %s", why.reason, got)
			case why.we == refuseLater:
				if c.input += "\r\n"; ours(c).err == "" {
					t.Errorf("we should refuse this once the head is complete (%s)", why.reason)
				}
			}
		})
	}
	for name := range unknown {
		t.Errorf("listed as a disagreement, but there is no such case: %s", name)
	}
	t.Logf("%d cases: %d agree, %d differ for a listed reason", n, agreed, len(disagreements))
}

// asRequest makes a request of one of the inputs for llhttp's URL parser; it is accepted if the URL is.
func asRequest(c llhttpCase) llhttpCase {
	v := fromLog(c.log)
	if v.err == "" {
		c.log = []string{
			"off=0 message begin", `off=0 len=1 span[method]="GET"`, fmt.Sprintf(`off=0 len=1 span[url]="%s"`, c.input),
			"off=0 headers complete method=1 ", "off=0 message complete",
		}
	}
	c.kind, c.input = "request", "GET "+c.input+" HTTP/1.1\r\n\r\n"
	return c
}
