package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"
)

// tcpPort is where the TCP server listens in the server pod.
const tcpPort = 9000

// programs are what this executable is inside the pods: wrk and nginx are not made for plain TCP.
var programs = map[string]func([]string) error{
	"tcp-server": tcpServer, "tcp-client": tcpClient, "floor": floor, "open-loop": openLoopClient, "idle-client": idleClient,
	"connect-server": connectServer, "connect-client": connectClient,
}

// tcpServer echoes to clients whose first byte is 'e', and only reads from the others.
func tcpServer([]string) error {
	runtime.GOMAXPROCS(1)
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", fmt.Sprintf(":%d", tcpPort))
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 64<<10)
			for echo, first := false, true; ; first = false {
				n, err := c.Read(buf)
				if first && n > 0 {
					echo = buf[0] == 'e'
				}
				if echo && n > 0 {
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
				if err != nil {
					return
				}
			}
		}()
	}
}

// tcpClient writes messages on several connections for a while and reports as wrk's script does.
func tcpClient(args []string) error {
	runtime.GOMAXPROCS(1)
	flags := flag.NewFlagSet("tcp-client", flag.ContinueOnError)
	addr := flags.String("addr", "", "where to connect")
	connections := flags.Int("c", 64, "connections")
	size := flags.Int("size", 64, "bytes of a message")
	bulk := flags.Bool("bulk", false, "write only")
	duration := flags.Duration("d", time.Second, "how long")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex // guards what follows
		report clientReport
		all    latencies
	)
	start := time.Now()
	for range *connections {
		wg.Go(func() {
			mine := latencies{}
			done, err := converse(*addr, *size, *bulk, start.Add(*duration), &mine)
			mu.Lock()
			defer mu.Unlock()
			report.Requests += done
			all.add(&mine)
			if err != nil {
				report.Errors++
				fmt.Fprintln(os.Stderr, err)
			}
		})
	}
	wg.Wait()
	report.Us = time.Since(start).Microseconds()
	report.P50, report.P99, report.P999 = all.percentile(50), all.percentile(99), all.percentile(99.9)
	return json.NewEncoder(os.Stdout).Encode(report)
}

// converse is one connection's life: messages written, and read back unless bulk.
func converse(addr string, size int, bulk bool, until time.Time, seen *latencies) (done int64, err error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(until.Add(10 * time.Second)); err != nil {
		return 0, err
	}
	message := make([]byte, size)
	message[0] = 'e'
	if bulk {
		message[0] = 'b'
	}
	back := make([]byte, size)
	for now := time.Now(); now.Before(until); done++ {
		if _, err := c.Write(message); err != nil {
			return done, err
		}
		if !bulk {
			if _, err := io.ReadFull(c, back); err != nil {
				return done, err
			}
		}
		then := time.Now()
		seen.count(then.Sub(now))
		now = then
	}
	return done, nil
}

// latencies is a histogram with a bucket per microsecond up to 20 ms, and coarser ones of a millisecond to 2 s.
type latencies struct {
	fine, coarse [20000 + 1]uint32
	total        uint64
}

func (l *latencies) count(d time.Duration) {
	us := d.Microseconds()
	l.total++
	if us < 20000 {
		l.fine[us]++
	} else {
		l.coarse[min(us/1000, 2000)]++
	}
}

func (l *latencies) add(m *latencies) {
	for i := range m.fine {
		l.fine[i] += m.fine[i]
		l.coarse[i] += m.coarse[i]
	}
	l.total += m.total
}

func (l *latencies) percentile(p float64) float64 {
	left := int64(float64(l.total) * p / 100)
	for us, n := range l.fine {
		if left -= int64(n); left < 0 {
			return float64(us)
		}
	}
	for ms, n := range l.coarse {
		if left -= int64(n); left < 0 {
			return float64(ms * 1000)
		}
	}
	return 0
}

func (w *world) tcpLoad(ctx context.Context, s scenario, set setup, connections int, d time.Duration) (sample, error) {
	self, err := os.Executable()
	if err != nil {
		return sample{}, err
	}
	args := []string{self, "tcp-client", "-addr", set.target.String(), "-c", strconv.Itoa(connections), "-size", strconv.Itoa(s.size), "-d", d.String()}
	if s.bulk {
		args = append(args, "-bulk")
	}
	result, err := w.run(ctx, args)
	if err == nil && result.requests == 0 {
		err = errors.New("not one message came through")
	}
	return result, err
}
