package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// Random sequences of requests and responses, whose bodies are short, around the length from which they may skip the proxy, and
// long; one after the other or pipelined; written in pieces of one byte to a megabyte, read slowly or not; cut off by the
// server in the middle, or given up by the client. Of every message each side must get just what the other has said, or a
// beginning of it and an error, and never what belongs to another.

// visit is one connection's.
type visit struct {
	seed      uint64
	addr      string
	mapped    bool
	exchanges []exchange
	pipelined bool
	slow      bool // the client reads slowly
	cut       int  // of the last response's bytes the server sends so many; -1: all
	orderly   bool // and ends then by closing
	giveUp    int  // after so many of the last response's bytes the client goes; -1: never
}

func drawVisit(seed uint64) *visit {
	rng := rand.New(rand.NewPCG(seed, 5))
	v := &visit{seed: seed, addr: []string{"10.98.0.2", "fd98::2"}[rng.IntN(2)], pipelined: rng.IntN(3) == 0, slow: rng.IntN(4) == 0, cut: -1, giveUp: -1}
	v.mapped = v.addr == "10.98.0.2" && rng.IntN(3) == 0
	v.addr = net.JoinHostPort(v.addr, []string{"8080", "8081"}[rng.IntN(2)])
	for range 1 + rng.IntN(6) {
		v.exchanges = append(v.exchanges, exchange{id: rng.Uint32(), up: drawLength(rng), down: drawLength(rng)})
	}
	for i := range v.exchanges {
		x := &v.exchanges[i]
		x.piece = max(1+rng.IntN(1<<rng.IntN(21)), max(x.up, x.down)/300)
		if rng.IntN(2) == 0 {
			x.rest = rng.IntN(8)
		}
	}
	if last := &v.exchanges[len(v.exchanges)-1]; last.down > 0 {
		switch rng.IntN(6) {
		case 0:
			v.cut, v.orderly = rng.IntN(last.down), rng.IntN(2) == 0
			last.more = fmt.Sprintf("X-Cut: %d\r\n", v.cut)
			if v.orderly {
				last.more += "X-End: 1\r\n"
			}
		case 1:
			v.giveUp = rng.IntN(last.down)
		}
	}
	return v
}

func drawLength(rng *rand.Rand) int {
	switch rng.IntN(6) {
	case 0, 1:
		return rng.IntN(200)
	case 2:
		return 64<<10 - 3 + rng.IntN(6)
	case 3:
		return rng.IntN(300 << 10)
	case 4:
		return 1<<20 - 3 + rng.IntN(6)
	default:
		return rng.IntN(3 << 20)
	}
}

// lazy reads slowly.
type lazy struct {
	net.Conn
	rng *rand.Rand
}

func (l *lazy) Read(b []byte) (int, error) {
	if l.rng.IntN(8) == 0 {
		time.Sleep(time.Duration(l.rng.IntN(2000)) * time.Microsecond)
	}
	return l.Conn.Read(b[:min(len(b), 1+l.rng.IntN(64<<10))])
}

// play makes the visit and says what went otherwise than it should.
func (v *visit) play(t testing.TB, h *bodied) (err error) {
	c, err := v.dial(t, h)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * patience))
	var from net.Conn = c
	if v.slow {
		from = &lazy{c, rand.New(rand.NewPCG(v.seed, 6))}
	}
	in := bufio.NewReaderSize(from, 4<<10)
	var sent sync.WaitGroup
	defer sent.Wait()
	if v.pipelined {
		sent.Go(func() {
			for i := range v.exchanges {
				if v.exchanges[i].send(c) != nil {
					return // the reader hears of it, too
				}
			}
		})
	}
	for i := range v.exchanges {
		x := &v.exchanges[i]
		if !v.pipelined {
			sent.Go(func() { _ = x.send(c) })
		}
		last := i == len(v.exchanges)-1
		switch {
		case last && v.cut >= 0:
			err = v.torso(x, in, v.cut, c)
		case last && v.giveUp >= 0:
			err = v.torso(x, in, -1, c)
		default:
			err = x.receive(in)
		}
		if err != nil {
			_ = c.Close()
			return err
		}
		if !v.pipelined {
			sent.Wait()
		}
	}
	return nil
}

func (v *visit) dial(t testing.TB, h *bodied) (*net.TCPConn, error) {
	if !v.mapped {
		return dialIn(t, h.pod, v.addr)
	}
	to, err := netip.ParseAddrPort(v.addr)
	if err != nil {
		return nil, err
	}
	return dialMapped(t, h.pod, to)
}

