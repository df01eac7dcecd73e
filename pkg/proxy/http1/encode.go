package http1

import (
	"net/http"
	"strconv"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// Continue100 is the interim response that a 100-continue client waits for.
const Continue100 = "HTTP/1.1 100 Continue\r\n\r\n"

// ChunkEnd ends a chunk's data.
const ChunkEnd = "\r\n"

// AppendRequestHead appends the head of a request: request line, Host, framing fields from f, then the block's
// fields in order, without those that frame a message or concern one connection only. Of f it uses Body, Length,
// KeepAlive, Upgrade and ProperCase; with NoBody and a Length of 0 it says "content-length: 0", with -1 nothing.
func AppendRequestHead(dst []byte, b *header.Block, f Framing) []byte {
	dst = append(dst, b.Method()...)
	dst = append(dst, ' ')
	if target := b.Path(); len(target) > 0 && string(b.Method()) != "CONNECT" {
		dst = append(dst, target...)
	} else {
		dst = append(dst, b.Authority()...)
	}
	if f.ProperCase {
		dst = append(dst, " HTTP/1.1\r\nHost: "...)
	} else {
		dst = append(dst, " HTTP/1.1\r\nhost: "...)
	}
	dst = append(dst, b.Authority()...)
	dst = append(dst, "\r\n"...)
	f.HTTP10 = false // whoever asked us, we ask in HTTP/1.1
	// A tunnel's request ends with its head.
	if f.Body == Raw {
		f.Body, f.Length = NoBody, -1
	}
	dst = appendFraming(dst, f)
	return appendFields(dst, b, f)
}

// AppendResponseHead appends the head of a response, likewise. f.HTTP10 says that the client speaks HTTP/1.0: such a
// response cannot be Chunked (the caller makes it UntilClose; if it does not, this does). A status that has no body
// gets no framing fields.
func AppendResponseHead(dst []byte, b *header.Block, f Framing) []byte {
	status := b.Status()
	if f.HTTP10 && f.Body == Chunked {
		f.Body = UntilClose
	}
	if f.Body == UntilClose {
		f.KeepAlive = false
	}
	if status < 200 || f.Body == Raw {
		// Neither an interim response nor a tunnel's has anything to say about the next message.
		f.KeepAlive, f.HTTP10 = true, false
	}
	if status < 200 || status == 204 || f.Body == Raw {
		f.Body, f.Length = NoBody, -1
	}
	dst = appendStatusLine(dst, status, f.HTTP10)
	dst = appendFraming(dst, f)
	return appendFields(dst, b, f)
}

func appendStatusLine(dst []byte, status int, http10 bool) []byte {
	if status == 200 && !http10 {
		return append(dst, "HTTP/1.1 200 OK\r\n"...)
	}
	if http10 {
		dst = append(dst, "HTTP/1.0 "...)
	} else {
		dst = append(dst, "HTTP/1.1 "...)
	}
	dst = strconv.AppendInt(dst, int64(status), 10)
	dst = append(dst, ' ')
	dst = append(dst, http.StatusText(status)...)
	return append(dst, "\r\n"...)
}

func appendFraming(dst []byte, f Framing) []byte {
	if f.ProperCase {
		return appendProperFraming(dst, f)
	}
	switch {
	case f.Body == Chunked:
		dst = append(dst, "transfer-encoding: chunked\r\n"...)
	case f.Body != UntilClose && f.Length >= 0:
		dst = append(dst, "content-length: "...)
		dst = strconv.AppendInt(dst, f.Length, 10)
		dst = append(dst, "\r\n"...)
	}
	switch {
	case f.Upgrade:
		dst = append(dst, "connection: upgrade\r\n"...)
	case !f.KeepAlive:
		dst = append(dst, "connection: close\r\n"...)
	case f.HTTP10:
		dst = append(dst, "connection: keep-alive\r\n"...)
	}
	return dst
}

func appendProperFraming(dst []byte, f Framing) []byte {
	switch {
	case f.Body == Chunked:
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
	case f.Body != UntilClose && f.Length >= 0:
		dst = append(dst, "Content-Length: "...)
		dst = strconv.AppendInt(dst, f.Length, 10)
		dst = append(dst, "\r\n"...)
	}
	switch {
	case f.Upgrade:
		dst = append(dst, "Connection: Upgrade\r\n"...)
	case !f.KeepAlive:
		dst = append(dst, "Connection: close\r\n"...)
	case f.HTTP10:
		dst = append(dst, "Connection: keep-alive\r\n"...)
	}
	return dst
}

// unwritten are the well-known fields that are not copied from the block: they are written from the Framing, or belong to
// the connection that they came on. Upgrade is one of them unless there is an upgrade.
var (
	unwritten = header.SetOf(header.Connection, header.ContentLength, header.TransferEncoding, header.KeepAlive,
		header.ProxyConnection, header.HTTP2Settings, header.Upgrade)
	unwrittenInUpgrade = header.SetOf(header.Connection, header.ContentLength, header.TransferEncoding, header.KeepAlive,
		header.ProxyConnection, header.HTTP2Settings)
)

func appendFields(dst []byte, b *header.Block, f Framing) []byte {
	without := &unwritten
	if f.Upgrade {
		without = &unwrittenInUpgrade
	}
	for i := 0; i < b.Len(); {
		if !f.ProperCase {
			if lines, n := b.Lines(i, without); n > 0 {
				dst = append(dst, lines...)
				i += n
				continue
			}
		}
		if !without.Has(b.ID(i)) {
			dst = appendField(dst, b.Name(i), b.Value(i), f.ProperCase)
		}
		i++
	}
	return append(dst, "\r\n"...)
}

func appendField(dst, name, value []byte, proper bool) []byte {
	at := len(dst)
	dst = append(dst, name...)
	if proper {
		properCase(dst[at:])
	}
	dst = append(dst, ": "...)
	dst = append(dst, value...)
	return append(dst, "\r\n"...)
}

// properCase makes the first letter, and each that follows a character other than a letter or digit, upper case.
func properCase(name []byte) {
	first := true
	for i, c := range name {
		letter := 'a' <= c && c <= 'z'
		if first && letter {
			name[i] = c - ('a' - 'A')
		}
		first = !letter && (c < '0' || c > '9')
	}
}

// AppendChunkHeader appends the size line of a chunk of n bytes (n > 0: a chunk of none would end the body). The
// data and then ChunkEnd follow.
func AppendChunkHeader(dst []byte, n int) []byte {
	dst = strconv.AppendUint(dst, uint64(n), 16)
	return append(dst, "\r\n"...)
}

// AppendLastChunk appends the last chunk with the trailers, which may be nil. Fields that may not stand there
// are left out.
func AppendLastChunk(dst []byte, trailers *header.Block) []byte {
	dst = append(dst, "0\r\n"...)
	if trailers != nil {
		for i := range trailers.Len() {
			if mayTrail(trailers, i) {
				dst = appendField(dst, trailers.Name(i), trailers.Value(i), false)
			}
		}
	}
	return append(dst, "\r\n"...)
}
