package sample

import (
	"bufio"
	"io"
	"net"
	"os"
)

// wrapped gets TCPConn's methods by embedding it.
type wrapped struct{ *net.TCPConn }

// ours has a method of that name which copies by itself.
type ours struct{}

func (ours) WriteTo(io.Writer) (int64, error) { return 0, nil }

func methods(c *net.TCPConn, w wrapped, f *os.File, b *bufio.Writer, r *bufio.Reader, any io.ReaderFrom, to io.WriterTo) {
	_, _ = c.ReadFrom(c)   // caught: (*net.TCPConn).ReadFrom
	_, _ = c.WriteTo(c)    // caught: (*net.TCPConn).WriteTo
	_, _ = w.ReadFrom(c)   // caught: (*net.TCPConn).ReadFrom
	_, _ = f.ReadFrom(c)   // caught: (*os.File).ReadFrom
	_, _ = b.ReadFrom(c)   // caught: (*bufio.Writer).ReadFrom
	_, _ = r.WriteTo(c)    // caught: (*bufio.Reader).WriteTo
	_, _ = any.ReadFrom(c) // caught: (io.ReaderFrom).ReadFrom
	_, _ = to.WriteTo(c)   // caught: (io.WriterTo).WriteTo
	_, _ = ours{}.WriteTo(c)
	copyLater := c.ReadFrom // caught: (*net.TCPConn).ReadFrom
	_, _ = copyLater(c)
	_, _ = c.Read(nil)
}