// torso reads a response that the server cuts, or that the client doesn't want to the end.
func (v *visit) torso(x *exchange, in *bufio.Reader, cut int, c *net.TCPConn) error {
	rs, err := http.ReadResponse(in, nil)
	if err != nil {
		if cut >= 0 {
			return nil // the reset may have overtaken the head
		}
		return fmt.Errorf("message %d: %w", x.id, err)
	}
	want := bodyOf(x.id, x.down)
	b := make([]byte, 16<<10)
	for at := 0; ; {
		n, err := rs.Body.Read(b)
		if !bytes.Equal(b[:n], want[at:min(at+n, len(want))]) {
			return fmt.Errorf("message %d, cut at %d, has wrong bytes behind %d of %d", x.id, cut, at, len(want))
		}
		at += n
		switch {
		case cut < 0 && at >= v.giveUp:
			_ = c.SetLinger(0)
			return c.Close()
		case cut >= 0 && at > cut:
			return fmt.Errorf("message %d goes on behind %d, where it was cut", x.id, cut)
		case errors.Is(err, io.EOF):
			return fmt.Errorf("message %d, cut at %d of %d, seems whole", x.id, at, len(want))
		case err != nil && cut < 0:
			return fmt.Errorf("message %d ends at %d of %d: %w", x.id, at, len(want), err)
		case err != nil && v.orderly && at != cut:
			return fmt.Errorf("message %d ends at %d instead of %d: %w", x.id, at, cut, err)
		case err != nil:
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				return fmt.Errorf("message %d hangs at %d of %d", x.id, at, len(want))
			}
			return nil
		}
	}
}

// long is how many bytes of the visit's bodies might skip the proxy.
func (v *visit) long() (n int) {
	for _, x := range v.exchanges {
		for _, size := range []int{x.up, x.down} {
			if size >= 64<<10 {
				n += size
			}
		}
	}
	return n
}

func TestRandomMessagesWhoseBodiesSkipTheProxyAreThoseThatWereSent(t *testing.T) {
	const workers = 3
	rounds := 50
	if testing.Short() {
		rounds = 20
	}
	for _, backend := range backends {
		for _, limit := range []uint32{0, 32 << 10} { // the second: receivers are soon too slow
			t.Run(fmt.Sprintf("%s limit %d", backend, limit), func(t *testing.T) {
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				h := newBodied(t, backend, func(s *setup) { s.datapath.BacklogLimit = limit })
				before := h.counters(t)
				stop := make(chan struct{})
				var moving sync.WaitGroup
				moving.Go(func() { h.comeAndGo(t, stop) })
				var all sync.WaitGroup
				var mu sync.Mutex
				long := 0
				for w := range workers {
					all.Go(func() {
						for i := range rounds {
							v := drawVisit(seed + uint64(w*rounds+i))
							if err := v.play(t, h); err != nil {
								t.Errorf("seed %d: %+v: %v", v.seed, v, err)
								return
							}
							mu.Lock()
							long += v.long()
							mu.Unlock()
						}
					})
				}
				all.Wait()
				close(stop)
				moving.Wait()
				c := h.counters(t)
				skipped := c.AsideBodyBytes - before.AsideBodyBytes
				t.Logf("%d of %d bytes of long bodies skipped the proxy, %d of %d messages; %d returned", skipped, long,
					c.AsideBodies-before.AsideBodies, workers*rounds*3, c.AsideReturned-before.AsideReturned)
				if skipped < uint64(long/20) {
					t.Error("hardly anything skipped the proxy")
				}
			})
		}
	}
}

// comeAndGo has the server leave the mesh and come back, so that there are connections of which it is not part.
func (h *bodied) comeAndGo(t *testing.T, stop chan struct{}) {
	client := datapath.Pod{Namespace: "ns", Name: "client", Cookie: cookie(t, h.pod), IPs: h.podIPs, Enrolled: true}
	server := datapath.Pod{Namespace: "ns", Name: "server", Cookie: cookie(t, h.server), IPs: h.serverIPs, Enrolled: true}
	for here := true; ; here = !here {
		pods := []datapath.Pod{client}
		wait := 20 * time.Millisecond
		if here {
			pods = append(pods, server)
			wait = 400 * time.Millisecond
		}
		h.d.Reconciler().SetPods(pods)
		if err := h.d.Reconciler().Flush(context.Background()); err != nil {
			t.Error(err)
			return
		}
		select {
		case <-stop:
			return
		case <-time.After(wait):
		}
	}
}
