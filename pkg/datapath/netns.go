package datapath

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The node's own network namespace is where its devices are. An agent runs in it; one of a test may be told another.

const ownNetns = "/proc/thread-self/ns/net"

// openNetns holds on to a network namespace; the calling thread's if path is empty.
func openNetns(path string) (*os.File, error) {
	if path == "" {
		path = ownNetns
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("hold on to the node's network namespace: %w", err)
	}
	return f, nil
}

// enterNetns moves the calling thread, unless it is there. Moving takes CAP_SYS_ADMIN.
func enterNetns(ns *os.File) error {
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat(ownNetns, &here), unix.Fstat(int(ns.Fd()), &there)); err != nil {
		return fmt.Errorf("look at the node's network namespace: %w", err)
	}
	if here.Ino == there.Ino && here.Dev == there.Dev {
		return nil
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the node's network namespace: %w", err)
	}
	return nil
}

// inNetns runs f on a thread that is in a network namespace.
func inNetns(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := enterNetns(ns)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// netnsCookie names a network namespace as the programs do.
func netnsCookie(path string) (cookie uint64, err error) {
	ns, err := openNetns(path)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	err = inNetns(ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("ask for the node's network namespace's cookie: %w (kernels from 5.14 on have it)", err)
	}
	return cookie, nil
}
