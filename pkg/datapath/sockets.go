package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Role is what a socket is in a connection that we touched. The numbers are those of bpf/common.h.
type Role uint8

// Roles of sockets.
const (
	RoleNone       Role = iota
	RoleClient          // an application's socket that was redirected to the proxy
	RoleDownstream      // the proxy's accepted socket
	RoleUpstream        // the proxy's socket towards an endpoint
	RoleServer          // an application's accepted socket behind the proxy
	RoleService         // translated from a Service address to a backend
	RoleOffload         // sent to an endpoint of an offloaded listener
	RolePodClient       // pod to pod without proxy, connecting side
	RolePodServer       // pod to pod without proxy, accepting side
	RoleOurs            // made by the agent and not connected yet, or a listener of its
)

var roleNames = [...]string{"none", "client", "downstream", "upstream", "server", "service", "offload", "pod-client", "pod-server", "ours"}

// String is the role's name in the CLI.
func (r Role) String() string {
	if int(r) < len(roleNames) {
		return roleNames[r]
	}
	return fmt.Sprintf("role-%d", uint8(r))
}

// sm_sock.state, sm_sock.latch and sm_sock.reason.
const (
	stateEnrolled = 2
	stateRemoved  = 3

	latchRedirect = 1
	latchPass     = 2
)

var stateNames = [...]string{"plain", "wanted", "enrolled", "removed"}

var reasons = [...]string{
	"",
	"acceleration is switched off",
	"the socket was blocking when it connected (opt in by the pod annotation sockmesh.io/accelerate-blocking=true)",
	"MPTCP sockets can't be redirected",
	"the other end is not a pod of this node",
	"the kernel refused to enrol the socket",
	"the other end could not be enrolled",
	"the first bytes left before the other end was enrolled",
	"the other end was not enrolled at the first message",
	"the other end has closed",
	"the other end left too much unread; TCP holds the sender back",
	"the application splices (splice(2) never sees redirected bytes)",
	"the application at the other end splices (splice(2) never sees redirected bytes)",
}

// sm_sock.aside and sm_sock.aside_reason.
const asideOn = 2

var asideNames = [...]string{"", "armed", "on", "over"}

var asideReasons = [...]string{
	"",
	"the sender's bytes are not redirected",
	"the receiver can't be redirected to",
	"its bytes have gone by TCP",
	"the socket was handed over before",
	"the receiver left too much unread; the proxy holds the sender back",
	"the receiver's application splices",
	"the receiver has closed",
	"the proxy has ended the connection",
	"the receiver's memory is short",
}

func asideReason(why uint8) string {
	if int(why) < len(asideReasons) {
		return asideReasons[why]
	}
	return fmt.Sprintf("reason %d", why)
}

// Socket is one socket that the datapath knows.
type Socket struct {
	Cookie uint64         `json:"cookie"`
	Netns  uint64         `json:"netns"` // cookie of its network namespace
	Role   string         `json:"role"`
	TCP    string         `json:"tcp"` // TCP state
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
	// Origin is the address that the connection was for; invalid where it was not changed.
	Origin netip.AddrPort `json:"origin"`
	// State: plain, wanted (until the handshake ends), enrolled, removed.
	State string `json:"state"`
	// Sends: how the bytes that this socket sends travel: redirect, tcp; empty before the first.
	Sends string `json:"sends,omitempty"`
	// Reason why they are not redirected.
	Reason string `json:"reason,omitempty"`
	// Peer is the cookie of the other end where that is enrolled too.
	Peer            uint64 `json:"peer,omitempty"`
	RedirectedBytes uint64 `json:"redirected_bytes"` // sent by this socket, socket to socket
	PassedBytes     uint64 `json:"passed_bytes"`     // sent by this socket by TCP while enrolled
	// Aside: whether the bytes that this socket sends skip the proxy: armed (as soon as none are under way there), on, over
	// (they don't any more); empty where the proxy never asked for it.
	Aside       string `json:"aside,omitempty"`
	AsideReason string `json:"aside_reason,omitempty"` // why they don't
	AsideBytes  uint64 `json:"aside_bytes,omitempty"`  // of RedirectedBytes, those that skipped the proxy
	Unread      uint32 `json:"unread,omitempty"`       // redirected bytes that its application has not read
}

var tcpStates = [...]string{"", "established", "syn-sent", "syn-recv", "fin-wait1", "fin-wait2", "time-wait", "close", "close-wait", "last-ack", "listen", "closing", "new-syn-recv"}

