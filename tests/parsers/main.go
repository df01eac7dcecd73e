// Command parsers compares our HTTP/1.1 head parser with those of other projects, one head from memory to fields:
// llhttp (Node.js; C, out of the source archive of httptools on PyPI), picohttpparser (H2O; C, from Debian's libh2o) and
// httparse (hyper; Rust, from crates.io).
//
// A head goes to each parser a hundred thousand times in a process of its own, which says how much user time that took;
// processes alternate, and the least of the rounds counts, since whatever disturbs a run makes it longer. `make parsers`
// installs and builds the peers and prints the table. The heads are those of the benchmarks of pkg/proxy/http1.
//
// They don't do the same work. The peers mark where names and values are. Ours also lower-cases names, finds the known ones
// in a table, copies the head into the request's own block, checks the framing as RFC 9112 demands, and finds what belongs
// to the hop: all that a proxy needs before it can forward.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
	"github.com/sockmesh/sockmesh/pkg/proxy/http1"
)

const (
	repetitions = 100000
	rounds      = 9
)

var heads = []struct{ name, text string }{
	{"request of a service", "GET /productpage?u=1 HTTP/1.1\r\nHost: reviews.default.svc.cluster.local:9080\r\n" +
		"User-Agent: wrk/4.2.0\r\nAccept: */*\r\nX-Request-Id: 7b1b1a5e-6e0b-4d0a-9d3e-0f1f2b3c4d5e\r\n\r\n"},
	{"request of a browser", "GET /static/app.js?v=3 HTTP/1.1\r\nHost: www.example.com\r\n" +
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n" +
		"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n" +
		"Accept-Language: en-GB,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br\r\nReferer: https://www.example.com/index.html\r\n" +
		"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; _ga=GA1.2.1234567890.1234567890\r\n" +
		"Connection: keep-alive\r\nUpgrade-Insecure-Requests: 1\r\nSec-Fetch-Dest: script\r\nCache-Control: max-age=0\r\n\r\n"},
}

func main() {
	var err error
	switch len(os.Args) {
	case 2:
		err = compare(os.Args[1])
	case 4: // sockmesh FILE REPETITIONS, as the peers are called
		err = ours(os.Args[2], os.Args[3])
	default:
		err = fmt.Errorf("want the folder with the peers that `make parsers` has built")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "parsers:", err)
		os.Exit(1)
	}
}

// ours parses the head in file so many times and prints the nanoseconds of user time that each took.
func ours(file, times string) error {
	in, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	var p http1.RequestParser
	var head header.Block
	p.Init(&http1.Options{})
	before, err := userTime()
	if err != nil {
		return err
	}
	for range n {
		p.Next(&head, nil)
		if _, ev, err := p.Parse(in); ev != http1.Headers {
			return fmt.Errorf("not a whole head: %w", err)
		}
	}
	after, err := userTime()
	fmt.Printf("%.1f\n", float64(after-before)/float64(n))
	return err
}

// userTime of this thread's process, ns.
func userTime() (int64, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return u.Utime.Nano(), err
}

func compare(folder string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	parsers := []struct{ name, program string }{{"sockmesh", self}}
	for _, name := range []string{"llhttp", "picohttpparser", "httparse"} {
		parsers = append(parsers, struct{ name, program string }{name, filepath.Join(folder, name)})
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "user time per head, ns\t")
	for _, p := range parsers {
		fmt.Fprint(t, p.name, "\t")
	}
	fmt.Fprintln(t)
	for i, head := range heads {
		file := filepath.Join(folder, fmt.Sprintf("head-%d", i))
		if err := os.WriteFile(file, []byte(head.text), 0o644); err != nil {
			return err
		}
		least := make([]float64, len(parsers))
		for round := range rounds {
			for j, p := range parsers {
				ns, err := run(p.name, p.program, file)
				if err != nil {
					return err
				}
				if round == 0 || ns < least[j] {
					least[j] = ns
				}
			}
		}
		fmt.Fprintf(t, "%s, %d bytes, %d fields\t", head.name, len(head.text), strings.Count(head.text, "\r\n")-2)
		for _, ns := range least {
			fmt.Fprintf(t, "%.0f\t", ns)
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

func run(name, program, file string) (float64, error) {
	cmd := exec.Command(program, name, file, strconv.Itoa(repetitions))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
}
