package tcp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ending is how a side leaves a conversation.
type ending int

const (
	halfClose ending = iota // FIN, goes on reading
	fullClose               // close, after having read everything
	resetLate               // RST, after the other side has everything
	resetAny                // RST at any moment
)

// part is what one side does: it writes its pieces, resting now and then, and ends; meanwhile it reads, slowly
// or not, until the other side's end.
type part struct {
	pieces []int
	rests  []time.Duration
	slow   time.Duration
	end    ending
	seed   byte
}

// outcome is what one side has seen of the other.
type outcome struct {
	got []byte
	end string
}

func (p *part) total() (n int) {
	for _, x := range p.pieces {
		n += x
	}
	return n
}

func (p *part) bytes() []byte {
	b := make([]byte, p.total())
	x := uint32(p.seed) + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// play runs one side. got counts what this side has read, peerGot what the other has.
func (p *part) play(c *net.TCPConn, peer *part, got, peerGot *atomic.Int64) outcome {
	var out outcome
	read := make(chan struct{})
	go func() {
		defer close(read)
		b := make([]byte, 32<<10)
		for {
			n, err := c.Read(b)
			out.got = append(out.got, b[:n]...)
			got.Store(int64(len(out.got)))
			if err != nil {
				switch {
				case errors.Is(err, io.EOF):
					out.end = "end"
				case errors.Is(err, unix.ECONNRESET):
					out.end = "reset"
				case errors.Is(err, net.ErrClosed):
					out.end = "own"
				default:
					out.end = err.Error()
				}
				return
			}
			time.Sleep(p.slow)
		}
	}()
	data := p.bytes()
	for i, n := range p.pieces {
		if _, err := c.Write(data[:n]); err != nil {
			break // the reader learns why
		}
		data = data[n:]
		time.Sleep(p.rests[i])
	}
	switch p.end {
	case halfClose:
		_ = c.CloseWrite()
	case fullClose:
		for end := time.Now().Add(patience); got.Load() < int64(peer.total()) && peer.end != resetAny && time.Now().Before(end); {
			time.Sleep(100 * time.Microsecond)
		}
		_ = c.CloseWrite() // with the reader in the way, close alone may come late
	case resetLate:
		for end := time.Now().Add(patience); (peerGot.Load() < int64(p.total()) || got.Load() < int64(peer.total())) && time.Now().Before(end); {
			time.Sleep(100 * time.Microsecond)
		}
		fallthrough
	case resetAny:
		_ = c.SetLinger(0)
		_ = c.Close()
	}
	<-read
	_ = c.Close()
	return out
}

func randomPart(rng *rand.Rand, end ending) *part {
	p := &part{end: end, seed: byte(rng.Uint32())}
	for range rng.IntN(12) {
		n := 1 + rng.IntN(1<<uint(1+rng.IntN(18)))
		p.pieces = append(p.pieces, n)
		var rest time.Duration
		if rng.IntN(3) == 0 {
			rest = time.Duration(rng.IntN(2000)) * time.Microsecond
		}
		p.rests = append(p.rests, rest)
	}
	if rng.IntN(4) == 0 {
		p.slow = time.Duration(rng.IntN(500)) * time.Microsecond
	}
	return p
}

// converse plays both parts; addr leads, directly or through the proxy, to the backend that hands over its
// connections on accepted.
func converse(addr netip.AddrPort, accepted chan *net.TCPConn, client, server *part) (atClient, atServer outcome, err error) {
	c, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	var s *net.TCPConn
	select {
	case s = <-accepted:
	case <-time.After(patience):
		err = fmt.Errorf("nothing was accepted")
		return
	}
	_ = s.SetDeadline(time.Now().Add(patience))
	var gotC, gotS atomic.Int64
	var wg sync.WaitGroup
	wg.Add(2)
	go func() { defer wg.Done(); atClient = client.play(c, server, &gotC, &gotS) }()
	go func() { defer wg.Done(); atServer = server.play(s, client, &gotS, &gotC) }()
	wg.Wait()
	return
}

// TestRandomConversationsAreThoseOfPlainTCP plays the same random conversation over plain TCP and through the
// proxy and compares what each side has seen: every byte and the kind of end. A reset at a random moment may
// cut anywhere, also with plain TCP: there what arrived must be a beginning of what was sent, and not look
// complete by an orderly end.
func TestRandomConversationsAreThoseOfPlainTCP(t *testing.T) {
	accepted := make(chan *net.TCPConn)
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	direct := ln.Addr().(*net.TCPAddr).AddrPort()
	r := newRig(t, proxyTo("a"), clusterOf("a", direct))
	ends := [][2]ending{
		{halfClose, halfClose}, {fullClose, halfClose}, {halfClose, fullClose}, {fullClose, fullClose},
		{resetLate, halfClose}, {halfClose, resetLate}, {resetAny, halfClose}, {halfClose, resetAny},
	}
	rounds := uint64(200)
	if testing.Short() {
		rounds = 40
	}
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(seed, 5))
		e := ends[seed%uint64(len(ends))]
		client, server := randomPart(rng, e[0]), randomPart(rng, e[1])
		if e[0] == resetLate || e[0] == resetAny || e[1] == resetLate || e[1] == resetAny {
			// Who is reset while it still writes sees the reset when it sees it; keep to what is certain.
			client.slow, server.slow = 0, 0
		}
		plainC, plainS, err := converse(direct, accepted, client, server)
		if err != nil {
			t.Fatal(err)
		}
		proxyC, proxyS, err := converse(r.addr, accepted, client, server)
		if err != nil {
			t.Fatal(err)
		}
		rec := r.end()
		check := func(who string, plain, proxied outcome, me, peer *part) {
			sent := peer.bytes()
			if me.end == resetAny || me.end == resetLate {
				return // it has left by itself; what it had seen by then is chance
			}
			if peer.end == resetAny {
				if !bytes.HasPrefix(sent, proxied.got) {
					t.Errorf("seed %d: %s got bytes that were not sent", seed, who)
				}
				if proxied.end == "end" && plain.end != "end" {
					t.Errorf("seed %d: a reset reached the %s as an orderly end after %d of %d bytes", seed, who, len(proxied.got), len(sent))
				}
				return
			}
			if !bytes.Equal(plain.got, proxied.got) || plain.end != proxied.end {
				t.Errorf("seed %d %v: %s saw %d bytes and %q with plain TCP, %d and %q through the proxy (sent %d); flags %s",
					seed, e, who, len(plain.got), plain.end, len(proxied.got), proxied.end, len(sent), rec.Flags)
			}
		}
		check("client", plainC, proxyC, client, server)
		check("server", plainS, proxyS, server, client)
		if e[0] < resetLate && e[1] < resetLate {
			if rec.BytesReceived != uint64(client.total()) || rec.BytesSent != uint64(server.total()) || rec.Flags != 0 {
				t.Errorf("seed %d: recorded %d received, %d sent, flags %s; want %d, %d", seed, rec.BytesReceived, rec.BytesSent, rec.Flags, client.total(), server.total())
			}
		}
		if t.Failed() {
			break
		}
	}
}
