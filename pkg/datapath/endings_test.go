package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// How connections end, redirected on both legs and, as the oracle, on plain TCP without a proxy: the application must
// not be able to tell the difference.

// ending is what a client saw.
type ending struct {
	data string
	err  string
}

func saw(data []byte, err error) ending {
	e := ending{data: string(data)}
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		e.err = errno.Error()
	case err != nil:
		e.err = err.Error()
	}
	return e
}

// endingCase is one way in which a connection ends: what its server does, and what its client does and sees.
type endingCase struct {
	name   string
	server func(c *net.TCPConn)
	client func(c *net.TCPConn) ending
}

func endings() []endingCase {
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<14) // 256 KiB
	return []endingCase{
		{"server speaks first, client only listens",
			func(c *net.TCPConn) { io.WriteString(c, "hello"); c.Close() },
			func(c *net.TCPConn) ending { return saw(io.ReadAll(c)) }},
		{"write then close",
			func(c *net.TCPConn) { c.Write(big); c.Close() },
			func(c *net.TCPConn) ending { return saw(io.ReadAll(c)) }},
		{"half-close, answer after the end",
			func(c *net.TCPConn) {
				got, _ := io.ReadAll(onlyReader{c})
				c.Write(bytes.ToUpper(got))
				c.Close()
			},
			func(c *net.TCPConn) ending {
				c.Write(big)
				c.CloseWrite()
				return saw(io.ReadAll(c))
			}},
		{"half-close without a byte",
			func(c *net.TCPConn) { io.ReadAll(onlyReader{c}); io.WriteString(c, "bye"); c.Close() },
			func(c *net.TCPConn) ending { c.CloseWrite(); return saw(io.ReadAll(c)) }},
		{"server closes without a byte",
			func(c *net.TCPConn) { c.Close() },
			func(c *net.TCPConn) ending { return saw(io.ReadAll(c)) }},
		{"server half-closes first, client goes on",
			func(c *net.TCPConn) {
				io.WriteString(c, "done")
				c.CloseWrite()
				got, _ := io.ReadAll(onlyReader{c})
				if len(got) != 7 {
					c.SetLinger(0)
				}
				c.Close()
			},
			func(c *net.TCPConn) ending {
				got, err := io.ReadAll(c)
				if err == nil {
					_, err = c.Write([]byte("and on!"))
				}
				return saw(got, err)
			}},
		{"server resets",
			func(c *net.TCPConn) {
				io.ReadFull(c, make([]byte, 1))
				c.SetLinger(0)
				c.Close()
			},
			func(c *net.TCPConn) ending { c.Write([]byte("x")); return saw(io.ReadAll(c)) }},
		{"slow reader of many bytes",
			func(c *net.TCPConn) { c.Write(big); c.Write(big); c.Close() },
			func(c *net.TCPConn) ending {
				var got []byte
				b := make([]byte, 5000)
				for i := 0; ; i++ {
					if i%10 == 0 {
						time.Sleep(time.Millisecond)
					}
					n, err := c.Read(b)
					got = append(got, b[:n]...)
					if err == io.EOF {
						return saw(got, nil)
					} else if err != nil {
						return saw(got, err)
					}
				}
			}},
	}
}

func TestEndingsLookLikePlainTCP(t *testing.T) {
	m := newMeshed(t)
	var handle func(c *net.TCPConn)
	m.server.serve(8080, func(c *net.TCPConn) { handle(c) }) // through the proxy
	m.server.serve(8081, func(c *net.TCPConn) { handle(c) }) // plain
	for _, tc := range endings() {
		t.Run(strings.ReplaceAll(tc.name, " ", "_"), func(t *testing.T) {
			handle = tc.server
			families(t, func(t *testing.T, fam family) {
				run := func(port uint16) ending {
					c, err := fam.dial(m.client, ap(fam.of(m.server), port))
					must(t, err)
					defer c.Close()
					return tc.client(c)
				}
				for range 20 {
					if got, want := run(8080), run(8081); got != want {
						t.Fatalf("redirected: %d bytes, %q; plain TCP: %d bytes, %q", len(got.data), got.err, len(want.data), want.err)
					}
				}
			})
		})
	}
	c, err := m.d.Counters()
	must(t, err)
	if c.RedirectedBytes == 0 || c.EnrolFailed != 0 {
		t.Errorf("counters: %+v", c)
	}
}

