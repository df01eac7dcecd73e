package selftest

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// Bodies skip the proxy, message after message on one sender's connection, whose receiver changes: what bpf/body.h promises,
// with a proxy that does nothing else, in this file. One application sends messages as fast as it can, in pieces that pay no heed
// to where messages begin; each is for one of several others. The proxy lets go of some of them, at any moment, and while it
// doesn't, it leaves nonsense in the shared memory. Everybody must get his messages, whole, in order, and no other's byte.

const lent = 3 // receivers

// errand is one message.
type errand struct {
	to, size int
	carry    bool
	early    int // of its bytes pass the proxy before it lets go
}

func draw(seed uint64, n int) (list []errand) {
	rng := rand.New(rand.NewPCG(seed, 1))
	to := 0
	for range n {
		if rng.IntN(3) == 0 {
			to = rng.IntN(lent)
		}
		e := errand{to: to, carry: rng.IntN(4) > 0}
		switch rng.IntN(4) {
		case 0:
			e.size = 1 + rng.IntN(4)
		case 1:
			e.size = 64<<10 - 2 + rng.IntN(5)
		case 2:
			e.size = 1 + rng.IntN(300<<10)
		default:
			e.size = 1 + rng.IntN(2<<20)
		}
		if rng.IntN(2) == 0 {
			e.early = rng.IntN(min(e.size, 100<<10))
		}
		list = append(list, e)
	}
	return list
}

// text is what the message says: each byte depends on message and place.
func (e errand) text(i int) []byte {
	b := make([]byte, e.size)
	x := uint32(i)*2654435761 + 12345
	for j := range b {
		x = x*1664525 + 1013904223
		b[j] = byte(x >> 24)
	}
	return b
}