// Sockets lists the sockets that the datapath touched, of all pods, with where their bytes go and why. It reads a BPF
// iterator over the socket storage; where the kernel refuses that, one over the descriptors of all processes in the
// agent's PID namespace. Returns an error that wraps errors.ErrUnsupported where the kernel has none.
func (d *Datapath) Sockets() ([]Socket, error) {
	rows, err := d.socketRows()
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	var out []Socket
	for i := range rows {
		out = append(out, d.socket(&rows[i]))
	}
	return out, nil
}

func (d *Datapath) socketRows() ([]socketRow, error) {
	if prog := d.objs.progs[progSockets]; prog != nil {
		return d.readRows(prog, d.objs.sock())
	}
	if prog := d.objs.progs[progSockFiles]; prog != nil {
		return d.readRows(prog, nil)
	}
	return nil, fmt.Errorf("no iterator program loads on this kernel: %w", errors.ErrUnsupported)
}

// readRows reads an iterator over m; nil: it is over something else.
func (d *Datapath) readRows(prog *ebpf.Program, m *ebpf.Map) ([]socketRow, error) {
	it, err := link.AttachIter(link.IterOptions{Program: prog, Map: m})
	if err != nil {
		return nil, err
	}
	defer it.Close()
	r, err := it.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	raw, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	var out []socketRow
	listed := map[uint64]bool{} // by cookie: processes may share a socket
	size := binary.Size(socketRow{})
	for ; len(raw) >= size; raw = raw[size:] {
		var row socketRow
		if err := binary.Read(bytes.NewReader(raw[:size]), binary.NativeEndian, &row); err != nil {
			return nil, fmt.Errorf("decode a socket: %w", err)
		}
		if r := Role(row.State.Role); r == RoleNone || r == RoleOurs {
			continue // connected again, to something that isn't ours; or no connection
		}
		if listed[row.Cookie] {
			continue
		}
		listed[row.Cookie] = true
		out = append(out, row)
	}
	return out, nil
}

func (d *Datapath) socket(row *socketRow) Socket {
	st := &row.State
	s := Socket{
		Cookie: row.Cookie, Netns: row.Netns, Role: Role(st.Role).String(),
		Local: addrPort(row.Local, row.LocalPort), Remote: addrPort(row.Remote, row.RemotePort),
		RedirectedBytes: st.RedirectedBytes, PassedBytes: st.PassedBytes, Unread: row.Unread,
	}
	if st.OriginPort != 0 {
		s.Origin = addrPort(st.Origin, st.OriginPort)
	}
	if int(row.TcpState) < len(tcpStates) {
		s.TCP = tcpStates[row.TcpState]
	}
	if int(st.State) < len(stateNames) {
		s.State = stateNames[st.State]
	}
	if int(st.Reason) < len(reasons) {
		s.Reason = reasons[st.Reason]
	}
	if st.Error != 0 {
		s.Reason += ": " + syscall.Errno(-st.Error).Error()
	}
	if int(st.Aside) < len(asideNames) {
		s.Aside = asideNames[st.Aside]
	}
	s.AsideReason, s.AsideBytes = asideReason(st.AsideReason), st.AsideBytes
	switch st.Latch {
	case latchRedirect:
		s.Sends = "redirect"
	case latchPass:
		s.Sends = "tcp"
	}
	if st.State == stateEnrolled && d.enrolled(rowKey(row)) == 0 {
		s.State = stateNames[stateRemoved] // by the agent, which can't write the socket's storage
	} else if st.State == stateEnrolled {
		s.Peer = d.peerOf(row)
	}
	return s
}

// peerOf reads the other end's cookie out of sm_pairs.
func (d *Datapath) peerOf(row *socketRow) uint64 {
	return d.enrolled(mirror(rowKey(row)))
}

// enrolled is the cookie of the socket with this view of its connection, 0 if there is none.
func (d *Datapath) enrolled(key tupleKey) uint64 {
	var cookie uint64
	if err := d.objs.pairs().Lookup(key, &cookie); err != nil {
		return 0
	}
	return cookie
}

func rowKey(row *socketRow) tupleKey {
	key := tupleKey{Local: row.Local, Remote: row.Remote, LocalPort: row.LocalPort, RemotePort: row.RemotePort}
	if netip.AddrFrom16(row.Local).Unmap().IsLoopback() || netip.AddrFrom16(row.Remote).Unmap().IsLoopback() {
		key.Netns = row.Netns
	}
	return key
}

// mirror is the same connection as the other end sees it.
func mirror(k tupleKey) tupleKey {
	k.Local, k.Remote, k.LocalPort, k.RemotePort = k.Remote, k.Local, k.RemotePort, k.LocalPort
	return k
}
