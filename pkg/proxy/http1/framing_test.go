package http1

import (
	"errors"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

func TestRequestsSayHowTheConnectionGoesOn(t *testing.T) {
	for head, want := range map[string]Framing{
		"GET / HTTP/1.1\r\nHost: a":                                                          {Length: -1, KeepAlive: true},
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Close":                                     {Length: -1},
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, x,\tclose ":                    {Length: -1},
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: x\r\nConnection: close":                    {Length: -1},
		"GET / HTTP/1.0\r\nHost: a":                                                          {Length: -1, HTTP10: true},
		"GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive":                                {Length: -1, HTTP10: true, KeepAlive: true},
		"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive, close":                         {Length: -1, HTTP10: true},
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7":                                    {Body: FixedLength, Length: 7, KeepAlive: true},
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0":                                    {Length: 0, KeepAlive: true},
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775807":                  {Body: FixedLength, Length: 1<<63 - 1, KeepAlive: true},
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked":                           {Body: Chunked, Length: -1, KeepAlive: true},
		"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 7":             {Body: FixedLength, Length: 7, KeepAlive: true, Continue: true},
		"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue":                                  {Length: -1, KeepAlive: true},
		"PUT / HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 7":             {Body: FixedLength, Length: 7, HTTP10: true},
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket":             {Length: -1, KeepAlive: true, Upgrade: true},
		"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket":                                    {Length: -1, KeepAlive: true},
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade":                                   {Length: -1, KeepAlive: true},
		"GET / HTTP/1.0\r\nHost: a\r\nConnection: upgrade, keep-alive\r\nUpgrade: websocket": {Length: -1, KeepAlive: true, HTTP10: true},
		"CONNECT a:1 HTTP/1.1\r\nHost: a:1":                                                  {Length: -1, KeepAlive: true},
	} {
		got := runRequest(t, &Options{AcceptHTTP10: true}, head+"\r\n\r\n")
		if got.Err != "" || len(got.Messages) != 1 || got.Messages[0].Framing != want {
			t.Errorf("%q: %+v, want %+v", head, got, want)
		}
	}
}

func TestResponsesSayWhereTheyEnd(t *testing.T) {
	for _, c := range []struct {
		head string
		kind RequestKind
		want Framing
	}{
		{"200 OK\r\nContent-Length: 5", 0, Framing{Body: FixedLength, Length: 5, KeepAlive: true}},
		{"200 OK\r\nContent-Length: 5", ToHead, Framing{Length: 5, KeepAlive: true}},
		{"200 OK\r\nTransfer-Encoding: chunked", ToHead, Framing{Length: -1, KeepAlive: true}},
		{"200 OK\r\nTransfer-Encoding: chunked", 0, Framing{Body: Chunked, Length: -1, KeepAlive: true}},
		{"200 OK\r\nContent-Length: 0", 0, Framing{Length: 0, KeepAlive: true}},
		{"200 OK", 0, Framing{Body: UntilClose, Length: -1}},
		{"200 OK", ToHead, Framing{Length: -1, KeepAlive: true}},
		{"204 No Content", 0, Framing{Length: -1, KeepAlive: true}},
		{"304 Not Modified\r\nContent-Length: 5", 0, Framing{Length: 5, KeepAlive: true}},
		{"200 OK", ToConnect, Framing{Body: Raw, Length: -1, KeepAlive: true}},
		{"403 Forbidden\r\nContent-Length: 5", ToConnect, Framing{Body: FixedLength, Length: 5, KeepAlive: true}},
		{"101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x", ToUpgrade, Framing{Body: Raw, Length: -1, KeepAlive: true, Upgrade: true}},
		{"426 Upgrade Required\r\nConnection: upgrade\r\nUpgrade: x\r\nContent-Length: 0", 0, Framing{Length: 0, KeepAlive: true, Upgrade: true}},
		{"200 OK\r\nConnection: close\r\nContent-Length: 5", 0, Framing{Body: FixedLength, Length: 5}},
	} {
		got := runResponse(t, &Options{}, c.kind, "HTTP/1.1 "+c.head+"\r\n\r\n")
		if got.Err != "" || len(got.Messages) != 1 || got.Messages[0].Framing != c.want {
			t.Errorf("%q: %+v, want %+v", c.head, got, c.want)
		}
	}
	got := runResponse(t, &Options{}, 0, "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\n")
	if want := (Framing{Body: FixedLength, Length: 5, KeepAlive: true, HTTP10: true}); got.Messages[0].Framing != want {
		t.Errorf("HTTP/1.0: %+v", got)
	}
}

func TestInformationalResponsesComeBeforeTheFinalOne(t *testing.T) {
	in := "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
	got := checkSplits(t, []byte(in), 1, func(in string, cuts ...int) transcript { return runResponse(t, &Options{}, 0, in, cuts...) })
	m := got.Messages[0]
	if len(m.Interim) != 2 || m.Interim[1] != "103\nlink=</a>\n" || m.Head != "200\ncontent-length=2\n" || m.Body != "hi" || !m.Complete {
		t.Errorf("%+v", got)
	}
}

func TestATunnelBeginsRightAfterTheHead(t *testing.T) {
	in := "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello"
	got := runResponse(t, &Options{}, ToUpgrade, in)
	if len(got.Messages) != 1 || !got.Messages[0].Tunnel || got.Rest != "\x81\x05hello" {
		t.Errorf("%+v", got)
	}
}

func TestPipelinedRequestsComeOneByOne(t *testing.T) {
	in := "POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n" +
		"POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;x=\"y\"\r\nde\r\n0\r\nX-T: 1\r\n\r\nGET /4 HTTP/1.1\r\nHo"
	got := checkSplits(t, []byte(in), 1, func(in string, cuts ...int) transcript { return runRequest(t, &Options{}, in, cuts...) })
	var paths []string
	for _, m := range got.Messages {
		paths = append(paths, strings.Fields(m.Head)[1]+m.Body+m.Trailers)
	}
	if strings.Join(paths, " ") != "\"/1\"abc \"/2\" \"/3\"dex-t=1\n" || got.Err != "" {
		t.Errorf("%q %s", paths, got.Err)
	}
}

func TestTheEndOfInputMeansSomething(t *testing.T) {
	var p RequestParser
	var head header.Block
	p.Init(&Options{})
	feed := func(s string) {
		for b := []byte(s); ; {
			n, ev, err := p.Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if b = b[n:]; ev == NeedMore || ev == Complete {
				return
			}
		}
	}
	p.Next(&head, nil)
	if !p.Idle() || p.EOF() != nil {
		t.Error("nothing came: the client is done")
	}
	feed("\r\n")
	if !p.Idle() || p.EOF() != nil {
		t.Error("a blank line is nothing")
	}
	feed("G")
	if p.Idle() || !errors.Is(p.EOF(), ErrUnexpectedEOF) {
		t.Error("half a request is none")
	}
	p.Next(&head, nil)
	feed("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nab")
	if p.Done() || !errors.Is(p.EOF(), ErrUnexpectedEOF) {
		t.Error("half a body is none")
	}
	feed("c")
	if !p.Done() || p.EOF() != nil {
		t.Error("the request is complete")
	}

	var r ResponseParser
	r.Init(&Options{})
	for _, c := range []struct {
		in  string
		ev  Event
		err error
	}{
		{"", NeedMore, nil},
		{"HT", NeedMore, ErrUnexpectedEOF},
		{"HTTP/1.1 100 Continue\r\n\r\n", NeedMore, ErrUnexpectedEOF},
		{"HTTP/1.1 200 OK\r\n\r\nabc", Complete, nil},
		{"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", NeedMore, ErrUnexpectedEOF},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", NeedMore, ErrUnexpectedEOF},
		{"HTTP/1.1 204 No Content\r\n\r\n", Complete, nil},
	} {
		r.Next(&head, nil, 0)
		for b := []byte(c.in); ; {
			n, ev, err := r.Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if b = b[n:]; ev == NeedMore || ev == Complete {
				break
			}
		}
		if ev, err := r.EOF(); ev != c.ev || !errors.Is(err, c.err) {
			t.Errorf("%q: %v, %v", c.in, ev, err)
		}
	}
}

func TestHeadsAreWrittenAsFramed(t *testing.T) {
	var req, resp header.Block
	req.SetMethod("POST")
	req.SetPath("/p")
	req.SetAuthority("a:80")
	req.AddName("Accept", "*/*")
	for _, junk := range []string{"Connection", "Content-Length", "Transfer-Encoding", "Keep-Alive", "Upgrade", "Proxy-Connection"} {
		req.AddName(junk, "junk")
	}
	resp.SetStatus(200)
	resp.AddName("X-Own-2nd", "v")
	resp.AddName("Content-Length", "999")
	const line, host, accept = "POST /p HTTP/1.1\r\n", "host: a:80\r\n", "accept: */*\r\n"
	for name, c := range map[string]struct{ got, want string }{
		"no body":       {string(AppendRequestHead(nil, &req, Framing{Length: -1, KeepAlive: true})), line + host + accept + "\r\n"},
		"length 0":      {string(AppendRequestHead(nil, &req, Framing{KeepAlive: true})), line + host + "content-length: 0\r\n" + accept + "\r\n"},
		"chunked":       {string(AppendRequestHead(nil, &req, Framing{Body: Chunked, Length: -1})), line + host + "transfer-encoding: chunked\r\nconnection: close\r\n" + accept + "\r\n"},
		"upgrade":       {string(AppendRequestHead(nil, &req, Framing{Length: -1, KeepAlive: true, Upgrade: true})), line + host + "connection: upgrade\r\n" + accept + "upgrade: junk\r\n\r\n"},
		"a response":    {string(AppendResponseHead(nil, &resp, Framing{Body: FixedLength, Length: 5, KeepAlive: true})), "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-own-2nd: v\r\n\r\n"},
		"until close":   {string(AppendResponseHead(nil, &resp, Framing{Body: UntilClose, Length: -1, KeepAlive: true})), "HTTP/1.1 200 OK\r\nconnection: close\r\nx-own-2nd: v\r\n\r\n"},
		"1.0 keeps":     {string(AppendResponseHead(nil, &resp, Framing{Body: FixedLength, Length: 5, KeepAlive: true, HTTP10: true})), "HTTP/1.0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive\r\nx-own-2nd: v\r\n\r\n"},
		"1.0 no chunks": {string(AppendResponseHead(nil, &resp, Framing{Body: Chunked, Length: -1, KeepAlive: true, HTTP10: true})), "HTTP/1.0 200 OK\r\nconnection: close\r\nx-own-2nd: v\r\n\r\n"},
		"proper case":   {string(AppendResponseHead(nil, &resp, Framing{Body: FixedLength, Length: 5, ProperCase: true})), "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\nX-Own-2nd: v\r\n\r\n"},
	} {
		if c.got != c.want {
			t.Errorf("%s:\ngot  %q\nwant %q", name, c.got, c.want)
		}
	}
	resp.SetStatus(204)
	if got := string(AppendResponseHead(nil, &resp, Framing{KeepAlive: true})); got != "HTTP/1.1 204 No Content\r\nx-own-2nd: v\r\n\r\n" {
		t.Errorf("204: %q", got)
	}
	if got := string(AppendResponseHead(nil, &resp, Framing{})); got != "HTTP/1.1 204 No Content\r\nconnection: close\r\nx-own-2nd: v\r\n\r\n" {
		t.Errorf("204 and close: %q", got)
	}
	req.SetMethod("CONNECT")
	if got := string(AppendRequestHead(nil, &req, Framing{Length: -1, KeepAlive: true})); !strings.HasPrefix(got, "CONNECT a:80 HTTP/1.1\r\n") {
		t.Errorf("CONNECT: %q", got)
	}
	body := append(append(AppendChunkHeader(nil, 26), "abcdefghijklmnopqrstuvwxyz"...), ChunkEnd...)
	var trailers header.Block
	trailers.AddName("Grpc-Status", "0")
	trailers.AddName("Content-Length", "9")
	if got := string(AppendLastChunk(body, &trailers)); got != "1a\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\ngrpc-status: 0\r\n\r\n" {
		t.Errorf("chunks: %q", got)
	}
}
