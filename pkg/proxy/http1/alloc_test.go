package http1

import (
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

const smallRequest = "GET /productpage?u=1 HTTP/1.1\r\nHost: reviews.default.svc.cluster.local:9080\r\n" +
	"User-Agent: wrk/4.2.0\r\nAccept: */*\r\nX-Request-Id: 7b1b1a5e-6e0b-4d0a-9d3e-0f1f2b3c4d5e\r\n\r\n"

const browserRequest = "GET /static/app.js?v=3 HTTP/1.1\r\nHost: www.example.com\r\n" +
	"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n" +
	"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n" +
	"Accept-Language: en-GB,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br\r\nReferer: https://www.example.com/index.html\r\n" +
	"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; _ga=GA1.2.1234567890.1234567890\r\n" +
	"Connection: keep-alive\r\nUpgrade-Insecure-Requests: 1\r\nSec-Fetch-Dest: script\r\nCache-Control: max-age=0\r\n\r\n"

const smallResponse = "HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Sun, 22 Nov 2026 18:00:00 GMT\r\n" +
	"Content-Type: text/plain\r\nContent-Length: 13\r\nConnection: keep-alive\r\n\r\nHello, world!"

const chunkedResponse = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x=y\r\nabcd\r\n10\r\n0123456789abcdef\r\n0\r\nGrpc-Status: 0\r\n\r\n"

// relay does what the proxy does with a head: parse it, change it a little, write it.
type relay struct {
	request        RequestParser
	response       ResponseParser
	head, trailers header.Block
	out            []byte
}

func newRelay() *relay {
	r := &relay{}
	r.request.Init(&Options{})
	r.response.Init(&Options{})
	return r
}

func (r *relay) relayRequest(b []byte) {
	p := &r.request
	p.Next(&r.head, &r.trailers)
	for {
		n, ev, err := p.Parse(b)
		if err != nil {
			panic(err)
		}
		b = b[n:]
		switch ev {
		case Headers:
			r.head.StripHopByHop(false)
			r.head.Set(header.XForwardedProto, "http")
			r.head.Append(header.XForwardedFor, "10.0.0.1")
			r.out = AppendRequestHead(r.out[:0], &r.head, p.Framing())
		case Complete:
			return
		}
	}
}

func (r *relay) relayResponse(b []byte) {
	p := &r.response
	p.Next(&r.head, &r.trailers, 0)
	for {
		n, ev, err := p.Parse(b)
		if err != nil {
			panic(err)
		}
		b = b[n:]
		switch ev {
		case Headers:
			r.head.StripHopByHop(false)
			r.head.Set(header.Server, "envoy")
			r.out = AppendResponseHead(r.out[:0], &r.head, p.Framing())
		case Data:
			if p.Framing().Body == Chunked {
				r.out = AppendChunkHeader(r.out, len(p.Data()))
			}
			r.out = append(r.out, p.Data()...)
		case Complete:
			if p.Framing().Body == Chunked {
				r.out = AppendLastChunk(r.out, &r.trailers)
			}
			return
		}
	}
}

func TestRelayingAllocatesNothing(t *testing.T) {
	r := newRelay()
	for _, c := range []struct {
		name  string
		relay func([]byte)
		input []byte
	}{
		{"small request", r.relayRequest, []byte(smallRequest)},
		{"browser request", r.relayRequest, []byte(browserRequest)},
		{"small response", r.relayResponse, []byte(smallResponse)},
		{"chunked response", r.relayResponse, []byte(chunkedResponse)},
	} {
		c.relay(c.input) // grow the buffers once
		if n := testing.AllocsPerRun(100, func() { c.relay(c.input) }); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}

func TestRefusingAllocatesNothing(t *testing.T) {
	var p RequestParser
	var head header.Block
	p.Init(&Options{})
	bad := []byte("GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n")
	if n := testing.AllocsPerRun(100, func() {
		p.Next(&head, nil)
		if _, _, err := p.Parse(bad); err == nil {
			t.Fatal("accepted")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkParseRequest(b *testing.B) {
	for name, msg := range map[string]string{"small": smallRequest, "browser": browserRequest} {
		b.Run(name, func(b *testing.B) {
			var p RequestParser
			var head header.Block
			p.Init(&Options{})
			in := []byte(msg)
			b.ReportAllocs()
			b.SetBytes(int64(len(in)))
			for b.Loop() {
				p.Next(&head, nil)
				if _, ev, err := p.Parse(in); ev != Headers {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRelay(b *testing.B) {
	r := newRelay()
	b.Run("request", func(b *testing.B) {
		in := []byte(smallRequest)
		b.ReportAllocs()
		for b.Loop() {
			r.relayRequest(in)
		}
	})
	b.Run("response", func(b *testing.B) {
		in := []byte(smallResponse)
		b.ReportAllocs()
		for b.Loop() {
			r.relayResponse(in)
		}
	})
}
