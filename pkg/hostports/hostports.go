// Package hostports knows which ports the host's own sockets hold: TCP sockets that listen and UDP sockets that are bound.
//
// A node port (or an external IP that is the node's own) can be the address of such a socket. The Service wins, as it
// does with kube-proxy, whose rules come before sockets; but the process then waits for clients that never come, so
// somebody should be told. kube-proxy used to hold node ports with sockets of its own to find that out; asking the kernel
// (sock_diag) costs nothing and finds sockets that were there first or came later.
package hostports

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// Socket is one socket of the calling thread's network namespace.
type Socket struct {
	Protocol service.Protocol
	// Addr is unspecified for all addresses of its family, or of both where Dual is set.
	Addr  netip.AddrPort
	Dual  bool
	Inode uint32
}

// Holds tells whether clients of an address would reach the socket if no Service had it.
func (s Socket) Holds(addr netip.AddrPort, protocol service.Protocol) bool {
	if s.Protocol != protocol || s.Addr.Port() != addr.Port() {
		return false
	}
	if s.Addr.Addr().IsUnspecified() {
		return s.Dual || s.Addr.Addr().Is4() == addr.Addr().Is4()
	}
	return s.Addr.Addr() == addr.Addr()
}

// Sizes and names of linux/inet_diag.h and linux/sock_diag.h.
const (
	sockDiagByFamily = 20
	diagRequestSize  = 56 // struct inet_diag_req_v2
	diagMessageSize  = 72 // struct inet_diag_msg
	attrV6Only       = 11 // INET_DIAG_SKV6ONLY
	stateListen      = 10
	stateClose       = 7 // of a UDP socket: bound and not connected
)

// List gives the sockets of the calling thread's network namespace.
func List() ([]Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	var out []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		for _, what := range []struct {
			protocol service.Protocol
			state    uint32
		}{{service.TCP, stateListen}, {service.UDP, stateClose}} {
			if err := ask(fd, family, uint8(what.protocol), 1<<what.state); err != nil {
				return nil, err
			}
			list, err := answer(fd, what.protocol)
			if err != nil {
				return nil, fmt.Errorf("list the host's %s sockets: %w", what.protocol, err)
			}
			out = append(out, list...)
		}
	}
	return out, nil
}

func ask(fd int, family, protocol uint8, states uint32) error {
	request := make([]byte, unix.SizeofNlMsghdr+diagRequestSize)
	binary.NativeEndian.PutUint32(request[0:], uint32(len(request)))
	binary.NativeEndian.PutUint16(request[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := request[unix.SizeofNlMsghdr:]
	body[0], body[1] = family, protocol
	binary.NativeEndian.PutUint32(body[4:], states)
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask sock_diag: %w", err)
	}
	return nil
}

// answer reads messages until the kernel says that it is done.
func answer(fd int, protocol service.Protocol) ([]Socket, error) {
	var out []Socket
	buffer := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for rest := buffer[:n]; len(rest) >= unix.SizeofNlMsghdr; {
			length := int(binary.NativeEndian.Uint32(rest))
			if length < unix.SizeofNlMsghdr || length > len(rest) {
				return nil, errors.New("a message of sock_diag is cut off")
			}
			body := rest[unix.SizeofNlMsghdr:length]
			switch binary.NativeEndian.Uint16(rest[4:]) {
			case unix.NLMSG_DONE:
				return out, nil
			case unix.NLMSG_ERROR:
				if len(body) < 4 {
					return nil, errors.New("an error of sock_diag is cut off")
				}
				return nil, unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
			case sockDiagByFamily:
				if s, ok := parse(body, protocol); ok {
					out = append(out, s)
				}
			}
			rest = rest[min(len(rest), (length+3)&^3):]
		}
	}
}

// parse reads a struct inet_diag_msg and the attributes behind it.
func parse(b []byte, protocol service.Protocol) (Socket, bool) {
	if len(b) < diagMessageSize {
		return Socket{}, false
	}
	port := binary.BigEndian.Uint16(b[4:])
	s := Socket{Protocol: protocol, Inode: binary.NativeEndian.Uint32(b[68:])}
	if b[0] == unix.AF_INET {
		s.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[8:12])), port)
		return s, port != 0
	}
	ip := netip.AddrFrom16([16]byte(b[8:24]))
	s.Dual = ip.IsUnspecified()
	for rest := b[diagMessageSize:]; len(rest) >= 4; {
		length := int(binary.NativeEndian.Uint16(rest))
		if length < 4 || length > len(rest) {
			break
		}
		if binary.NativeEndian.Uint16(rest[2:]) == attrV6Only && length > 4 && rest[4] != 0 {
			s.Dual = false
		}
		rest = rest[min(len(rest), (length+3)&^3):]
	}
	s.Addr = netip.AddrPortFrom(ip.Unmap(), port)
	return s, port != 0
}

// Owners names the processes that have sockets, by inode: "nginx (pid 812)". It looks through the descriptors of all
// processes that /proc shows, so it is for the moment when there is something to tell. A socket of a process that the
// agent can't see is not named.
func Owners(inodes ...uint32) map[uint32]string {
	out := map[uint32]string{}
	wanted := map[string]uint32{}
	for _, n := range inodes {
		wanted[fmt.Sprintf("socket:[%d]", n)] = n
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	slices.SortFunc(processes, func(a, b string) int { return pid(a) - pid(b) }) // of a forked server the parent
	for _, dir := range processes {
		descriptors, _ := os.ReadDir(filepath.Join(dir, "fd"))
		for _, d := range descriptors {
			target, err := os.Readlink(filepath.Join(dir, "fd", d.Name()))
			if err != nil {
				continue
			}
			inode, ok := wanted[target]
			if !ok || out[inode] != "" {
				continue
			}
			name, _ := os.ReadFile(filepath.Join(dir, "comm"))
			out[inode] = fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(name)), filepath.Base(dir))
		}
		if len(out) == len(wanted) {
			break
		}
	}
	return out
}

func pid(dir string) int {
	n, _ := strconv.Atoi(filepath.Base(dir))
	return n
}
