package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// OpenInNetns runs open on an OS thread that is inside a network namespace. Sockets made there stay in it for good, and
// work from any thread; so open should make them and return. It must not start goroutines: they run elsewhere.
//
// The thread goes back home afterwards. Should that fail, it is thrown away: a goroutine that ends while locked to
// its thread takes the thread with it, so no other goroutine can ever run in the wrong namespace. The process's first
// thread stays at home at all times: it is what /proc/self shows to others, and it cannot be thrown away.
func OpenInNetns(ns *os.File, open func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			result <- OpenInNetns(ns, open) // While we hold the first thread, another one does it.
			runtime.UnlockOSThread()
			return
		}
		home, err := here("the agent's own")
		if err != nil {
			runtime.UnlockOSThread()
			result <- err
			return
		}
		defer home.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("enter network namespace %s: %w (needs CAP_SYS_ADMIN)", ns.Name(), err)
			return
		}
		err = open()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// here opens the calling thread's network namespace by no file of the runtime's.
func here(name string) (*os.File, error) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open this thread's network namespace: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// spaceID is the identity of a network namespace. While somebody holds the namespace, no other has its number.
type spaceID struct{ dev, ino uint64 }

// errNotNetns: the file is not (yet) a network namespace. Whoever makes one creates the file first and mounts the
// namespace on it afterwards, and inotify tells of the first only.
var errNotNetns = errors.New("not a network namespace")

// openNetns opens a namespace's file and tells which namespace it is.
func openNetns(path string) (*os.File, spaceID, error) {
	// Non-blocking: a FIFO in the folder must not hang the agent.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, spaceID{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	id, err := identify(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, spaceID{}, fmt.Errorf("%s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), id, nil
}

func identify(fd int) (spaceID, error) {
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(fd, &sfs); err != nil {
		return spaceID{}, err
	}
	if sfs.Type != unix.NSFS_MAGIC {
		return spaceID{}, errNotNetns
	}
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		return spaceID{}, errNotNetns
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return spaceID{}, err
	}
	return spaceID{st.Dev, st.Ino}, nil
}

// identifyPath tells what a path leads to, without opening it.
func identifyPath(path string) (spaceID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return spaceID{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return spaceID{st.Dev, st.Ino}, nil
}
