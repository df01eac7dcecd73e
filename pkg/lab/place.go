package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Place is where a process can run: a network namespace and a cgroup. The node is one, and every pod.
type Place struct {
	// Name is "node" or namespace/name.
	Name string
	// NetnsPath is the bind mount of the network namespace: `nsenter --net=PATH` enters it.
	NetnsPath string
	// Cgroup is the directory of the place's own cgroup.
	Cgroup string

	lab   *Lab
	netns *os.File
}

func (l *Lab) newPlace(name, netnsPath string) (*Place, error) {
	p := &Place{Name: name, NetnsPath: netnsPath, Cgroup: filepath.Join(l.Cgroup, flat(name)), lab: l}
	if err := os.Mkdir(p.Cgroup, 0o755); err != nil {
		return nil, fmt.Errorf("make the cgroup of %s: %w", name, err)
	}
	if err := createNetns(netnsPath); err != nil {
		return nil, fmt.Errorf("make the network namespace of %s: %w", name, err)
	}
	var err error
	if p.netns, err = os.Open(netnsPath); err != nil {
		return nil, err
	}
	return p, nil
}

// Do runs fn on a thread that is inside the place's network namespace: sockets that it opens belong there. They are
// not in the place's cgroup, so the hooks do not see them: use Start for what the hooks should see.
func (p *Place) Do(fn func() error) error { return inNetns(p.netns, fn) }

// Dial connects from inside the namespace, unseen by the hooks.
func (p *Place) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := p.Do(func() error {
		var d net.Dialer
		var err error
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// InNetns runs fn on a thread that is inside the network namespace at path, such as /proc/PID/ns/net: for clients that are no
// part of the lab.
func InNetns(path string, fn func() error) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return inNetns(ns, fn)
}

// createNetns makes a network namespace that lives as long as it is mounted at path.
func createNetns(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	self, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return err
	}
	defer self.Close()
	// inNetns brings the thread back to where it was, whatever fn did to it.
	return inNetns(self, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
	})
}

// inNetns runs fn on an OS thread of its own that is inside ns. A thread that cannot come back is given up.
func inNetns(ns *os.File, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := visit(ns, fn)
		if back {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// visit runs fn with the calling thread, which is locked, inside ns, and tells whether it has come back.
func visit(ns *os.File, fn func() error) (back bool, err error) {
	home, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		return true, err
	}
	defer home.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return true, fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)
	}
	err = fn()
	return unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil, err
}

// Cookie is the kernel's own number of the network namespace, by which BPF programs know it.
func (p *Place) Cookie() (uint64, error) {
	var cookie uint64
	err := p.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	return cookie, err
}
