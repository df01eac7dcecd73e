package http1

import "github.com/sockmesh/sockmesh/pkg/proxy/header"

// AppendRequestHead appends the head of a request: request line, Host, framing fields from f, then the block's
// fields in order, without those that frame a message or concern one connection only.
func AppendRequestHead(dst []byte, b *header.Block, f Framing) []byte { return dst }

// AppendResponseHead appends the head of a response, likewise. f.HTTP10 says that the client speaks HTTP/1.0.
func AppendResponseHead(dst []byte, b *header.Block, f Framing) []byte { return dst }

// AppendChunkHeader appends the size line of a chunk of n bytes (n > 0). The data and then ChunkEnd follow.
func AppendChunkHeader(dst []byte, n int) []byte { return dst }

// ChunkEnd ends a chunk's data.
const ChunkEnd = "\r\n"

// AppendLastChunk appends the last chunk with the trailers, which may be nil.
func AppendLastChunk(dst []byte, trailers *header.Block) []byte { return dst }

// Continue100 is the interim response that a 100-continue client waits for.
const Continue100 = "HTTP/1.1 100 Continue\r\n\r\n"
