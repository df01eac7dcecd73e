package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// destroy aborts the TCP connection of this process's socket with the cookie: the other end is reset, and both read an
// error. false: this process has no such socket.
func destroy(cookie uint64, key tupleKey) (bool, error) {
	fd, err := findSocket(cookie)
	if fd < 0 {
		return false, err
	}
	defer unix.Close(fd)
	netns, err := netnsOfSocket(fd)
	if err != nil {
		return false, err
	}
	defer netns.Close()
	if err := inNetns(netns, func() error { return sockDestroy(unix.IPPROTO_TCP, cookie, key) }); err != nil {
		return false, err
	}
	return true, nil
}

// netnsOfSocket opens a socket's network namespace.
func netnsOfSocket(fd int) (*os.File, error) {
	netns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return nil, fmt.Errorf("open the network namespace of a socket: %w", err)
	}
	return os.NewFile(uintptr(netns), "netns"), nil
}

// netnsOfDescriptor opens the network namespace of another process's socket.
func netnsOfDescriptor(pid, fd int) (*os.File, error) {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(process)
	socket, err := unix.PidfdGetfd(process, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("get a socket of process %d: %w (this takes CAP_SYS_PTRACE)", pid, err)
	}
	defer unix.Close(socket)
	return netnsOfSocket(socket)
}

// runIter reads an iterator to its end, for what its program does on the way.
func runIter(prog *ebpf.Program) error {
	it, err := link.AttachIter(link.IterOptions{Program: prog})
	if err != nil {
		return fmt.Errorf("attach the iterator that ends sockets: %w", err)
	}
	defer it.Close()
	r, err := it.Open()
	if err != nil {
		return fmt.Errorf("open the iterator that ends sockets: %w", err)
	}
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read the iterator that ends sockets: %w", err)
	}
	return nil
}

// findSocket returns a descriptor of our own for the socket with the cookie: the number found may be closed and mean
// something else at any moment. -1: there is none.
func findSocket(cookie uint64) (int, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1, err
	}
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil || !hasCookie(n, cookie) {
			continue
		}
		fd, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			continue
		}
		if hasCookie(fd, cookie) {
			return fd, nil
		}
		unix.Close(fd)
	}
	return -1, nil
}

func hasCookie(fd int, cookie uint64) bool {
	got, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	return err == nil && got == cookie
}

// sockDestroy asks sock_diag of the thread's network namespace (CONFIG_INET_DIAG_DESTROY, CAP_NET_ADMIN). As AF_INET6
// it finds IPv4 sockets too, by their mapped addresses.
func sockDestroy(protocol uint8, cookie uint64, key tupleKey) error {
	const sockDestroy, size = 21, unix.SizeofNlMsghdr + 56
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return fmt.Errorf("open sock_diag: %w", err)
	}
	defer unix.Close(s)
	msg := make([]byte, 0, size)
	native, net := binary.NativeEndian, binary.BigEndian
	msg = native.AppendUint32(msg, size)
	msg = native.AppendUint16(msg, sockDestroy)
	msg = native.AppendUint16(msg, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	msg = append(msg, make([]byte, 8)...)            // sequence, port
	msg = append(msg, unix.AF_INET6, protocol, 0, 0) // struct inet_diag_req_v2
	msg = native.AppendUint32(msg, ^uint32(0))       // states
	msg = net.AppendUint16(net.AppendUint16(msg, key.LocalPort), key.RemotePort)
	msg = append(append(msg, key.Local[:]...), key.Remote[:]...)
	msg = native.AppendUint32(msg, 0) // interface
	msg = native.AppendUint32(msg, uint32(cookie))
	msg = native.AppendUint32(msg, uint32(cookie>>32))
	if err := unix.Sendto(s, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask sock_diag to destroy a socket: %w", err)
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(s, answer, 0)
	if err != nil {
		return fmt.Errorf("read sock_diag's answer: %w", err)
	}
	if n < unix.SizeofNlMsghdr+4 || native.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("sock_diag's answer is not one")
	}
	if errno := -int32(native.Uint32(answer[unix.SizeofNlMsghdr:])); errno != 0 && unix.Errno(errno) != unix.ENOENT {
		return fmt.Errorf("sock_diag: destroy a socket: %w (the kernel needs CONFIG_INET_DIAG_DESTROY)", unix.Errno(errno))
	}
	return nil
}