func TestBodiesReachTheirReceiversAndNobodyElse(t *testing.T) {
	for _, limit := range []uint32{0, 64 << 10} { // the second: receivers are often slow
		t.Run(fmt.Sprintf("limit %d", limit), func(t *testing.T) {
			d := open(t, func(c *datapath.Config) { c.BacklogLimit = limit })
			s, err := NewStage(d)
			if err != nil {
				t.Fatal(err)
			}
			for i, fam := range Families {
				for round := range 2 {
					t.Run(fmt.Sprintf("%s round %d", fam, round), func(t *testing.T) {
						runErrands(t, d, s, fam, rand.Uint64(), i%2 == round)
					})
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func runErrands(t *testing.T, d *datapath.Datapath, s *Stage, fam Family, seed uint64, toServer bool) {
	t.Logf("seed %d", seed)
	n := 150
	if testing.Short() {
		n = 40
	}
	list := draw(seed, n)
	var pairs [lent + 1]*Pair // the last is the sender's
	for i := range pairs {
		p, err := s.Pair(fam, true)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		pairs[i] = p
	}
	before, err := d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	fail := func(err error) {
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
			for _, p := range pairs { // nobody waits for the others
				_ = unix.Shutdown(p.Proxy, unix.SHUT_RDWR)
			}
		}
	}
	all.Go(func() { fail(tell(list, pairs[lent].App, seed)) })
	for to := range lent {
		all.Go(func() { fail(hear(list, to, pairs[to].App, seed)) })
	}
	total := 0
	wanted := 0
	for _, e := range list {
		total += e.size
		if e.carry {
			wanted += e.size
		}
	}
	relay := &letsGo{d: d, pairs: pairs, rng: rand.New(rand.NewPCG(seed, 2)), toServer: toServer}
	err = relay.run(list)
	fail(err)
	all.Wait()
	relay.close()
	after, err := d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	carried := after.AsideBodyBytes - before.AsideBodyBytes
	t.Logf("%d messages, %d bytes, of which %d might skip the proxy and %d did, of %d messages; %d system calls", len(list), total, wanted,
		carried, after.AsideBodies-before.AsideBodies, relay.asked)
	if carried != relay.carried {
		t.Errorf("seed %d: the kernel counts %d bytes, the proxy %d", seed, carried, relay.carried)
	}
	if carried < uint64(wanted/20) {
		t.Errorf("seed %d: hardly anything skipped the proxy", seed)
	}
}

// tell sends all messages.
func tell(list []errand, fd int, seed uint64) error {
	rng := rand.New(rand.NewPCG(seed, 3))
	var out []byte
	for i, e := range list {
		out = append(out, e.text(i)...)
		for len(out) > 1<<20 || i == len(list)-1 && len(out) > 0 {
			n := min(1+rng.IntN(1<<rng.IntN(21)), len(out))
			if err := Write(fd, out[:n]); err != nil {
				return fmt.Errorf("sending message %d: %w", i, err)
			}
			out = out[n:]
			if rng.IntN(20) == 0 {
				time.Sleep(time.Duration(rng.IntN(1000)) * time.Microsecond)
			}
		}
	}
	return nil
}

// hear checks what comes to one receiver, who is slow now and then.
func hear(list []errand, to, fd int, seed uint64) error {
	rng := rand.New(rand.NewPCG(seed, uint64(10+to)))
	b := make([]byte, 256<<10)
	for i, e := range list {
		if e.to != to {
			continue
		}
		want := e.text(i)
		for at := 0; at < len(want); {
			n, err := unix.Read(fd, b[:min(len(b), len(want)-at)])
			if errors.Is(err, unix.EAGAIN) {
				if err := waitLong(fd); err != nil {
					return fmt.Errorf("receiver %d waits at %d of %d of message %d: %w", to, at, len(want), i, err)
				}
				continue
			}
			if err == nil && n == 0 {
				err = io.EOF
			}
			if err != nil {
				return fmt.Errorf("receiver %d: message %d: %w", to, i, err)
			}
			if string(b[:n]) != string(want[at:at+n]) {
				return fmt.Errorf("receiver %d got wrong bytes behind %d of message %d of %d", to, at, i, len(want))
			}
			at += n
			if rng.IntN(50) == 0 {
				time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
			}
		}
	}
	return nil
}

// waitLong waits for a receiver's turn, which may be the last.
func waitLong(fd int) (err error) {
	for range 12 {
		if err = Wait(fd, unix.POLLIN); !errors.Is(err, errTimeout) {
			return err
		}
	}
	return err
}

// letsGo is the proxy.
type letsGo struct {
	d        *datapath.Datapath
	pairs    [lent + 1]*Pair
	rng      *rand.Rand
	toServer bool

	aside    *datapath.Aside
	with     int // whose receiver
	kept     []byte
	received uint64 // from the sender
	carried  uint64 // accounted for
	asked    int
}

func (p *letsGo) direction() int {
	if p.toServer {
		return datapath.ToServer
	}
	return datapath.ToClient
}

func (p *letsGo) close() {
	if p.aside != nil {
		p.aside.Close()
	}
}

// joined has the slot of the sender's connection and the receiver's.
func (p *letsGo) joined(to int) (*datapath.Aside, error) {
	if p.aside != nil && p.with == to {
		return p.aside, nil
	}
	p.close()
	p.asked++
	sender, receiver := p.d.AsideEnd(p.pairs[lent].Proxy), p.d.AsideEnd(p.pairs[to].Proxy)
	if p.toServer {
		sender, receiver = receiver, sender
	}
	var err error
	p.aside, err = p.d.PairUp(receiver, sender)
	p.with = to
	return p.aside, err
}

func (p *letsGo) run(list []errand) error {
	near := p.pairs[lent].Proxy
	buf := make([]byte, 128<<10)
	for i, e := range list {
		relay := p.pairs[e.to].Proxy
		left := e.size
		var a *datapath.Aside // lets this message's bytes go
		var base uint64
		for left > 0 {
			if e.carry && a == nil && e.size-left >= e.early && left > 1 {
				var err error
				if a, err = p.joined(e.to); errors.Is(err, datapath.ErrNotAside) {
					e.carry, a, p.aside = false, nil, nil // its bytes have gone by TCP
				} else if err != nil {
					return err
				} else {
					base = a.Carried(p.direction())
					consumed := p.received - uint64(len(p.kept))
					a.Forwarded(p.direction()).Store(consumed)
					a.Allow(p.direction(), consumed, uint64(left-1))
				}
			}
			if len(p.kept) == 0 {
				n, err := unix.Read(near, buf)
				if errors.Is(err, unix.EAGAIN) {
					if err := waitLong(near); err != nil {
						return fmt.Errorf("the proxy waits for the last %d of message %d: %w", left, i, err)
					}
					continue
				}
				if err == nil && n == 0 {
					err = io.EOF
				}
				if err != nil {
					return err
				}
				p.kept = append(p.kept, buf[:n]...)
				p.received += uint64(n)
			}
			if a != nil {
				n := a.Carried(p.direction()) - base
				base += n
				p.carried += n
				if left -= int(n); left < 1 {
					return fmt.Errorf("%d bytes too many were carried of message %d", 1-left, i)
				}
			}
			n := min(left, len(p.kept))
			if e.carry && a == nil {
				n = min(n, max(e.early-(e.size-left), 1))
			}
			if err := Write(relay, p.kept[:n]); err != nil {
				return err
			}
			p.kept = p.kept[n:]
			left -= n
			if a != nil {
				a.Forwarded(p.direction()).Store(p.received - uint64(len(p.kept)))
			}
		}
		if p.aside != nil { // while no message is on its way past us, nobody looks
			p.aside.Forwarded(p.direction()).Store(p.received + p.rng.Uint64N(3)*4096)
		}
	}
	return nil
}
