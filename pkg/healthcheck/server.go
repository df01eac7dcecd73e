package healthcheck

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxConnections is for each listening socket. Load balancers ask from a handful of addresses; who needs more is none.
const maxConnections = 64

// newServer bounds what a client may cost.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 3 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: 30 * time.Second,
		MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// listen opens a socket that another agent, started beside this one at an upgrade, can open too (SO_REUSEPORT), and that
// needs no device to have its address yet (IP_FREEBIND): a node's address may come after the agent. Whoever else listens
// there makes it fail.
func listen(addr string) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		var err error
		e := c.Control(func(fd uintptr) {
			if err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
				return
			}
			level, option := unix.SOL_IP, unix.IP_FREEBIND
			if network == "tcp6" {
				level, option = unix.SOL_IPV6, unix.IPV6_FREEBIND
			}
			err = unix.SetsockoptInt(int(fd), level, option, 1)
		})
		if e != nil {
			return e
		}
		return err
	}}
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp", addr)
}

// limited closes connections beyond maxConnections at once.
type limited struct {
	net.Listener
	open *atomic.Int32
}

func limit(l net.Listener) net.Listener { return limited{l, new(atomic.Int32)} }

// Accept implements net.Listener.
func (l limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= maxConnections {
			return &countedConn{Conn: c, open: l.open}, nil
		}
		l.open.Add(-1)
		_ = c.Close()
	}
}

type countedConn struct {
	net.Conn
	open   *atomic.Int32
	closed atomic.Bool
}

// Close implements net.Conn.
func (c *countedConn) Close() error {
	if !c.closed.Swap(true) {
		c.open.Add(-1)
	}
	return c.Conn.Close()
}