// A reader that never reads must stop its sender, whatever the size of the messages, and must find every byte in order
// when it reads at last: those that were redirected, and those that TCP took over.
func TestReaderThatNeverReadsStopsItsSender(t *testing.T) {
	m := newMeshed(t, func(c *Config) { c.AcceleratePods, c.BacklogLimit = true, 256<<10 })
	m.d.Reconciler().SetClaims(nil)
	flush(t, m.d)
	read := make(chan struct{})
	result := make(chan [2]int)
	m.server.serve(8080, func(c *net.TCPConn) {
		<-read
		b := make([]byte, 1<<16)
		got, wrong := 0, 0
		for {
			n, err := c.Read(b)
			for i := range n {
				if b[i] != pattern(got+i) {
					wrong++
				}
			}
			got += n
			if err != nil {
				break
			}
		}
		c.Close()
		result <- [2]int{got, wrong}
	})
	few := uint64(0)
	families(t, func(t *testing.T, fam family) {
		sizes := []int{100, 1 << 16}
		if fam.name == "v4" {
			sizes = append(sizes, 1, 5000, 1<<20)
		}
		few += uint64(len(sizes))
		for _, size := range sizes {
			t.Run(fmt.Sprint(size), func(t *testing.T) {
				c, err := fam.dial(m.client, ap(fam.of(m.server), 8080))
				must(t, err)
				defer c.Close()
				sent, messages, chunk := 0, 0, make([]byte, size)
				for sent < 256<<20 {
					for i := range chunk {
						chunk[i] = pattern(sent + i)
					}
					c.SetWriteDeadline(time.Now().Add(time.Second))
					n, err := c.Write(chunk)
					sent += n
					messages++
					if err != nil {
						if !errors.Is(err, os.ErrDeadlineExceeded) {
							t.Error(err)
						}
						break
					}
				}
				t.Logf("the sender got rid of %d bytes in %d messages", sent, messages)
				if sent > 40<<20 { // the limit, one window, and what two TCP buffers hold
					t.Error("nothing stops the sender")
				}
				if s := m.only(t, "pod-client"); s.Sends != "tcp" || !strings.Contains(s.Reason, "left too much unread") {
					t.Errorf("the sender is listed as %+v", s)
				}
				c.CloseWrite()
				read <- struct{}{}
				if got := <-result; got != [2]int{sent, 0} {
					t.Errorf("sent %d bytes; the reader got %d, %d of them wrong", sent, got[0], got[1])
				}
				m.gone(t, c)
			})
		}
	})
	c, err := m.d.Counters()
	must(t, err)
	if c.SlowReader != few {
		t.Errorf("counted %d slow readers, want %d", c.SlowReader, few)
	}
}

// A reader that was slow and has caught up gets its bytes from socket to socket again, again and again, and every byte
// in its place.
func TestAReaderThatHasCaughtUpIsForgiven(t *testing.T) {
	m := newMeshed(t, func(c *Config) { c.AcceleratePods, c.BacklogLimit = true, 256<<10 })
	m.d.Reconciler().SetClaims(nil)
	flush(t, m.d)
	upTo, done := make(chan int), make(chan error)
	m.server.serve(8080, func(c *net.TCPConn) {
		defer c.Close()
		got, b := 0, make([]byte, 1<<16)
		for want := range upTo {
			var err error
			for got < want && err == nil {
				var n int
				n, err = c.Read(b[:min(len(b), want-got)])
				for i := range n {
					if b[i] != pattern(got+i) {
						err = fmt.Errorf("byte %d is another", got+i)
					}
				}
				got += n
			}
			done <- err
		}
	})
	defer close(upTo)
	c, err := m.client.dial(ap(m.server.v4, 8080))
	must(t, err)
	defer c.Close()
	sent, chunk := 0, make([]byte, 1<<14)
	write := func(patience time.Duration) error {
		for i := range chunk {
			chunk[i] = pattern(sent + i)
		}
		c.SetWriteDeadline(time.Now().Add(patience))
		n, err := c.Write(chunk)
		sent += n
		return err
	}
	for round := range 5 {
		for err = nil; err == nil; {
			if err = write(time.Second); sent > 200<<20 {
				t.Fatal("nothing stops the sender")
			}
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		// After a write that was cut short the kernel does not ask the program about the next one (tcp_bpf_send_verdict keeps
		// psock->eval), so the one after that is looked at.
		for range 2 {
			upTo <- sent
			must(t, <-done)
			must(t, write(30*time.Second))
		}
		upTo <- sent
		must(t, <-done)
		before, err := m.d.Counters()
		must(t, err)
		must(t, write(30*time.Second))
		after, err := m.d.Counters()
		must(t, err)
		if got := after.RedirectedBytes - before.RedirectedBytes; got != uint64(len(chunk)) || after.SlowReader != uint64(round+1) {
			t.Errorf("round %d: %d of %d bytes went from socket to socket, and %d slow readers were counted", round, got, len(chunk), after.SlowReader)
		}
	}
	upTo <- sent
	must(t, <-done)
}

func pattern(i int) byte { return byte(uint64(i) * 2654435761 >> 13) }
