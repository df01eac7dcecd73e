package http1

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// seeds are messages of our own writing, one idea each; testdata/seeds has one file for each, "\r\n" written out.
func seeds(t testing.TB, prefix string) [][]byte {
	files, err := filepath.Glob("testdata/seeds/" + prefix + "*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no seeds for %s: %v", prefix, err)
	}
	var out [][]byte
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, []byte(unescape(strings.TrimSuffix(string(b), "\n"))))
	}
	return out
}

// options makes parser options out of a few random bits.
func options(bits uint64) *Options {
	o := &Options{
		AcceptHTTP10: bits&1 != 0, OptionalHost: bits&2 != 0, NoAbsoluteForm: bits&4 != 0,
		Underscores: mesh.UnderscoresAction(bits >> 3 % 3),
	}
	if bits&8 != 0 {
		o.DefaultHost = "default.example"
	}
	if bits&16 != 0 {
		o.Limits = Limits{HeadBytes: 64 + int(bits>>8%64), Fields: 1 + int(bits>>16%4), ChunkLine: 8, ChunkExtensions: 12}
	}
	return o
}

// cuts draws where an input of n bytes is split.
func cuts(n int, seed uint64) []int {
	r := rand.New(rand.NewPCG(seed, 1))
	var out []int
	for range r.IntN(6) {
		out = append(out, r.IntN(n+1))
	}
	slices.Sort(out)
	return out
}

func everyByte(n int) []int {
	var out []int
	for i := range n {
		out = append(out, i)
	}
	return out
}

// checkSplits is the property that everything else here rests on: how the input is cut changes nothing.
func checkSplits(t *testing.T, input []byte, seed uint64, parse func(input string, cuts ...int) transcript) transcript {
	whole := parse(string(input))
	splits := [][]int{cuts(len(input), seed), cuts(len(input), seed+1)}
	if len(input) <= 512 {
		splits = append(splits, everyByte(len(input)))
	}
	for _, c := range splits {
		if got := parse(string(input), c...); !reflect.DeepEqual(got, whole) {
			t.Fatalf("input %q\nwhole: %+v\ncut at %v: %+v", input, whole, c, got)
		}
	}
	return whole
}

// recorded is one complete message, kept to be encoded again.
type recorded struct {
	head, trailers header.Block
	framing        Framing
	body           []byte
	complete       bool
}

func (m *recorded) read(p parser, b []byte) error {
	for {
		n, ev, err := p.Parse(b)
		if err != nil {
			return err
		}
		b = b[n:]
		switch ev {
		case Headers:
			m.framing = p.Framing()
		case Data:
			m.body = append(m.body, p.Data()...)
		case Complete, Tunnel:
			m.complete = true
			return nil
		case NeedMore:
			return nil
		}
	}
}

func (m *recorded) appendBody(dst []byte) []byte {
	if m.framing.Body == Chunked {
		for i := 0; i < len(m.body); i += 7 {
			piece := m.body[i:min(i+7, len(m.body))]
			dst = append(append(AppendChunkHeader(dst, len(piece)), piece...), ChunkEnd...)
		}
		return AppendLastChunk(dst, &m.trailers)
	}
	return append(dst, m.body...)
}

// sameMessage compares what must survive being written and read again.
func sameMessage(t *testing.T, a, b *recorded, wire []byte) {
	t.Helper()
	if !b.complete || !bytes.Equal(a.body, b.body) || describe(&a.trailers) != describe(&b.trailers) {
		t.Fatalf("body or trailers changed\nbefore %q %q\nafter  %q %q\nwire %q", a.body, describe(&a.trailers), b.body,
			describe(&b.trailers), wire)
	}
	if a.framing.Body != b.framing.Body || a.framing.KeepAlive != b.framing.KeepAlive || a.framing.Upgrade != b.framing.Upgrade {
		t.Fatalf("framing changed\nbefore %+v\nafter  %+v\nwire %q", a.framing, b.framing, wire)
	}
	if !bytes.Equal(a.head.Method(), b.head.Method()) || !bytes.Equal(a.head.Path(), b.head.Path()) ||
		!bytes.Equal(a.head.Authority(), b.head.Authority()) || a.head.Status() != b.head.Status() {
		t.Fatalf("start line changed\nbefore %s\nafter  %s\nwire %q", describe(&a.head), describe(&b.head), wire)
	}
	if x, y := passedOn(a), passedOn(b); x != y {
		t.Fatalf("fields changed\nbefore %s\nafter  %s\nwire %q", x, y, wire)
	}
}

