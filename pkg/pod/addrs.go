package pod

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// addrWatch follows the addresses of one network namespace over a netlink socket that was made inside it.
//
// It subscribes first and lists afterwards, so nothing falls between. The kernel queues list and notifications in the
// order in which they happened; when its queue overflows it says so, and the list is taken again.
type addrWatch struct {
	socket *os.File
	seq    uint32 // of the newest list request
}

// deviceAddr is an address on a device; two devices may have the same one.
type deviceAddr struct {
	device uint32
	addr   netip.Addr
}

// netlinkBuffer holds the largest message that the kernel makes for a list (NLMSG_GOODSIZE, at most 8 KiB).
const netlinkBuffer = 8 << 10

// newAddrWatch opens the socket in the calling thread's namespace and tells the namespace's cookie.
func newAddrWatch() (*addrWatch, uint64, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, 0, fmt.Errorf("netlink socket: %w", err)
	}
	cookie, err := netnsCookie(fd)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR})
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, 0, fmt.Errorf("subscribe to addresses: %w", err)
	}
	// Non-blocking, so the runtime's poller waits for it and close ends the wait.
	return &addrWatch{socket: os.NewFile(uintptr(fd), "netlink")}, cookie, nil
}

// close ends run.
func (w *addrWatch) close() { _ = w.socket.Close() }

// run publishes all addresses of the namespace, at first and after each change, until close.
func (w *addrWatch) run(publish func(map[netip.Addr]bool)) error {
	buffer := make([]byte, netlinkBuffer)
	for {
		err := w.follow(buffer, publish)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if !errors.Is(err, errListAgain) && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
}

// errListAgain: what was heard is not complete.
var errListAgain = errors.New("address list changed while it was read")

// follow takes a list and then follows the notifications.
func (w *addrWatch) follow(buffer []byte, publish func(map[netip.Addr]bool)) error {
	w.seq++
	if _, err := w.socket.Write(listRequest(w.seq)); err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	have := map[deviceAddr]bool{}
	listed := false
	for {
		n, err := w.socket.Read(buffer)
		if err != nil {
			return err
		}
		messages, err := syscall.ParseNetlinkMessage(buffer[:n])
		if err != nil {
			return errListAgain
		}
		changed := false
		for i := range messages {
			switch m := &messages[i]; m.Header.Type {
			case unix.NLMSG_DONE:
				if m.Header.Seq == w.seq { // Not the end of a list that was given up.
					listed, changed = true, true
				}
			case unix.NLMSG_ERROR:
				switch errno := netlinkErrno(m.Data); errno {
				case 0:
				case unix.EBUSY: // The kernel still sends the list that was given up.
					return errListAgain
				default:
					return fmt.Errorf("list addresses: %w", errno)
				}
			case unix.RTM_NEWADDR, unix.RTM_DELADDR:
				if m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 {
					return errListAgain
				}
				if a, ok := parseAddr(m); ok {
					if m.Header.Type == unix.RTM_NEWADDR {
						have[a] = true
					} else {
						delete(have, a)
					}
					changed = true
				}
			}
		}
		if listed && changed {
			publish(addrsOf(have))
		}
	}
}

func addrsOf(have map[deviceAddr]bool) map[netip.Addr]bool {
	addrs := make(map[netip.Addr]bool, len(have))
	for a := range have {
		addrs[a.addr] = true
	}
	return addrs
}

// listRequest asks for the addresses of both families.
func listRequest(seq uint32) []byte {
	request := make([]byte, unix.SizeofNlMsghdr+unix.SizeofIfAddrmsg)
	*(*unix.NlMsghdr)(unsafe.Pointer(&request[0])) = unix.NlMsghdr{
		Len:   uint32(len(request)),
		Type:  unix.RTM_GETADDR,
		Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP,
		Seq:   seq,
	}
	return request
}

func netlinkErrno(data []byte) syscall.Errno {
	if len(data) < 4 {
		return 0
	}
	return syscall.Errno(-int32(binary.NativeEndian.Uint32(data)))
}

// parseAddr reads an address message. IFA_LOCAL is the address itself where IFA_ADDRESS is the far end of a
// point-to-point link; IPv6 gives only the latter unless there is a far end.
func parseAddr(m *syscall.NetlinkMessage) (deviceAddr, bool) {
	if len(m.Data) < unix.SizeofIfAddrmsg {
		return deviceAddr{}, false
	}
	header := (*unix.IfAddrmsg)(unsafe.Pointer(&m.Data[0]))
	attributes, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return deviceAddr{}, false
	}
	var addr netip.Addr
	for _, a := range attributes {
		if a.Attr.Type == unix.IFA_LOCAL || a.Attr.Type == unix.IFA_ADDRESS && !addr.IsValid() {
			if parsed, ok := netip.AddrFromSlice(a.Value); ok {
				addr = parsed
			}
		}
	}
	return deviceAddr{header.Index, addr}, addr.IsValid()
}
