package header

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// block makes a block of "name: value" lines.
func block(lines ...string) *Block {
	b := &Block{}
	for _, l := range lines {
		name, value, _ := strings.Cut(l, ": ")
		b.AddName(name, value)
	}
	return b
}

func dump(b *Block) string {
	var lines []string
	for i := range b.Len() {
		lines = append(lines, fmt.Sprintf("%s: %s", b.Name(i), b.Value(i)))
	}
	return strings.Join(lines, "\n")
}

func expect(t *testing.T, b *Block, lines ...string) {
	t.Helper()
	if got, want := dump(b), strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for id := None + 1; id < numIDs; id++ {
		if has := slices.ContainsFunc(b.fields, func(f field) bool { return f.id == id }); has != b.Has(id) {
			t.Errorf("Has(%s) is %v, the fields say %v", id, b.Has(id), has)
		}
	}
}

func TestEveryKnownNameIsFoundAndNoOther(t *testing.T) {
	for id := None + 1; id < numIDs; id++ {
		if names[id] == "" || names[id] != strings.ToLower(names[id]) {
			t.Errorf("ID %d has the name %q", id, names[id])
		}
		if got := Lookup(names[id]); got != id {
			t.Errorf("%s is found as %d", names[id], got)
		}
	}
	for _, name := range []string{"", "x", "host", ":path", "connectio", "connectionn", "Connection", "x-request-ic"} {
		if id := Lookup(name); id != None {
			t.Errorf("%q is found as %s", name, id)
		}
	}
}

func TestEveryByteAtEveryPlaceOfANameIsBroughtToLowerCase(t *testing.T) {
	for n := 1; n <= 25; n++ {
		for at := range n {
			for c := range 256 {
				raw := []byte(strings.Repeat("Q", n))
				raw[at] = byte(c)
				want := []byte(strings.Repeat("q", n))
				want[at] = lowerTable[c]
				if lowerInPlace(raw); string(raw) != string(want) {
					t.Fatalf("byte %#x at %d of %d: %q, want %q", c, at, n, raw, want)
				}
			}
		}
	}
}

func TestNamesAreBroughtToLowerCase(t *testing.T) {
	for _, name := range []string{"A", "Content-Length", "X-ENVOY-UPSTREAM-SERVICE-TIME", "x_[`@{", "ABCDEFGHZ@[`{z~"} {
		raw := []byte(name)
		lowerInPlace(raw)
		if string(raw) != strings.ToLower(name) {
			t.Errorf("%q became %q", name, raw)
		}
	}
}

func TestFieldsAreSetInPlaceAddedAndRemoved(t *testing.T) {
	b := block("Accept: a", "X-Own: 1", "Cookie: c", "x-own: 2", "accept: b")
	expect(t, b, "accept: a", "x-own: 1", "cookie: c", "x-own: 2", "accept: b")
	b.Set(Accept, "z")
	b.SetName("x-own", "3")
	expect(t, b, "accept: z", "x-own: 3", "cookie: c")
	b.SetName("x-new", "n")
	b.Append(XForwardedFor, "10.0.0.1")
	b.Append(XForwardedFor, "10.0.0.2")
	expect(t, b, "accept: z", "x-own: 3", "cookie: c", "x-new: n", "x-forwarded-for: 10.0.0.1, 10.0.0.2")
	b.Remove(Cookie)
	b.RemoveName("x-own")
	b.RemoveName("accept")
	b.RemoveName("absent")
	expect(t, b, "x-new: n", "x-forwarded-for: 10.0.0.1, 10.0.0.2")
	b.Add(XForwardedFor, "x")
	b.RemoveAt(1)
	expect(t, b, "x-new: n", "x-forwarded-for: x")
}

func TestRepeatedFieldsAreJoinedOnlyWhereTheyAre(t *testing.T) {
	b := block("x-a: 1", "vary: p", "x-a: 2", "vary: q", "x-a: 3", "date: d")
	for name, want := range map[string]string{"x-a": "1,2,3", "vary": "p,q", "date": "d"} {
		if got, ok := b.Joined(name); !ok || got != want {
			t.Errorf("%s: %q, %v", name, got, ok)
		}
	}
	for _, name := range []string{"x-b", "cookie", ":path"} {
		if got, ok := b.Joined(name); ok {
			t.Errorf("%s is there: %q", name, got)
		}
	}
}

