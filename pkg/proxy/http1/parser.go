package http1

import "github.com/sockmesh/sockmesh/pkg/proxy/header"

// state is where in a message a parser is.
type state uint8

const (
	atStart  state = iota // blank lines before the start line, or within the start line
	atFields              // field lines of the head
	atHeadEnd
	atFixed
	atChunk // everything of a chunked body: see chunked.go
	atTrailers
	atClose // body until the connection closes
	atTunnel
	atDone
	failed
)

// message is what both parsers share: where they are, and what they found.
type message struct {
	opt      *Options
	limits   Limits
	head     *header.Block
	trailers *header.Block
	spare    *header.Block // for trailers that nobody asked for

	state   state
	started bool // a byte of the start line has come
	line    lineState
	chunk   chunkState
	remain  int64 // of a body of fixed length
	framing Framing
	data    []byte
	err     *ParseError
}

func (m *message) init(opt *Options) {
	m.opt = opt
	m.limits = opt.Limits.withDefaults()
}

func (m *message) next(head, trailers *header.Block) {
	head.Reset()
	if trailers != nil {
		trailers.Reset()
	}
	m.head, m.trailers = head, trailers
	m.state, m.started, m.data, m.err = atStart, false, nil, nil
	m.line = lineState{}
	m.framing = Framing{Length: -1}
}

// Framing is valid after Headers.
func (m *message) Framing() Framing { return m.framing }

// Data is the piece of body that the last Data event is about: a slice of the input.
func (m *message) Data() []byte { return m.data }

// Left is how many bytes of a body of known length have not been seen; 0 where there is no such body.
func (m *message) Left() int64 {
	if m.state != atFixed {
		return 0
	}
	return m.remain
}

// Skip says that the next n bytes of such a body, less than are left, won't be seen: they have come to their receiver by
// another way.
func (m *message) Skip(n int64) { m.remain -= n }

// Idle says that nothing but blank lines has come of the current message: the peer is between messages.
func (m *message) Idle() bool { return m.state == atStart && !m.started }

// Done says that the whole message has been seen, before Complete is even asked for; after Headers it tells
// at once whether a body follows.
func (m *message) Done() bool { return m.state == atDone }

func (m *message) fail(n int, err *ParseError) (int, Event, error) {
	m.state, m.err = failed, err
	return n, NeedMore, err
}

// body goes on after the head: everything that is alike in requests and responses.
func (m *message) body(b []byte) (n int, ev Event, err error) {
	switch m.state {
	case atFixed:
		if len(b) == 0 {
			return 0, NeedMore, nil
		}
		n = len(b)
		if int64(n) >= m.remain {
			n = int(m.remain)
			m.state = atDone
		}
		m.remain -= int64(n)
		m.data = b[:n]
		return n, Data, nil
	case atChunk:
		return m.chunked(b)
	case atTrailers:
		return m.readTrailers(b)
	case atClose:
		if len(b) == 0 {
			return 0, NeedMore, nil
		}
		m.data = b
		return len(b), Data, nil
	case atTunnel:
		return 0, Tunnel, nil
	case atDone:
		return 0, Complete, nil
	}
	return 0, NeedMore, m.err // failed before, and still
}

// begin puts the parser into the state that reads the body which framing announces.
func (m *message) begin() {
	switch m.framing.Body {
	case FixedLength:
		m.state, m.remain = atFixed, m.framing.Length
	case Chunked:
		m.state = atChunk
		m.chunk = chunkState{}
	case UntilClose:
		m.state = atClose
	case Raw:
		m.state = atTunnel
	default:
		m.state = atDone
	}
}

// RequestParser reads the requests of one connection. Init, then Next for each request.
type RequestParser struct {
	message
	isConnect, isAbsolute, isHTTPS bool
	path                           pathFix
}

// Init prepares the parser for a connection. opt is kept and must not change.
func (p *RequestParser) Init(opt *Options) { p.init(opt) }

// Next begins a request, whose head goes into head (which is Reset) and whose trailers into trailers; with nil,
// trailers are checked and dropped.
func (p *RequestParser) Next(head, trailers *header.Block) {
	p.next(head, trailers)
	p.isConnect, p.isAbsolute, p.isHTTPS, p.path = false, false, false, pathAsIs
}

