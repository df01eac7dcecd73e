package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// splicer is a proxy as people write them in Go: two io.Copy between TCP connections, which splice(2) on Linux.
func splicer(pod *ns, to netip.AddrPort) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		defer c.Close()
		up, err := pod.dial(to)
		if err != nil {
			c.SetLinger(0)
			return
		}
		defer up.Close()
		var wg sync.WaitGroup
		wg.Go(func() { splice(up, c) })
		wg.Go(func() { splice(c, up) })
		wg.Wait()
	}
}

func splice(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		to.SetLinger(0)
		to.Close()
		return
	}
	to.CloseWrite()
}

// exchange writes n random bytes, reads as many back, and compares.
func exchange(c *net.TCPConn, n int) error {
	out, in := make([]byte, n), make([]byte, n)
	for i := range out {
		out[i] = byte(rand.Uint32())
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(out)
		sent <- err
	}()
	if got, err := io.ReadFull(c, in); err != nil {
		if !bytes.Equal(in[:got], out[:got]) {
			return errors.New("wrong bytes before the end")
		}
		return err
	}
	if !bytes.Equal(in, out) {
		return errors.New("wrong bytes")
	}
	return <-sent
}

// converse writes n random bytes, half-closes, and reads them back to the end.
func converse(c *net.TCPConn, n int) error {
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(rand.Uint32())
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(out)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	in, err := io.ReadAll(onlyReader{c})
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if !bytes.Equal(in, out) {
		return fmt.Errorf("%d bytes came back of %d", len(in), n)
	}
	return nil
}

func echoServer(c *net.TCPConn) {
	defer c.Close()
	io.Copy(onlyWriter{c}, onlyReader{c})
}

// The application behind the proxy splices what it accepts, and finds bytes unread that were redirected: this one
// connection is cut off, the next ones go by TCP on that leg, and work.
func TestServerThatSplicesLosesOneConnection(t *testing.T) {
	m := newMeshed(t)
	backend := m.w.pod()
	backend.serve(9000, echoServer)
	families(t, func(t *testing.T, fam family) {
		must(t, forget(m.d))
		port := uint16(8080)
		m.server.t = t
		stop := m.server.listen(fmt.Sprintf("[::]:%d", port), splicer(m.server, ap(backend.v4, 9000)))
		defer stop()
		before, err := m.d.Counters()
		must(t, err)
		failed := 0
		for range 5 {
			c, err := fam.dial(m.client, ap(fam.of(m.server), port))
			must(t, err)
			if err := exchange(c, 300_000); err != nil {
				if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
					t.Errorf("the connection that was cut off ended by %v, which is no reset", err)
				}
				failed++
			}
			c.Close()
		}
		after, err := m.d.Counters()
		must(t, err)
		c, err := fam.dial(m.client, ap(fam.of(m.server), port))
		must(t, err)
		if err := converse(c, 300_000); err != nil {
			t.Error("with half-close:", err)
		}
		c.Close()
		if failed > 1 || after.Spliced-before.Spliced == 0 {
			t.Errorf("%d of 5 connections failed; counters %+v", failed, after)
		}
		if after.SkippedSplicing-before.SkippedSplicing < 4 {
			t.Errorf("%d sockets were skipped", after.SkippedSplicing-before.SkippedSplicing)
		}
	})
	eventually(t, "nothing is left to watch", func() bool { return countEntries(m.d.objs.spliced()) == 0 })
}

// What can't be helped, pinned: the end of the data is TCP's, so a first splice that comes after it reads it at once, and
// misses what was redirected before. The application is known from then on: no later connection can meet this.
func TestFirstSpliceAfterTheEndMissesWhatWasRedirected(t *testing.T) {
	m := newMeshed(t, func(c *Config) { c.AcceleratePods = true })
	m.d.Reconciler().SetClaims([]mesh.Claim{})
	flush(t, m.d)
	type result struct {
		got []byte
		err error
	}
	results, ready := make(chan result), make(chan struct{}, 1)
	m.server.serve(8080, func(c *net.TCPConn) {
		<-ready
		l, err := net.Listen("tcp", "127.0.0.1:0") // a second socket, for io.Copy to splice into
		if err != nil {
			t.Error(err)
			return
		}
		defer l.Close()
		go func() {
			in, err := l.Accept()
			if err == nil {
				defer in.Close()
				got, err := io.ReadAll(onlyReader{in})
				results <- result{got, err}
			}
		}()
		out, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		io.Copy(out.(*net.TCPConn), c)
		out.Close()
	})
	families(t, func(t *testing.T, fam family) {
		must(t, forget(m.d))
		for i := range 3 {
			c, err := fam.dial(m.client, ap(fam.of(m.server), 8080))
			must(t, err)
			_, err = io.WriteString(c, "all that I have to say")
			must(t, err)
			must(t, c.CloseWrite())
			time.Sleep(20 * time.Millisecond)
			ready <- struct{}{}
			r := <-results
			want := "all that I have to say"
			if i == 0 {
				want = ""
			}
			if string(r.got) != want {
				t.Errorf("connection %d: %q, %v", i, r.got, r.err)
			}
			c.Close()
		}
	})
}