func TestRepeatedFieldsAreWalkedOneByOne(t *testing.T) {
	b := block("x-a: 1", "te: gzip", "x-b: 0", "x-a: 2", "te: trailers")
	b.SetMethod("GET")
	for name, want := range map[string]string{"x-a": "1|2|", "te": "gzip|trailers|", ":method": "GET|", "x-none": "", "via": ""} {
		got := ""
		for v, i := b.NextValue(name, 0); i != 0; v, i = b.NextValue(name, i) {
			got += v + "|"
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestPseudoFieldsHaveNames(t *testing.T) {
	b := &Block{}
	if _, ok := b.GetName(":authority"); ok {
		t.Error("an authority that nobody set")
	}
	b.AddName("Host", "example.com")
	b.AddName(":path", "/a b\r\nx")
	b.SetMethod("GET")
	b.SetScheme("http")
	b.SetStatus(204)
	for name, want := range map[string]string{
		"host": "example.com", ":authority": "example.com", ":path": "/a%20b%0D%0Ax", ":method": "GET", ":scheme": "http", ":status": "204",
	} {
		if got, ok := b.GetName(name); !ok || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, ok)
		}
		if got, ok := b.Joined(name); !ok || got != want {
			t.Errorf("joined %s: %q, %v", name, got, ok)
		}
	}
	if b.Len() != 0 {
		t.Errorf("pseudo fields are among the fields: %s", dump(b))
	}
}

func TestAValueCannotBecomeALine(t *testing.T) {
	b := &Block{}
	b.AddName("x-a", "1\r\nx-evil: 1")
	b.Set(XRequestID, "a\nb")
	b.Append(XRequestID, "c\x00d")
	expect(t, b, "x-a: 1  x-evil: 1", "x-request-id: a b, c d")
}

func TestHopByHopFieldsAreStripped(t *testing.T) {
	for _, c := range []struct {
		name        string
		in, out     []string
		keepUpgrade bool
		refused     bool
	}{
		{
			name: "the usual ones",
			in: []string{"connection: keep-alive", "keep-alive: timeout=5", "proxy-connection: x", "transfer-encoding: chunked",
				"te: gzip", "upgrade: h2c", "http2-settings: x", "accept: a"},
			out: []string{"accept: a"},
		},
		{name: "trailers are still welcome", in: []string{"te: trailers, gzip"}, out: []string{"te: trailers"}},
		{
			name: "what Connection nominates", in: []string{"x-a: 1", "connection: close, X-A, accept", "x-b: 2", "accept: a"},
			out: []string{"x-b: 2"},
		},
		{
			name: "an upgrade passes where it may", in: []string{"connection: Upgrade", "upgrade: websocket"},
			out: []string{"upgrade: websocket"}, keepUpgrade: true,
		},
		{name: "identity cannot be stripped", in: []string{"connection: X-Forwarded-For", "x-forwarded-for: 1"}, refused: true},
		{name: "nor the host", in: []string{"connection: close, Host"}, refused: true},
		{name: "nor a pseudo field", in: []string{"connection: :path"}, refused: true},
		{
			name:    "nobody needs five of them",
			in:      []string{"connection: a", "connection: b", "connection: c", "connection: d", "connection: e"},
			refused: true,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := block(c.in...)
			before := dump(b)
			ok := b.StripHopByHop(c.keepUpgrade)
			if ok == c.refused {
				t.Fatalf("refused: %v", !ok)
			}
			if c.refused {
				if dump(b) != before {
					t.Errorf("refused, but changed: %s", dump(b))
				}
				return
			}
			expect(t, b, c.out...)
		})
	}
}

func TestACopyIsIndependent(t *testing.T) {
	a := block("x: 1", "accept: a")
	a.SetPath("/")
	var b Block
	b.CopyFrom(a)
	a.Reset()
	a.AddName("y", "overwritten")
	expect(t, &b, "x: 1", "accept: a")
	if string(b.Path()) != "/" {
		t.Errorf("path %q", b.Path())
	}
}

func TestTrimGivesBackABigHead(t *testing.T) {
	b := block("x: " + strings.Repeat("y", 100<<10))
	b.Trim()
	if b.Size() > 16<<10 || b.Len() != 0 {
		t.Errorf("%d bytes, %d fields", b.Size(), b.Len())
	}
}

func TestEditingAllocatesNothing(t *testing.T) {
	var b Block
	edit := func() {
		b.Reset()
		b.SetMethod("GET")
		b.SetPath("/")
		b.AddName("X-Own", "1")
		b.Add(Accept, "*/*")
		b.Set(XRequestID, "id")
		b.Set(XRequestID, "id2")
		b.Append(XForwardedFor, "a")
		b.Append(XForwardedFor, "b")
		b.AddName("x-own", "2")
		b.Joined("x-own")
		b.GetName("x-own")
		b.RemoveName("x-own")
		b.Remove(Accept)
		b.StripHopByHop(false)
	}
	edit()
	if n := testing.AllocsPerRun(100, edit); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