// passedOn are the fields that an encoder copies.
func passedOn(m *recorded) string {
	var s strings.Builder
	for i := range m.head.Len() {
		if id := m.head.ID(i); !unwrittenInUpgrade.Has(id) && (id != header.Upgrade || m.framing.Upgrade) {
			s.Write(m.head.Name(i))
			s.WriteByte('=')
			s.Write(m.head.Value(i))
			s.WriteByte('\n')
		}
	}
	return s.String()
}

// maxMemory is what a head may cost for each byte that came.
func checkMemory(t *testing.T, b *header.Block, input []byte) {
	if b.Size() > 4096+32*len(input) {
		t.Fatalf("%d bytes held for an input of %d", b.Size(), len(input))
	}
}

func FuzzRequest(f *testing.F) {
	for i, s := range seeds(f, "request") {
		f.Add(s, uint64(i))
		f.Add(s, uint64(3))
	}
	f.Fuzz(func(t *testing.T, input []byte, seed uint64) {
		opt := options(seed)
		checkSplits(t, input, seed, func(in string, cuts ...int) transcript { return runRequest(t, opt, in, cuts...) })

		var a, b, c recorded
		var p RequestParser
		p.Init(opt)
		p.Next(&a.head, &a.trailers)
		err := a.read(&p, input)
		checkMemory(t, &a.head, input)
		if err != nil || !a.complete {
			return
		}
		wire := a.appendBody(AppendRequestHead(nil, &a.head, a.framing))
		// What we write must be acceptable to the strictest reader of our kind, and mean the same.
		p.Init(&Options{OptionalHost: opt.OptionalHost})
		p.Next(&b.head, &b.trailers)
		if err := b.read(&p, wire); err != nil {
			t.Fatalf("%v in what we wrote: %q", err, wire)
		}
		if a.framing.HTTP10 {
			b.framing.Continue, b.framing.Upgrade = a.framing.Continue, a.framing.Upgrade
		}
		sameMessage(t, &a, &b, wire)
		p.Next(&c.head, &c.trailers)
		again := b.appendBody(AppendRequestHead(nil, &b.head, b.framing))
		if !bytes.Equal(wire, again) {
			t.Fatalf("written again it differs\n%q\n%q", wire, again)
		}
	})
}

func FuzzResponse(f *testing.F) {
	for i, s := range seeds(f, "response") {
		f.Add(s, uint64(i), uint8(0))
		f.Add(s, uint64(3), uint8(i))
	}
	f.Fuzz(func(t *testing.T, input []byte, seed uint64, kind uint8) {
		opt, k := options(seed), RequestKind(kind&7)
		checkSplits(t, input, seed, func(in string, cuts ...int) transcript { return runResponse(t, opt, k, in, cuts...) })

		var a, b recorded
		var p ResponseParser
		p.Init(opt)
		p.Next(&a.head, &a.trailers, k)
		err := a.read(&p, input)
		checkMemory(t, &a.head, input)
		if err != nil {
			return
		}
		if ev, err := p.EOF(); ev == Complete && err == nil {
			a.complete = true
		}
		if !a.complete {
			return
		}
		if s := a.head.Status(); s < 200 || a.framing.Body == Raw {
			a.framing.KeepAlive = true
		}
		f := a.framing
		f.HTTP10 = false
		wire := a.appendBody(AppendResponseHead(nil, &a.head, f))
		p.Init(&Options{})
		p.Next(&b.head, &b.trailers, k)
		if err := b.read(&p, wire); err != nil {
			t.Fatalf("%v in what we wrote: %q", err, wire)
		}
		if ev, err := p.EOF(); ev == Complete && err == nil {
			b.complete = true
		}
		if a.framing.HTTP10 {
			b.framing.Upgrade = a.framing.Upgrade
		}
		sameMessage(t, &a, &b, wire)
	})
}
