package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What a connection costs: a client that connects, sends 64 bytes, reads 64 and sees the server close, over and over, with a
// fixed number of connections under way. Both ends are one thread on epoll, so that as much as possible of the time is
// the kernel's. The server closes first, as HTTP servers do that close: so the client's ports are free again at once.

const exchange = 64

// connectServer answers on a port.
func connectServer(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: bench connect-server ADDR:PORT")
	}
	runtime.GOMAXPROCS(1)
	addr, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.SetsockoptInt(listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(listener, sockaddr(addr)), unix.Listen(listener, 4096)); err != nil {
		return err
	}
	loop, err := newLoop()
	if err != nil {
		return err
	}
	if err := loop.watch(unix.EPOLL_CTL_ADD, listener, unix.EPOLLIN); err != nil {
		return err
	}
	buf := make([]byte, exchange)
	for {
		if err := loop.wait(-1, func(fd int, _ uint32) {
			if fd != listener {
				// The request is one segment. Reading less would be another program's doing, and is the client's error.
				if n, err := unix.Read(fd, buf); err == nil && n > 0 {
					_, _ = unix.Write(fd, buf[:n])
				}
				unix.Close(fd)
				return
			}
			for {
				c, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
				if err != nil {
					return
				}
				if loop.watch(unix.EPOLL_CTL_ADD, c, unix.EPOLLIN|unix.EPOLLRDHUP) != nil {
					unix.Close(c)
				}
			}
		}); err != nil {
			return err
		}
	}
}

// connectLoop is an epoll instance.
type connectLoop struct {
	fd     int
	events []unix.EpollEvent
}

func newLoop() (*connectLoop, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return &connectLoop{fd, make([]unix.EpollEvent, 256)}, err
}

func (l *connectLoop) watch(op, fd int, events uint32) error {
	return unix.EpollCtl(l.fd, op, fd, &unix.EpollEvent{Fd: int32(fd), Events: events})
}

func (l *connectLoop) wait(ms int, each func(fd int, events uint32)) error {
	n, err := unix.EpollWait(l.fd, l.events, ms)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("epoll_wait: %w", err)
	}
	for _, e := range l.events[:max(n, 0)] {
		each(int(e.Fd), e.Events)
	}
	return nil
}

// patience is after how long an exchange counts as failed. A lost SYN is sent again after a second.
const patience = 5 * time.Second

// connectClient connects to the addresses of a file in random order, until a time or SIGTERM.
func connectClient(args []string) error {
	runtime.GOMAXPROCS(1)
	flags := flag.NewFlagSet("connect-client", flag.ContinueOnError)
	n := flags.Int("c", 16, "connections under way")
	duration := flags.Duration("d", time.Hour, "how long")
	once := flags.Bool("once", false, "go to each address once, and end when all have answered or failed")
	targets := flags.String("targets", "", "file of addresses, one a line")
	if err := flags.Parse(args); err != nil {
		return err
	}
	c := &connecting{all: map[int]*attempt{}}
	var err error
	if c.targets, err = readTargets(*targets); err != nil {
		return err
	}
	if c.loop, err = newLoop(); err != nil {
		return err
	}
	var stop atomic.Bool
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	go func() { <-term; stop.Store(true) }()
	start := time.Now()
	c.left = -1
	if *once {
		c.left = len(c.targets)
	}
	for range *n {
		c.connect()
	}
	for time.Since(start) < *duration && !stop.Load() && len(c.all)+c.broken > 0 {
		if err := c.loop.wait(50, c.event); err != nil {
			return err
		}
		c.reap()
		for again := c.broken; again > 0; again-- {
			c.broken--
			c.connect()
		}
	}
	c.report.Us = time.Since(start).Microseconds()
	c.report.P50, c.report.P99, c.report.P999 = c.seen.percentile(50), c.seen.percentile(99), c.seen.percentile(99.9)
	return json.NewEncoder(os.Stdout).Encode(c.report)
}

func readTargets(file string) ([]unix.Sockaddr, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []unix.Sockaddr
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		a, err := netip.ParseAddrPort(lines.Text())
		if err != nil {
			return nil, err
		}
		all = append(all, sockaddr(a))
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s names no address", file)
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all, lines.Err()
}

// connecting is the client's state.
type connecting struct {
	loop    *connectLoop
	targets []unix.Sockaddr
	next    int
	left    int // connections still to make; negative: no end
	all     map[int]*attempt
	report  clientReport
	seen    latencies
	reaped  time.Time
	broken  int // connections to be made again after a failure
}

// attempt is one connection.
type attempt struct {
	began time.Time
	sent  bool
	got   int
}

var request = make([]byte, exchange)

func (c *connecting) connect() {
	if c.left == 0 {
		return
	}
	c.left--
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		c.failed("socket", err)
		c.broken++
		return
	}
	a := &attempt{began: time.Now()}
	c.all[fd] = a
	c.next++
	if err := unix.Connect(fd, c.targets[c.next%len(c.targets)]); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		c.end(fd, "connect", err)
		return
	}
	if err := c.loop.watch(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLET); err != nil {
		c.end(fd, "epoll", err)
	}
}

// maxSaid is how many failures are named.
const maxSaid = 20

func (c *connecting) failed(what string, err error) {
	c.report.Errors++
	if c.report.Errors <= maxSaid {
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", time.Now().Format(time.StampMicro), what, err)
	}
}

// end closes a connection and opens the next one: at once, or after a failure when the next events have come, so that a
// target that refuses is not hammered.
func (c *connecting) end(fd int, what string, err error) {
	a := c.all[fd]
	delete(c.all, fd)
	unix.Close(fd)
	if err != nil {
		c.failed(what, err)
		c.broken++
		return
	}
	c.report.Requests++
	c.seen.count(time.Since(a.began))
	c.connect()
}

var errShort = errors.New("closed before the answer was whole")

func (c *connecting) event(fd int, events uint32) {
	a := c.all[fd]
	if a == nil {
		return
	}
	if !a.sent && events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
			c.end(fd, "connect", errors.Join(err, unix.Errno(code)))
			return
		}
		if _, err := unix.Write(fd, request); err != nil {
			c.end(fd, "write", err)
			return
		}
		a.sent = true
	}
	var buf [exchange]byte
	for events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		n, err := unix.Read(fd, buf[:])
		switch {
		case errors.Is(err, unix.EAGAIN):
			return
		case err != nil:
			c.end(fd, "read", err)
			return
		case n == 0 && a.got < exchange:
			c.end(fd, "read", errShort)
			return
		case n == 0:
			c.end(fd, "", nil)
			return
		}
		a.got += n
	}
}

// reap fails what takes too long.
func (c *connecting) reap() {
	now := time.Now()
	if now.Sub(c.reaped) < time.Second/2 {
		return
	}
	c.reaped = now
	for fd, a := range c.all {
		if now.Sub(a.began) > patience {
			c.end(fd, "exchange", fmt.Errorf("not done after %s", patience))
		}
	}
}
