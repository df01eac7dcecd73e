package pod

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// space is a network namespace under the folder.
type space struct {
	id     spaceID
	cookie uint64
	names  map[string]bool // its files; usually one
	file   *os.File
	watch  *addrWatch
	addrs  map[netip.Addr]bool // nil: not listed yet
	hadPod string              // UID of the pod that is or was in it
}

// newSpace takes over an opened namespace and starts to watch its addresses. Unless there is an error it closes file: a
// descriptor that was opened by the file's name keeps the mount there busy, and a runtime that unmounts it
// without MNT_DETACH would get EBUSY for as long as the pod is known.
func newSpace(file *os.File, id spaceID) (*space, error) {
	s := &space{id: id, names: map[string]bool{}}
	err := OpenInNetns(file, func() (err error) {
		if s.file, err = here(file.Name()); err != nil {
			return err
		}
		s.watch, s.cookie, err = newAddrWatch()
		return err
	})
	if err != nil {
		if s.file != nil {
			_ = s.file.Close()
		}
		return nil, err
	}
	_ = file.Close()
	return s, nil
}

// close lets go of the namespace.
func (s *space) close() {
	s.watch.close()
	_ = s.file.Close()
}

// name is one of its files' names.
func (s *space) name() string {
	best := ""
	for n := range s.names {
		if best == "" || n < best {
			best = n
		}
	}
	return best
}

// owns counts how many of a pod's addresses are in the namespace.
func (s *space) owns(ips []netip.Addr) int {
	n := 0
	for _, ip := range ips {
		if !ip.IsLoopback() && s.addrs[ip] {
			n++
		}
	}
	return n
}

// dup gives the receiver of a pod its own descriptor of the namespace.
func (s *space) dup() (*os.File, error) {
	fd, err := unix.FcntlInt(s.file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("dup network namespace: %w", err)
	}
	return os.NewFile(uintptr(fd), s.file.Name()), nil
}

// sockets are listeners that were opened by one visit to a namespace.
type sockets struct {
	fds      []int
	has4     bool
	has6     bool
	wait6    bool  // ::1 isn't there but should come
	problem4 error // nil if has4 was wanted and opened
	problem6 error // nil if opened, or absent for good
}

// open opens the listeners that are still missing, unless somebody else has the port.
func (s *space) open(cfg *Config, need4, need6 bool) sockets {
	var got sockets
	port := cfg.OutboundPort
	err := OpenInNetns(s.file, func() error {
		// Before, so that no connection meets a listener of ours that is closed again at once.
		if got.problem4 = cfg.alone(); got.problem4 != nil {
			return nil
		}
		if need4 {
			fd, err := listen(netip.AddrPortFrom(loopback4, port), cfg)
			if err != nil {
				got.problem4 = err
				return nil // Without the first there is no use in the second yet.
			}
			got.fds, got.has4 = append(got.fds, fd), true
		}
		if need6 {
			fd, err := listen(netip.AddrPortFrom(loopback6, port), cfg)
			switch {
			case err == nil:
				got.fds, got.has6 = append(got.fds, fd), true
			case errors.Is(err, errNoLoopback):
				got.wait6 = !ipv6Off()
			default:
				got.problem6 = err
			}
		}
		// And afterwards: from now on the bind hook keeps others away.
		return cfg.alone()
	})
	if err != nil {
		for _, fd := range got.fds {
			closeFD(fd)
		}
		got = sockets{problem4: err}
	}
	return got
}

// shared is the stranger that has come to the proxy's port in the namespace, nil if there is none.
func (s *space) shared(cfg *Config) error {
	return OpenInNetns(s.file, cfg.alone)
}

// alone is an error if somebody else listens on the proxy's port in the calling thread's namespace.
func (c *Config) alone() error {
	found, err := findStranger(c.OutboundPort, c.Owns)
	if err == nil && found != nil {
		found.foreign = c.Foreign
		return found
	}
	return err
}
