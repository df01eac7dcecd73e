package traffic

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/net/websocket"
)

// Kind of exchanges.
type Kind string

// Kinds of exchanges. Every kind but HTTP sends bytes that can be told from any others and compares those that come.
const (
	HTTP      Kind = "http"      // a small GET
	Large     Kind = "large"     // a POST whose body comes back
	Streaming Kind = "streaming" // a POST in chunks, answered in chunks that are flushed one by one
	WebSocket Kind = "websocket" // a message that comes back
	TCP       Kind = "tcp"       // bytes that come back; at the end a half-close, which must come back too
	UDP       Kind = "udp"       // a datagram that comes back, on a socket that names the address with each one
	Serve     Kind = "serve"     // not a client but the server of all of them, see serve.go
)

// errCorrupt: bytes came that nobody sent, or some are missing of an answer that claims to be whole.
var errCorrupt = errors.New("corrupt payload")

// answer is what an exchange that went well brought.
type answer struct {
	who   string // its first word says who answered
	bytes uint64 // of payload that came back and were right
	last  bool   // the connection carries no more
}

// conversation is what a connection knows of itself.
type conversation struct {
	cfg    *Config
	conn   net.Conn
	reader *bufio.Reader
	seed   uint64 // of the payload; each exchange has another
	ws     *websocket.Conn
}

type kind struct {
	network  string
	exchange func(c *conversation) (answer, error)
	// end takes leave once the connection has carried what it should; nil: it is just closed.
	end func(c *conversation) error
}

var kinds = map[Kind]kind{
	HTTP:      {"tcp", httpExchange, nil},
	Large:     {"tcp", largeExchange, nil},
	Streaming: {"tcp", streamExchange, nil},
	WebSocket: {"tcp", wsExchange, wsEnd},
	TCP:       {"tcp", tcpExchange, tcpEnd},
	UDP:       {"udp", udpExchange, nil},
}

// fill writes the payload of a seed from an offset on: every position of every seed has its own bytes.
func fill(b []byte, seed, offset uint64) {
	for i := range b {
		at := offset + uint64(i)
		x := (seed*0xd1342543de82ef95 + at/8) * 0x9e3779b97f4a7c15
		x ^= x >> 29
		b[i] = byte(x >> (8 * (at % 8)))
	}
}

// payload is the next one of the conversation.
func (c *conversation) payload() []byte {
	c.seed++
	b := make([]byte, c.cfg.Size)
	fill(b, c.seed, 0)
	return b
}

func same(got, want []byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%w: %d bytes instead of %d", errCorrupt, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("%w: byte %d of %d is wrong", errCorrupt, i, len(want))
		}
	}
	return nil
}

func (c *conversation) head(method, path string, more ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", method, path, c.cfg.Host)
	for k, v := range c.cfg.Headers {
		fmt.Fprintf(&b, "%s: %s\r\n", k, v)
	}
	if c.cfg.NewConnection {
		b.WriteString("Connection: close\r\n")
	}
	for _, line := range more {
		b.WriteString(line + "\r\n")
	}
	b.WriteString("\r\n")
	return b.String()
}

// reply is what came of a response.
type reply struct {
	body []byte
	who  string // the server, by its own word
	last bool   // the connection ends with it
}

// response reads one; a status that is not 200 is an error.
func (c *conversation) response() (reply, error) {
	resp, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		return reply{}, fmt.Errorf("read the answer: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return reply{}, fmt.Errorf("read the body after %d bytes: %w", len(body), err)
	}
	if resp.StatusCode != http.StatusOK {
		return reply{}, fmt.Errorf("status %d: %.200s", resp.StatusCode, body)
	}
	return reply{body, resp.Header.Get("X-Who"), resp.Close}, nil
}

func httpExchange(c *conversation) (answer, error) {
	if _, err := c.conn.Write([]byte(c.head("GET", c.cfg.Path))); err != nil {
		return answer{}, fmt.Errorf("send the request: %w", err)
	}
	got, err := c.response()
	if err != nil {
		return answer{}, err
	}
	return answer{string(got.body), 0, got.last}, nil
}

func largeExchange(c *conversation) (answer, error) {
	body := c.payload()
	request := append([]byte(c.head("POST", "/echo", "Content-Length: "+strconv.Itoa(len(body)))), body...)
	if _, err := c.conn.Write(request); err != nil {
		return answer{}, fmt.Errorf("send the request: %w", err)
	}
	got, err := c.response()
	if err == nil {
		err = same(got.body, body)
	}
	if err != nil {
		return answer{}, err
	}
	return answer{got.who, uint64(len(got.body)), got.last}, nil
}

// pieces of a streaming exchange.
const pieces = 8

func streamExchange(c *conversation) (answer, error) {
	body := c.payload()
	if _, err := c.conn.Write([]byte(c.head("POST", "/stream", "Transfer-Encoding: chunked"))); err != nil {
		return answer{}, fmt.Errorf("send the request: %w", err)
	}
	for i := range pieces {
		piece := body[i*len(body)/pieces : (i+1)*len(body)/pieces]
		if len(piece) == 0 {
			continue // would be the last chunk
		}
		if _, err := fmt.Fprintf(c.conn, "%x\r\n%s\r\n", len(piece), piece); err != nil {
			return answer{}, fmt.Errorf("send piece %d of the request: %w", i, err)
		}
	}
	if _, err := io.WriteString(c.conn, "0\r\n\r\n"); err != nil {
		return answer{}, fmt.Errorf("send the end of the request: %w", err)
	}
	got, err := c.response()
	if err == nil {
		err = same(got.body, body)
	}
	if err != nil {
		return answer{}, err
	}
	return answer{got.who, uint64(len(got.body)), got.last}, nil
}

