package http1

import "github.com/sockmesh/sockmesh/pkg/proxy/header"

// RequestParser reads the requests of one connection. Init, then Next for each request.
type RequestParser struct {
	message
	opt *Options
}

// Init prepares the parser for a connection. opt is kept and must not change.
func (p *RequestParser) Init(opt *Options) { p.opt = opt }

// Next begins a request, whose head goes into head (which is Reset) and whose trailers into trailers; with nil,
// trailers are checked and dropped.
func (p *RequestParser) Next(head, trailers *header.Block) {}

// Parse looks at b and returns how many bytes of it are done with, and what was seen. Call it until NeedMore,
// Complete, Tunnel or an error (always a *ParseError; the connection cannot be used any further).
func (p *RequestParser) Parse(b []byte) (n int, ev Event, err error) { return 0, NeedMore, nil }

// EOF says what the end of the input means: nil between requests, ErrUnexpectedEOF within one.
func (p *RequestParser) EOF() error { return nil }

// ResponseParser reads the responses of one connection to a server.
type ResponseParser struct {
	message
	opt *Options
}

// Init prepares the parser for a connection. opt is kept and must not change.
func (p *ResponseParser) Init(opt *Options) { p.opt = opt }

// Next begins the response to a request: isHead and isConnect say whether its method was HEAD or CONNECT.
func (p *ResponseParser) Next(head, trailers *header.Block, isHead, isConnect bool) {}

// Parse is as RequestParser.Parse.
func (p *ResponseParser) Parse(b []byte) (n int, ev Event, err error) { return 0, NeedMore, nil }

// EOF says what the end of the input means: Complete if it ends the body of this response, NeedMore between
// messages, ErrUnexpectedEOF within one.
func (p *ResponseParser) EOF() (Event, error) { return NeedMore, nil }

// message is what both parsers share.
type message struct {
	framing Framing
	data    []byte
}

// Framing is valid after Headers.
func (m *message) Framing() Framing { return m.framing }

// Data is the piece of body that the last Data event is about: a slice of the input.
func (m *message) Data() []byte { return m.data }

// Idle says that no byte of the current message has come: the peer is between messages.
func (m *message) Idle() bool { return true }

// Done says that the whole message has been seen; after Headers it tells at once whether a body follows.
func (m *message) Done() bool { return false }
