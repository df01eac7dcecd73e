package loop

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrNetnsGone is what Dial reports once the network namespace was closed: its pod is gone.
var ErrNetnsGone = errors.New("the pod's network namespace is gone")

// Netns is a network namespace that sockets can be created in. It owns a descriptor of its own, so that a
// loop can never enter what a recycled descriptor number has come to mean. Safe for use by several loops.
type Netns struct {
	key uint64

	mu sync.Mutex // held only while a loop enters the namespace
	fd int        // -1 once closed
}

// NewNetns duplicates f, which stays the caller's. Key identifies the namespace: its cookie.
func NewNetns(f *os.File, key uint64) (*Netns, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("network namespace %d: %w", key, err)
	}
	fd := -1
	cerr := raw.Control(func(p uintptr) {
		fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("network namespace %d: duplicating its descriptor: %w", key, err)
	}
	return &Netns{key: key, fd: fd}, nil
}

// Key is the namespace's cookie.
func (n *Netns) Key() uint64 { return n.key }

// Close makes every later Dial into the namespace fail with ErrNetnsGone. Loops that are inside leave when
// LeaveNetns is called on them or at their next Dial elsewhere.
func (n *Netns) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd >= 0 {
		_ = unix.Close(n.fd)
		n.fd = -1
	}
}

func (n *Netns) enter() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd < 0 {
		return ErrNetnsGone
	}
	if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering the pod's network namespace (needs CAP_SYS_ADMIN): %w", err)
	}
	return nil
}

func (n *Netns) closed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.fd < 0
}

// enterNetns moves the loop's thread into ns (nil: where it was born), if it is not there already.
func (l *Loop) enterNetns(ns *Netns) error {
	if ns == nil {
		ns = l.home
	}
	if ns == l.netns {
		// The thread holds the namespace alive, but the pod that owned it may be gone.
		if ns != l.home && ns.closed() {
			return ErrNetnsGone
		}
		return nil
	}
	if err := ns.enter(); err != nil {
		return err
	}
	l.netns = ns
	l.stats.netnsSwitches++
	return nil
}

// LeaveNetns returns the loop's thread to its own network namespace if it is in ns, so that the thread does
// not keep a deleted pod's namespace alive. Only on the loop's thread.
func (l *Loop) LeaveNetns(ns *Netns) {
	if l.netns == ns && ns != nil {
		if err := l.enterNetns(nil); err != nil {
			l.log.Error("cannot return to the node's network namespace", "error", err)
		}
	}
}

// bearHome remembers the namespace that the thread starts in.
func (l *Loop) bearHome() error {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("opening the node's own network namespace: %w", err)
	}
	defer f.Close()
	l.home, err = NewNetns(f, 0)
	l.netns = l.home
	return err
}