// wsExchange shakes hands first if that has not happened yet.
func wsExchange(c *conversation) (answer, error) {
	if c.ws == nil {
		cfg, err := websocket.NewConfig("ws://"+c.cfg.Host+"/ws", "http://"+c.cfg.Host)
		if err != nil {
			return answer{}, err
		}
		if c.ws, err = websocket.NewClient(cfg, c.conn); err != nil {
			return answer{}, fmt.Errorf("WebSocket handshake: %w", err)
		}
	}
	body := withLength(c.payload())
	if err := websocket.Message.Send(c.ws, body); err != nil {
		return answer{}, fmt.Errorf("send the message: %w", err)
	}
	var got []byte
	err := websocket.Message.Receive(c.ws, &got)
	if err == nil && len(got) < len(body) && bytes.Equal(got, body[:len(got)]) {
		err = c.wsCutOff(len(got), len(body))
	}
	if err == nil {
		err = same(got, body)
	}
	if err != nil {
		return answer{}, fmt.Errorf("receive the message: %w", err)
	}
	return answer{"websocket", uint64(len(got)), false}, nil
}

// withLength writes a message's length into its first bytes: the library takes the end of a connection for the end of a
// message that it is in the middle of, so that neither side can tell a message that was cut off from a short one.
func withLength(message []byte) []byte {
	if len(message) >= 4 {
		binary.BigEndian.PutUint32(message, uint32(len(message)))
	}
	return message
}

// isWhole is the other side's question.
func isWhole(message []byte) bool {
	return len(message) < 4 || int(binary.BigEndian.Uint32(message)) == len(message)
}

// wsCutOff: the beginning of a message came. If the connection has ended there the exchange has failed, and nothing wrong
// was received.
func (c *conversation) wsCutOff(got, want int) error {
	var more []byte
	if err := websocket.Message.Receive(c.ws, &more); len(more) == 0 && errors.Is(err, io.EOF) {
		return fmt.Errorf("after %d of %d bytes: %w", got, want, io.ErrUnexpectedEOF)
	}
	return nil
}

// wsEnd says goodbye by a close frame, which must be answered.
func wsEnd(c *conversation) error {
	if c.ws == nil {
		return nil
	}
	if err := c.ws.WriteClose(1000); err != nil {
		return fmt.Errorf("send the close frame: %w", err)
	}
	var got []byte
	if err := websocket.Message.Receive(c.ws, &got); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the close frame came %d bytes and %w", len(got), err)
	}
	return nil
}

func tcpExchange(c *conversation) (answer, error) {
	body := c.payload()
	if _, err := c.conn.Write(body); err != nil {
		return answer{}, fmt.Errorf("send: %w", err)
	}
	got := make([]byte, len(body))
	if n, err := io.ReadFull(c.reader, got); err != nil {
		return answer{}, fmt.Errorf("receive after %d bytes: %w", n, err)
	}
	if err := same(got, body); err != nil {
		return answer{}, err
	}
	return answer{"tcp", uint64(len(got)), false}, nil
}

// tcpEnd closes its own direction; the server does the same when it has seen that.
func tcpEnd(c *conversation) error {
	if err := c.conn.(*net.TCPConn).CloseWrite(); err != nil {
		return fmt.Errorf("half-close: %w", err)
	}
	switch rest, err := io.ReadAll(c.reader); {
	case err != nil:
		return fmt.Errorf("after the half-close: %w", err)
	case len(rest) > 0:
		return fmt.Errorf("%w: %d bytes more than were sent", errCorrupt, len(rest))
	}
	return nil
}

// udpExchange expects that no datagram is lost: there is no wire between the pods of one node. One that has not come back
// when the time is over is lost, and a failed exchange.
func udpExchange(c *conversation) (answer, error) {
	body := c.payload()
	if _, err := c.conn.Write(body); err != nil {
		return answer{}, fmt.Errorf("send: %w", err)
	}
	got := make([]byte, len(body)+1)
	n, err := c.conn.Read(got)
	if err != nil {
		return answer{}, fmt.Errorf("a datagram or its answer is lost: %w", err)
	}
	if !bytes.Equal(got[:n], body) {
		return answer{}, fmt.Errorf("%w: a datagram of %d bytes", errCorrupt, n)
	}
	return answer{"udp", uint64(n), false}, nil
}

// datagrams is a socket that isn't connected, as a resolver's is: each datagram names its address, and the answer must
// come from there.
type datagrams struct {
	*net.UDPConn
	to netip.AddrPort
}

func openDatagrams(addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	network := "udp4"
	if to.Addr().Is6() {
		network = "udp6"
	}
	c, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, err
	}
	return &datagrams{c, to}, nil
}

// Write implements net.Conn.
func (d *datagrams) Write(b []byte) (int, error) { return d.WriteToUDPAddrPort(b, d.to) }

// Read implements net.Conn.
func (d *datagrams) Read(b []byte) (int, error) {
	n, from, err := d.ReadFromUDPAddrPort(b)
	if from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); err == nil && from != d.to {
		return 0, fmt.Errorf("the answer of %s comes from %s", d.to, from)
	}
	return n, err
}
