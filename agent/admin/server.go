// Package admin serves the agent's admin API: HTTP and JSON on a Unix socket that only the agent's user can open.
//
// It shows and changes everything, so it is never on an address: a pod has no way to a socket file of the node
// that it doesn't mount, and the peer's user is checked besides. Each answer is made in full before its first byte
// is written, from immutable values, so a slow or stuck client holds no lock and delays nobody.
package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of what clients can cost.
const (
	maxConnections = 64
	maxHeader      = 16 << 10
	maxBody        = 1 << 20
	readTimeout    = 10 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 60 * time.Second
)

// Server is the admin API on its socket.
type Server struct {
	path string
	http *http.Server
	log  *slog.Logger

	serving sync.WaitGroup

	mu sync.Mutex
	ln *guarded // guarded by mu; the socket that was made last
	id fileID   // guarded by mu; its file
}

// fileID tells one socket file from a later one of the same name.
type fileID struct{ dev, ino uint64 }

// Listen serves handler at the socket path until Close. An agent that is already there keeps its connections but
// gets no new ones: the new socket takes the name in one step (rename), so that at an upgrade, when the new agent
// starts beside the old one, there is no moment without an API.
func Listen(path string, handler http.Handler, log *slog.Logger) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("--admin: %w", err)
	}
	s := &Server{path: path, log: log}
	s.http = &http.Server{
		Handler:           http.MaxBytesHandler(handler, maxBody),
		ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout,
		WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return s, s.TakeName()
}

// TakeName makes the path this server's, as Listen does: for an agent whose successor has died with the name in its hands.
func (s *Server) TakeName() error {
	tmp := fmt.Sprintf("%s.%d", s.path, os.Getpid())
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("--admin: %w", err)
	}
	ln, err := listenPrivate(tmp)
	if err != nil {
		return fmt.Errorf("--admin: %w", err)
	}
	id, err := identify(tmp)
	if err == nil {
		err = os.Rename(tmp, s.path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("--admin: %w", err), ln.Close(), os.Remove(tmp))
	}
	g := &guarded{UnixListener: ln, log: s.log, slots: make(chan struct{}, maxConnections), closed: make(chan struct{})}
	s.mu.Lock()
	before := s.ln
	s.ln, s.id = g, id
	s.mu.Unlock()
	s.serving.Go(func() {
		if err := s.http.Serve(g); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.log.Error("the admin API ended", "error", err)
		}
	})
	if before != nil {
		_ = before.Close() // nobody finds it any more
	}
	return nil
}

// listenPrivate makes the socket with mode 0600 from its first moment: the mode is set on the descriptor before
// bind, because between bind and chmod anyone could connect.
func listenPrivate(path string) (*net.UnixListener, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("bind %s: %w", path, err)
	}
	if err := unix.Listen(fd, 128); err != nil {
		return nil, err
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	ul := ln.(*net.UnixListener)
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// Replaced says whether another agent's socket has taken the name.
func (s *Server) Replaced() bool {
	id, err := identify(s.path)
	s.mu.Lock()
	defer s.mu.Unlock()
	return err == nil && id != s.id
}

// Abandoned says whether the name leads to nobody: whoever had taken it has died, or has gone and removed it.
func (s *Server) Abandoned() bool {
	c, err := net.DialTimeout("unix", s.path, time.Second)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT)
}

// Close stops serving, after the requests under way or when ctx ends, and removes the socket unless another
// agent's has taken its place.
func (s *Server) Close(ctx context.Context) error {
	if !s.Replaced() {
		if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("the admin socket could not be removed", "path", s.path, "error", err)
		}
	}
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	s.serving.Wait()
	return err
}

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileID{}, err
	}
	return fileID{st.Dev, st.Ino}, nil
}

// guarded accepts only the agent's own user and root, and only so many at once.
type guarded struct {
	*net.UnixListener
	log    *slog.Logger
	slots  chan struct{}
	once   sync.Once
	closed chan struct{}
}

// Accept implements net.Listener.
func (g *guarded) Accept() (net.Conn, error) {
	for {
		select {
		case g.slots <- struct{}{}:
		case <-g.closed:
			return nil, net.ErrClosed
		}
		c, err := g.UnixListener.AcceptUnix()
		if err != nil {
			<-g.slots
			return nil, err
		}
		if err := allowed(c); err != nil {
			g.log.Warn("admin API: connection refused", "reason", err)
			_ = c.Close()
			<-g.slots
			continue
		}
		return &slotConn{UnixConn: c, free: sync.OnceFunc(func() { <-g.slots })}, nil
	}
}

// Close implements net.Listener.
func (g *guarded) Close() error {
	g.once.Do(func() { close(g.closed) })
	return g.UnixListener.Close()
}

// allowed looks at who connected, in case the file's mode was widened or the file was mounted into a container.
func allowed(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d (pid %d) is neither root nor the agent's user", cred.Uid, cred.Pid)
	}
	return nil
}

// slotConn gives its place back when it is closed.
type slotConn struct {
	*net.UnixConn
	free func()
}

// Close implements net.Conn.
func (c *slotConn) Close() error {
	c.free()
	return c.UnixConn.Close()
}
