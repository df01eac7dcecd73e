package http1

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// seen is what a parser reported of one message, independent of how the input was split.
type seen struct {
	Head, Body, Trailers string
	Framing              Framing
	Interim              []string
	Complete, Tunnel     bool
}

// transcript is what a parser reported of a whole input.
type transcript struct {
	Messages []seen
	Err      string
	Rest     string // not consumed, after Tunnel or at the end
}

func describe(b *header.Block) string {
	var s strings.Builder
	if m := b.Method(); m != nil {
		fmt.Fprintf(&s, "%s %q %q %q\n", m, b.Path(), b.Authority(), b.Scheme())
	}
	if b.Status() != 0 {
		fmt.Fprintf(&s, "%d\n", b.Status())
	}
	for i := range b.Len() {
		fmt.Fprintf(&s, "%s=%s\n", b.Name(i), b.Value(i))
	}
	return s.String()
}

// parser is what both parsers can do.
type parser interface {
	Parse([]byte) (int, Event, error)
	Data() []byte
	Framing() Framing
	Done() bool
}

// run feeds the input in pieces that end at the offsets of cuts, keeping what is not consumed as a connection does.
func run(t testing.TB, p parser, next func(*header.Block, *header.Block), input string, cuts []int) transcript {
	t.Helper()
	var out transcript
	var head, trailers header.Block
	next(&head, &trailers)
	cur := seen{}
	begun := false
	from, to := 0, 0
	for k := 0; ; {
		if k < len(cuts) {
			to = cuts[k]
		} else {
			to = len(input)
		}
		k++
		for {
			b := []byte(input[from:to])
			n, ev, err := p.Parse(b)
			if n < 0 || n > len(b) {
				t.Fatalf("consumed %d of %d", n, len(b))
			}
			from += n
			if n > 0 || ev != NeedMore {
				begun = true
			}
			if err != nil {
				var pe *ParseError
				if !errors.As(err, &pe) {
					t.Fatalf("error is %T", err)
				}
				out.Err = err.Error()
				if cur.Head != "" {
					out.Messages = append(out.Messages, cur)
				}
				return out
			}
			switch ev {
			case Headers:
				cur.Head, cur.Framing = describe(&head), p.Framing()
			case Informational:
				cur.Interim = append(cur.Interim, describe(&head))
			case Data:
				if len(p.Data()) == 0 {
					t.Fatal("Data without data")
				}
				cur.Body += string(p.Data())
			case Trailers:
				cur.Trailers = describe(&trailers)
			case Complete:
				if !p.Done() {
					t.Fatal("Complete and not Done")
				}
				cur.Complete = true
				out.Messages = append(out.Messages, cur)
				cur, begun = seen{}, false
				next(&head, &trailers)
				continue
			case Tunnel:
				cur.Tunnel = true
				out.Messages = append(out.Messages, cur)
				out.Rest = input[from:]
				return out
			case NeedMore:
			}
			if ev == NeedMore {
				break
			}
		}
		if to == len(input) {
			break
		}
	}
	if begun && cur.Head != "" {
		out.Messages = append(out.Messages, cur)
	}
	out.Rest = ""
	return out
}

func runRequest(t testing.TB, opt *Options, input string, cuts ...int) transcript {
	var p RequestParser
	p.Init(opt)
	return run(t, &p, p.Next, input, cuts)
}

func runResponse(t testing.TB, opt *Options, kind RequestKind, input string, cuts ...int) transcript {
	var p ResponseParser
	p.Init(opt)
	return run(t, &p, func(h, tr *header.Block) { p.Next(h, tr, kind) }, input, cuts)
}

func TestASimpleRequest(t *testing.T) {
	got := runRequest(t, &Options{}, "GET /a?b=c HTTP/1.1\r\nHost: example.com:80\r\nUser-Agent:  x y \t\r\nX-Empty:\r\n\r\n")
	want := "GET \"/a?b=c\" \"example.com:80\" \"\"\nuser-agent=x y\nx-empty=\n"
	if len(got.Messages) != 1 || got.Messages[0].Head != want || !got.Messages[0].Complete || got.Err != "" {
		t.Fatalf("got %+v", got)
	}
	if f := got.Messages[0].Framing; f.Body != NoBody || f.Length != -1 || !f.KeepAlive {
		t.Fatalf("framing %+v", f)
	}
}