// Parse looks at b and returns how many bytes of it are done with, and what was seen. Call it until NeedMore,
// Complete or an error (always a *ParseError; the connection cannot be used any further).
//
// A request that asks for an upgrade, and a CONNECT, completes like any other: whether what follows is a tunnel
// is for the response to say, and until then nothing more may be parsed.
func (p *RequestParser) Parse(b []byte) (n int, ev Event, err error) {
	if p.state > atFields {
		return p.body(b)
	}
	in := b
	if room := p.limits.HeadBytes - p.line.used; len(in) > room {
		in = in[:room]
	}
	first := p.head.Len()
	var bad *ParseError
	if p.state == atStart {
		n, bad = p.requestLine(in)
	}
	if bad == nil && p.state == atFields {
		n, bad = p.line.fields(p.head, in, n, p.limits.Fields, true)
		if p.line.end {
			p.state = atHeadEnd
		}
	}
	p.head.Import(b[:n], first)
	p.line.used += n
	if bad != nil {
		return p.fail(n, bad)
	}
	if p.state < atHeadEnd {
		if len(in) < len(b) {
			return p.fail(n, ErrHeadTooLarge)
		}
		return n, NeedMore, nil
	}
	if bad := p.finishHead(); bad != nil {
		return p.fail(n, bad)
	}
	p.begin()
	return n, Headers, nil
}

// EOF says what the end of the input means: nil between requests, ErrUnexpectedEOF within one.
func (p *RequestParser) EOF() error {
	switch {
	case p.state == failed:
		return p.err
	case p.state == atDone || p.Idle():
		return nil
	}
	return ErrUnexpectedEOF
}

// RequestKind is what a response parser must know of the request.
type RequestKind uint8

// Kinds of request whose responses are framed in another way. Zero for all the others.
const (
	ToHead    RequestKind = 1 << iota // no body, whatever the head says
	ToConnect                         // 2xx begins a tunnel
	ToUpgrade                         // 101 is allowed and begins a tunnel
)

// maxInterim bounds the informational responses before a final one.
const maxInterim = 32

// ResponseParser reads the responses of one connection to a server.
type ResponseParser struct {
	message
	kind    RequestKind
	interim uint8
}

// Init prepares the parser for a connection. opt is kept and must not change; of it only Limits and Underscores
// matter here.
func (p *ResponseParser) Init(opt *Options) { p.init(opt) }

// Next begins the response to a request of that kind.
func (p *ResponseParser) Next(head, trailers *header.Block, kind RequestKind) {
	p.next(head, trailers)
	p.kind, p.interim = kind, 0
}

// Parse is as RequestParser.Parse. After Informational, which leaves that head in the block until the next call, the
// final response follows.
func (p *ResponseParser) Parse(b []byte) (n int, ev Event, err error) {
	if p.state > atFields {
		return p.body(b)
	}
	if p.line.end { // an informational head was handed out
		p.head.Reset()
		p.line = lineState{}
		p.framing = Framing{Length: -1}
	}
	in := b
	if room := p.limits.HeadBytes - p.line.used; len(in) > room {
		in = in[:room]
	}
	first := p.head.Len()
	var bad *ParseError
	if p.state == atStart {
		n, bad = p.statusLine(in)
	}
	if bad == nil && p.state == atFields {
		n, bad = p.line.fields(p.head, in, n, p.limits.Fields, false)
		if p.line.end {
			p.state = atHeadEnd
		}
	}
	p.head.Import(b[:n], first)
	p.line.used += n
	if bad != nil {
		return p.fail(n, bad)
	}
	if p.state < atHeadEnd {
		if len(in) < len(b) {
			return p.fail(n, ErrHeadTooLarge)
		}
		return n, NeedMore, nil
	}
	if bad := p.finishHead(); bad != nil {
		return p.fail(n, bad)
	}
	if s := p.head.Status(); s < 200 && s != 101 {
		if p.interim++; p.interim > maxInterim {
			return p.fail(n, ErrInterim)
		}
		p.state = atStart
		return n, Informational, nil
	}
	p.begin()
	return n, Headers, nil
}

// EOF says what the end of the input means: Complete if it ends the body of this response, NeedMore between
// messages, ErrUnexpectedEOF within one.
func (p *ResponseParser) EOF() (Event, error) {
	switch {
	case p.state == failed:
		return NeedMore, p.err
	case p.state == atClose:
		p.state = atDone
		return Complete, nil
	case p.state == atDone:
		return Complete, nil
	case p.state == atTunnel:
		return Tunnel, nil
	case p.Idle() && p.interim == 0:
		return NeedMore, nil
	}
	return NeedMore, ErrUnexpectedEOF
}
