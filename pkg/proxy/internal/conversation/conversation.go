// Package conversation plays random TCP conversations for tests, so that what happens through the proxy can be
// compared with what happens over plain TCP.
package conversation

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Patience only ends a hung conversation.
const Patience = 30 * time.Second

// Ending is how a side leaves a conversation.
type Ending int

// Endings of a side.
const (
	HalfClose Ending = iota // FIN, goes on reading
	FullClose               // close, after having read everything
	ResetLate               // RST, after the other side has everything
	ResetAny                // RST at any moment
)

// Part is what one side does: it writes its pieces, resting now and then, and ends; meanwhile it reads, slowly
// or not, until the other side's end.
type Part struct {
	Pieces []int
	Rests  []time.Duration
	Awaits []int         // before each piece: how many of the other side's bytes must have come; nil: none
	Slow   time.Duration // after each read
	End    Ending
	Seed   byte
}

// Outcome is what one side has seen of the other.
type Outcome struct {
	Got []byte
	End string
}

// Total is how many bytes the part writes.
func (p *Part) Total() (n int) {
	for _, x := range p.Pieces {
		n += x
	}
	return n
}

// Bytes are what the part writes.
func (p *Part) Bytes() []byte {
	b := make([]byte, p.Total())
	x := uint32(p.Seed) + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// play runs one side. got counts what this side has read, peerGot what the other has.
func (p *Part) play(c *net.TCPConn, peer *Part, got, peerGot *atomic.Int64) Outcome {
	var out Outcome
	read := make(chan struct{})
	go func() {
		defer close(read)
		b := make([]byte, 32<<10)
		for {
			n, err := c.Read(b)
			out.Got = append(out.Got, b[:n]...)
			got.Store(int64(len(out.Got)))
			if err != nil {
				switch {
				case errors.Is(err, io.EOF):
					out.End = "end"
				case errors.Is(err, unix.ECONNRESET):
					out.End = "reset"
				case errors.Is(err, net.ErrClosed):
					out.End = "own"
				default:
					out.End = err.Error()
				}
				return
			}
			time.Sleep(p.Slow)
		}
	}()
	data := p.Bytes()
	var failed error
	for i, n := range p.Pieces {
		if p.Awaits != nil {
			await(got, p.Awaits[i], read)
		}
		if _, failed = c.Write(data[:n]); failed != nil {
			break
		}
		data = data[n:]
		time.Sleep(p.Rests[i])
	}
	switch p.End {
	case HalfClose:
		_ = c.CloseWrite()
	case FullClose:
		for end := time.Now().Add(Patience); got.Load() < int64(peer.Total()) && peer.End != ResetAny && time.Now().Before(end); {
			time.Sleep(100 * time.Microsecond)
		}
		_ = c.CloseWrite() // with the reader in the way, close alone may come late
	case ResetLate:
		for end := time.Now().Add(Patience); (peerGot.Load() < int64(p.Total()) || got.Load() < int64(peer.Total())) && time.Now().Before(end); {
			time.Sleep(100 * time.Microsecond)
		}
		fallthrough
	case ResetAny:
		_ = c.SetLinger(0)
		_ = c.Close()
	}
	<-read
	_ = c.Close()
	if out.End == "end" && errors.Is(failed, unix.ECONNRESET) {
		out.End = "reset" // the kernel tells of a reset once, and here it told the writer
	}
	return out
}

// await waits until n bytes have been read, or no more will be.
func await(got *atomic.Int64, n int, over <-chan struct{}) {
	for got.Load() < int64(n) {
		select {
		case <-over:
			return
		case <-time.After(20 * time.Microsecond):
		}
	}
}

// Random draws a part.
func Random(rng *rand.Rand, end Ending) *Part {
	p := &Part{End: end, Seed: byte(rng.Uint32())}
	for range rng.IntN(12) {
		n := 1 + rng.IntN(1<<uint(1+rng.IntN(18)))
		p.Pieces = append(p.Pieces, n)
		var rest time.Duration
		if rng.IntN(3) == 0 {
			rest = time.Duration(rng.IntN(2000)) * time.Microsecond
		}
		p.Rests = append(p.Rests, rest)
	}
	if rng.IntN(4) == 0 {
		p.Slow = time.Duration(rng.IntN(500)) * time.Microsecond
	}
	return p
}

// Play plays both parts; dial leads, directly or through the proxy, to the backend that hands over its
// connections on accepted.
func Play(dial func() (*net.TCPConn, error), accepted chan *net.TCPConn, client, server *Part) (atClient, atServer Outcome, err error) {
	c, err := dial()
	if err != nil {
		return
	}
	_ = c.SetDeadline(time.Now().Add(Patience))
	var s *net.TCPConn
	select {
	case s = <-accepted:
	case <-time.After(Patience):
		err = fmt.Errorf("nothing was accepted")
		return
	}
	_ = s.SetDeadline(time.Now().Add(Patience))
	var gotC, gotS atomic.Int64
	var wg sync.WaitGroup
	wg.Add(2)
	go func() { defer wg.Done(); atClient = client.play(c, server, &gotC, &gotS) }()
	go func() { defer wg.Done(); atServer = server.play(s, client, &gotS, &gotC) }()
	wg.Wait()
	return
}

// combinations are the endings worth playing, client's and server's.
var combinations = [][2]Ending{
	{HalfClose, HalfClose}, {FullClose, HalfClose}, {HalfClose, FullClose}, {FullClose, FullClose},
	{ResetLate, HalfClose}, {HalfClose, ResetLate}, {ResetAny, HalfClose}, {HalfClose, ResetAny},
}

// Pair draws the two parts of the conversation with that number.
func Pair(seed uint64) (client, server *Part) {
	rng := rand.New(rand.NewPCG(seed, 5))
	e := combinations[seed%uint64(len(combinations))]
	client, server = Random(rng, e[0]), Random(rng, e[1])
	if e[0] >= ResetLate || e[1] >= ResetLate {
		// Who is reset while it still writes sees the reset when it sees it; keep to what is certain.
		client.Slow, server.Slow = 0, 0
	}
	return client, server
}

// Dialogue draws the two parts of the conversation with that number, in which the sides mostly wait for each other, as
// those of most protocols do: nothing is under way between two pieces then.
func Dialogue(seed uint64) (client, server *Part) {
	rng := rand.New(rand.NewPCG(seed, 6))
	e := combinations[seed%uint64(len(combinations))]
	client, server = &Part{End: e[0], Seed: byte(rng.Uint32())}, &Part{End: e[1], Seed: byte(rng.Uint32())}
	said := map[*Part]int{}
	for range 4 + rng.IntN(24) {
		me, other := client, server
		if rng.IntN(2) == 0 {
			me, other = server, client
		}
		n := 1 + rng.IntN(1<<uint(1+rng.IntN(15)))
		heard := 0
		if rng.IntN(4) > 0 {
			heard = said[other]
		}
		var rest time.Duration
		if rng.IntN(10) == 0 {
			rest = time.Duration(rng.IntN(1000)) * time.Microsecond
		}
		me.Pieces, me.Awaits, me.Rests = append(me.Pieces, n), append(me.Awaits, heard), append(me.Rests, rest)
		said[me] += n
	}
	return client, server
}

// Differs compares what one side has seen of its peer over plain TCP and through the proxy: every byte and the
// kind of end. A reset at a random moment may cut anywhere, also with plain TCP: there what arrived must be a
// beginning of what was sent, and not look complete by an orderly end.
func Differs(plain, proxied Outcome, me, peer *Part) error {
	sent := peer.Bytes()
	switch {
	case me.End >= ResetLate: // it has left by itself; what it had seen by then is chance
		return nil
	case peer.End == ResetAny:
		if !bytes.HasPrefix(sent, proxied.Got) {
			return fmt.Errorf("got bytes that were not sent")
		}
		if proxied.End == "end" && plain.End != "end" {
			return fmt.Errorf("a reset looked like an orderly end after %d of %d bytes", len(proxied.Got), len(sent))
		}
		return nil
	case !bytes.Equal(plain.Got, proxied.Got) || plain.End != proxied.End:
		return fmt.Errorf("saw %d bytes and %q with plain TCP, %d and %q through the proxy; sent were %d",
			len(plain.Got), plain.End, len(proxied.Got), proxied.End, len(sent))
	}
	return nil
}
