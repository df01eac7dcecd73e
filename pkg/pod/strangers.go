package pod

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A socket of the pod's own on the proxy's address and port would take a share of the pod's connections: the kernel spreads
// them over all sockets of a SO_REUSEPORT group. It lets in nobody of another user, and the bind hook (bpf/bind.bpf.c)
// lets in nobody at all while a listener of an agent is there. What is left is a process with the agent's user id, the pod's
// root, that was there first. So the port is looked at before it is used and every now and then, and a pod with a
// stranger on it is not served: its connections meet the fail mode, and its status says why. If the agent was told that
// there may be a foreign proxy (Config.Foreign), the stranger is that: it gets the connections, and the agent keeps out.

// stranger is a listener on the proxy's address that no agent made.
type stranger struct {
	addr    netip.AddrPort
	uid     uint32
	foreign bool // as Config.Foreign
}

func (s *stranger) Error() string {
	return fmt.Sprintf("a process of the pod (user id %d) listens on %s%s", s.uid, s.addr, consequence(s.foreign))
}

// consequence is what it means for the pod that somebody else has the proxy's port.
func consequence(foreign bool) string {
	if foreign {
		return " and gets its connections (--original-dst-sockopt=on)"
	}
	return ", so its connections are not redirected"
}

// findStranger looks at who listens on the proxy's port, in the calling thread's namespace. A kernel without sock_diag for
// TCP can't be asked; then there is nothing to find.
func findStranger(port uint16, owns func(cookie uint64) (bool, error)) (*stranger, error) {
	if owns == nil {
		return nil, nil
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	defer unix.Close(fd)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := listeners(fd, family, port)
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		for _, l := range found {
			if l.addr != loopback4 && l.addr != loopback6 {
				continue // the kernel prefers the exact address, which is ours
			}
			ours, err := owns(l.cookie)
			if err != nil {
				return nil, err
			}
			if !ours {
				return &stranger{addr: netip.AddrPortFrom(l.addr, port), uid: l.uid}, nil
			}
		}
	}
	return nil, nil
}

type listening struct {
	addr   netip.Addr // unmapped
	cookie uint64
	uid    uint32
}

// Sizes and offsets of struct inet_diag_req_v2 and struct inet_diag_msg (linux/inet_diag.h).
const (
	diagRequestSize = 56
	diagMessageSize = 72
	diagSource      = 8
	diagCookie      = 44
	diagUID         = 64
	tcpListen       = 10
)

// listeners asks the kernel for all sockets of a family that listen on the port.
func listeners(fd int, family uint8, port uint16) ([]listening, error) {
	native := binary.NativeEndian
	msg := native.AppendUint32(nil, unix.SizeofNlMsghdr+diagRequestSize)
	msg = native.AppendUint16(msg, unix.SOCK_DIAG_BY_FAMILY)
	msg = native.AppendUint16(msg, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	msg = append(msg, make([]byte, 8)...) // sequence, port id
	msg = append(msg, family, unix.IPPROTO_TCP, 0, 0)
	msg = native.AppendUint32(msg, 1<<tcpListen)
	msg = binary.BigEndian.AppendUint16(msg, port)
	msg = append(msg, make([]byte, unix.SizeofNlMsghdr+diagRequestSize-len(msg))...)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("ask sock_diag for listeners: %w", err)
	}
	var out []listening
	answer := make([]byte, 16<<10)
	for {
		n, _, err := unix.Recvfrom(fd, answer, 0)
		if err != nil {
			return nil, fmt.Errorf("read sock_diag's answer: %w", err)
		}
		for b := answer[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(native.Uint32(b))
			if size < unix.SizeofNlMsghdr || size > len(b) {
				return nil, errors.New("sock_diag's answer is not one")
			}
			data := b[unix.SizeofNlMsghdr:size]
			switch native.Uint16(b[4:]) {
			case unix.NLMSG_DONE:
				return out, nil
			case unix.NLMSG_ERROR:
				return nil, fmt.Errorf("list listeners by sock_diag: %w", netlinkErrno(data))
			}
			if len(data) >= diagMessageSize {
				out = append(out, parseListening(data))
			}
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}

func parseListening(data []byte) listening {
	l := listening{cookie: uint64(binary.NativeEndian.Uint32(data[diagCookie:])) | uint64(binary.NativeEndian.Uint32(data[diagCookie+4:]))<<32,
		uid: binary.NativeEndian.Uint32(data[diagUID:])}
	if data[0] == unix.AF_INET {
		l.addr = netip.AddrFrom4([4]byte(data[diagSource:]))
	} else {
		l.addr = netip.AddrFrom16([16]byte(data[diagSource:])).Unmap()
	}
	return l
}