// The application that connects through the proxy splices: it waits for an answer before there is one, so nothing is
// lost, and the connection goes on by TCP.
func TestClientThatSplicesLosesNothing(t *testing.T) {
	m := newMeshed(t)
	m.server.serve(8080, func(c *net.TCPConn) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		got, _ := io.ReadAll(onlyReader{c}) // the client's splice waits meanwhile
		c.Write(got)
	})
	families(t, func(t *testing.T, fam family) {
		must(t, forget(m.d))
		front := m.client.listenLocal(t, splicer(m.client, ap(fam.of(m.server), 8080)))
		var seen []string
		for i := range 4 {
			c, err := m.client.dial(front)
			must(t, err)
			if err := converse(c, 200_000); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
			socks, err := m.d.Sockets()
			must(t, err)
			for _, s := range socks {
				if s.Role == "client" && strings.Contains(s.Reason, "splices") {
					seen = append(seen, s.State)
				}
			}
			c.Close()
		}
		t.Log("spliced clients seen:", seen)
		c, err := m.d.Counters()
		must(t, err)
		t.Logf("%+v", c)
	})
	c, err := m.d.Counters()
	must(t, err)
	if c.Spliced < 3 || c.SkippedSplicing < 9 {
		t.Errorf("spliced %d, skipped %d", c.Spliced, c.SkippedSplicing)
	}
}

// A spliced connection that stays open is TCP in both directions and out of the map, and says so; the next one is not
// enrolled, and says why.
func TestSplicedConnectionTurnsToTCP(t *testing.T) {
	m := newMeshed(t)
	m.server.serve(8080, echoServer)
	families(t, func(t *testing.T, fam family) {
		must(t, forget(m.d))
		before, err := m.d.Counters()
		must(t, err)
		front := m.client.listenLocal(t, splicer(m.client, ap(fam.of(m.server), 8080)))
		c, err := m.client.dial(front)
		must(t, err)
		defer c.Close()
		eventually(t, "the splice is noticed", func() bool {
			n, err := m.d.Counters()
			must(t, err)
			return n.Spliced == before.Spliced+1
		})
		for range 10 {
			echo(t, c, 10_000)
		}
		eventually(t, "the client's socket leaves the map", func() bool { return m.only(t, "client").State == "removed" })
		client, downstream := m.only(t, "client"), m.only(t, "downstream")
		if !strings.Contains(client.Reason, "splices") || !strings.Contains(downstream.Reason, "other end splices") || downstream.Sends != "tcp" {
			t.Errorf("client %+v, proxy %+v", client, downstream)
		}
		echo(t, c, 10_000)
		eventually(t, "nothing is left to watch", func() bool { return countEntries(m.d.objs.spliced()) == 0 })
		eventually(t, "sm_msg looks for spliced sockets no more", func() bool {
			var any uint32
			must(t, m.d.objs.splicing().Lookup(uint32(0), &any))
			return any == 0
		})
		m.gone(t, c)

		next, err := m.client.dial(front)
		must(t, err)
		defer next.Close()
		echo(t, next, 10_000)
		client, downstream = m.only(t, "client"), m.only(t, "downstream")
		if client.State != "plain" || !strings.Contains(client.Reason, "the application splices") {
			t.Errorf("the next connection's client is %+v", client)
		}
		if downstream.State != "plain" || !strings.Contains(downstream.Reason, "the other end could not be enrolled") {
			t.Errorf("the next connection's other end is %+v", downstream)
		}
		m.gone(t, next)
	})
}

// Pods that splice without a proxy between them: nothing unread, so the connection goes on; the next ones are not enrolled,
// and say why.
func TestPodThatSplicesBeforeTheFirstByte(t *testing.T) {
	m := newMeshed(t, func(c *Config) { c.AcceleratePods = true })
	m.d.Reconciler().SetClaims([]mesh.Claim{})
	flush(t, m.d)
	backend := m.w.pod()
	backend.serve(9000, echoServer)
	m.server.serve(8080, splicer(m.server, ap(backend.v4, 9000)))
	families(t, func(t *testing.T, fam family) {
		must(t, forget(m.d))
		before, err := m.d.Counters()
		must(t, err)
		for i := range 3 {
			c, err := fam.dial(m.client, ap(fam.of(m.server), 8080))
			must(t, err)
			eventually(t, "the splice is noticed", func() bool {
				n, err := m.d.Counters()
				must(t, err)
				return n.Spliced == before.Spliced+1
			})
			if i > 0 {
				s := m.listed(t, c)
				if s.State != "plain" || !strings.Contains(s.Reason, "the application at the other end splices") {
					t.Errorf("connection %d: the client is %+v", i, s)
				}
			}
			if err := converse(c, 100_000); err != nil {
				t.Error(err)
			}
			m.gone(t, c)
		}
	})
}

// listenLocal serves on a free port of the pod's loopback.
func (n *ns) listenLocal(t *testing.T, handle func(*net.TCPConn)) netip.AddrPort {
	n.t = t
	for port := uint16(7000); ; port++ {
		if !slices.Contains(n.locals, port) {
			n.locals = append(n.locals, port)
			at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
			n.listen(at.String(), handle)
			return at
		}
	}
}

// forget drops what the datapath learned of applications.
func forget(d *Datapath) error {
	m := d.objs.maps[sockmeshMapSmNosplice]
	var keys []appKey
	var k appKey
	var v uint64
	it := m.Iterate()
	for it.Next(&k, &v) {
		keys = append(keys, k)
	}
	for _, k := range keys {
		if err := m.Delete(k); err != nil {
			return err
		}
	}
	return it.Err()
}
