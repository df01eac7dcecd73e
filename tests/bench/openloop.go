package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An open-loop client: requests are due at fixed times, whatever became of those before, and each one's latency counts from
// the time at which it was *due*. A client that waits for its answers (wrk) sends less while the proxy is slow, so that the
// slow moments are hardly sampled. Request i of rate r is due at start + i/r; it goes out on the connection that has been
// free the longest, or waits until one is. One thread on epoll, which sleeps to the nanosecond until the next is due.

// drainTime is how long answers may take after the last request; what has not come then is an error.
const drainTime = 2 * time.Second

type openLoop struct {
	request  []byte
	period   float64 // nanoseconds between requests
	start    int64   // nanoseconds, as every time here, of the monotonic clock
	due      int     // requests that are to be sent in all
	sent     int
	answered int64
	failed   int64

	epoll int
	conns []*openConn
	free  []*openConn // a ring: oldest first
	seen  latencies
}

// openConn is one connection: at most one request is under way on it.
type openConn struct {
	fd      int
	due     int64 // when the request under way was due
	busy    bool
	buf     []byte
	pending int // bytes of body that are still to come
	head    bool
}

func openLoopClient(args []string) error {
	runtime.LockOSThread()
	flags := flag.NewFlagSet("open-loop", flag.ContinueOnError)
	addr := flags.String("addr", "", "where to connect")
	path := flags.String("path", "/", "what to get")
	connections := flags.Int("c", 64, "connections")
	rate := flags.Float64("rate", 1000, "requests per second")
	duration := flags.Duration("d", time.Second, "how long")
	if err := flags.Parse(args); err != nil {
		return err
	}
	server, err := netip.ParseAddrPort(*addr)
	if err != nil {
		return err
	}
	// Sleeps otherwise end up to 50 us late, for the sake of batteries.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return err
	}
	o := &openLoop{
		request: []byte("GET " + *path + " HTTP/1.1\r\nHost: " + *addr + "\r\n\r\n"),
		period:  1e9 / *rate, due: int(*rate * duration.Seconds()),
	}
	if o.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	for range *connections {
		if err := o.connect(server); err != nil {
			return err
		}
	}
	if err := o.run(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(clientReport{
		Requests: o.answered, Us: duration.Microseconds(), Errors: o.failed,
		P50: o.seen.percentile(50), P99: o.seen.percentile(99), P999: o.seen.percentile(99.9),
	})
}

// connect makes one connection and sends a request on it, outside of the measurement: the proxy's own connection to the
// server is there when it begins.
func (o *openLoop) connect(server netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, sockaddr(server)); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	if err := unix.EpollCtl(o.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(len(o.conns))}); err != nil {
		return err
	}
	c := &openConn{fd: fd, buf: make([]byte, 0, 64<<10)}
	o.conns = append(o.conns, c)
	o.send(c, 0)
	for c.busy {
		if err := o.wait(int64(5 * time.Second)); err != nil {
			return err
		}
	}
	if o.failed > 0 {
		return errors.New("the first request on a connection failed")
	}
	return nil
}

func (o *openLoop) run() error {
	o.answered, o.seen = 0, latencies{}
	o.start = monotonic()
	for o.sent < o.due {
		now := monotonic()
		for o.sent < o.due && len(o.free) > 0 && o.dueAt(o.sent) <= now {
			c := o.free[0]
			o.free = o.free[:copy(o.free, o.free[1:])]
			o.send(c, o.dueAt(o.sent))
			o.sent++
		}
		if o.sent == o.due {
			break
		}
		sleep := o.dueAt(o.sent) - monotonic()
		if len(o.free) == 0 { // everything is under way: only an answer gets us on
			sleep = int64(drainTime)
		}
		if err := o.wait(max(0, sleep)); err != nil {
			return err
		}
		if len(o.free) == 0 && monotonic()-o.dueAt(o.sent) > int64(drainTime) {
			break // nothing is answered any more
		}
	}
	for end := monotonic() + int64(drainTime); o.underWay() && monotonic() < end; {
		if err := o.wait(int64(100 * time.Millisecond)); err != nil {
			return err
		}
	}
	o.failed += int64(o.due) - o.answered - o.failed
	return nil
}

func (o *openLoop) dueAt(i int) int64 { return o.start + int64(float64(i)*o.period) }

func (o *openLoop) underWay() bool {
	for _, c := range o.conns {
		if c.busy {
			return true
		}
	}
	return false
}

func (o *openLoop) send(c *openConn, due int64) {
	c.busy, c.head, c.due, c.buf = true, true, due, c.buf[:0]
	if n, err := unix.Write(c.fd, o.request); err != nil || n != len(o.request) {
		o.lose(c)
	}
}

// lose gives a connection up, and with it the request that is under way.
func (o *openLoop) lose(c *openConn) {
	if c.busy {
		o.failed++
	}
	c.busy = false
	unix.Close(c.fd)
	c.fd = -1
}

// wait sleeps for at most ns and takes in what came meanwhile. The call is raw: nothing else runs in this program, and the Go
// scheduler must not give the thread's place away and take it back around each of them.
func (o *openLoop) wait(ns int64) error {
	var events [64]unix.EpollEvent
	timeout := unix.NsecToTimespec(ns)
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(o.epoll), uintptr(unsafe.Pointer(&events)), uintptr(len(events)), uintptr(unsafe.Pointer(&timeout)), 0, 0)
	if errno != 0 && errno != unix.EINTR {
		return fmt.Errorf("epoll_pwait2: %w", errno)
	}
	if errno == unix.EINTR {
		return nil
	}
	for _, e := range events[:n] {
		o.receive(o.conns[e.Fd])
	}
	return nil
}

func (o *openLoop) receive(c *openConn) {
	if c.fd < 0 {
		return
	}
	room := c.buf[len(c.buf):cap(c.buf)]
	n, err := unix.Read(c.fd, room)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return
	}
	if err != nil || n <= 0 || !c.busy {
		o.lose(c)
		return
	}
	if !c.head {
		c.pending -= n
	} else {
		c.buf = c.buf[:len(c.buf)+n]
		end := bytes.Index(c.buf, []byte("\r\n\r\n"))
		if end < 0 {
			return
		}
		length, ok := bodyLength(c.buf[:end+2])
		if !ok {
			o.lose(c)
			return
		}
		c.head, c.pending = false, length-(len(c.buf)-end-4)
		c.buf = c.buf[:0]
	}
	if c.pending > 0 {
		return
	}
	if c.pending < 0 {
		o.lose(c)
		return
	}
	o.answered++
	o.seen.count(time.Duration(monotonic() - c.due))
	c.busy = false
	o.free = append(o.free, c)
}

// bodyLength is the Content-Length of a 200. Anything else is not what these servers answer.
func bodyLength(head []byte) (int, bool) {
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
		return 0, false
	}
	const name = "\r\ncontent-length:"
	for i := range head {
		if head[i] != '\r' || len(head)-i < len(name) || !strings.EqualFold(string(head[i:i+len(name)]), name) {
			continue
		}
		value, _, _ := bytes.Cut(head[i+len(name):], []byte("\r\n"))
		n, err := strconv.Atoi(string(bytes.TrimSpace(value)))
		return n, err == nil
	}
	return 0, false
}

// monotonic is the kernel's clock, by the vDSO.
func monotonic() int64 { return int64(time.Since(epoch)) }

var epoch = time.Now()
