package http1

import (
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// A peer that sends byte by byte must not make us look at everything again for each: that would be a cheap way to
// keep a core busy.
func TestSlowInputIsLookedAtOnce(t *testing.T) {
	long := strings.Repeat("x", 5000)
	for name, input := range map[string]string{
		"a target": "GET /" + long,
		"a name":   "GET / HTTP/1.1\r\nHost: a\r\n" + long,
		"a value":  "GET / HTTP/1.1\r\nHost: a\r\nX: " + long,
		"blanks":   "GET / HTTP/1.1\r\nHost: a\r\nX:" + strings.Repeat(" ", 5000),
	} {
		var p RequestParser
		var head header.Block
		p.Init(&Options{})
		p.Next(&head, nil)
		from := 0
		const version = len(" HTTP/1.1\r\n") // the end of a request line is read as a whole
		for to := range input {
			n, ev, err := p.Parse([]byte(input[from : to+1]))
			if err != nil || ev != NeedMore {
				t.Fatalf("%s: %v, %v", name, ev, err)
			}
			from += n
			if again := to + 1 - from - p.line.scan; again > version {
				t.Fatalf("%s: after %d bytes, %d of them will be looked at again", name, to+1, again)
			}
		}
	}
}
