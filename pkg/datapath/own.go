package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The programs must know the agent's own sockets: an upstream socket is exempt from listener claims (else the proxy would call
// itself), a listener in a pod is the one that connections are redirected to. They know them by the socket's storage, which
// takes the map's descriptor to write. Nothing that a pod can do makes one of its sockets ours: not a mark (CAP_NET_RAW is
// enough for SO_MARK since Linux 5.17, and most containers have it), not an address, not a user id.

// Own tells the programs that the socket fd is the agent's. Call it before the socket is bound or connected. It holds for
// one connect. One bpf(2) call, in place of the SO_MARK that others set.
func (d *Datapath) Own(fd int) error {
	if err := d.objs.sock().Put(int32(fd), &ownSocket); err != nil {
		return fmt.Errorf("tell the programs that a socket is the proxy's: %w", err)
	}
	return nil
}

var ownSocket = sockValue{Role: uint8(RoleOurs)}

// OwnListener is Own for a listener in a pod. Other agents on these maps know it by OwnsListener.
func (d *Datapath) OwnListener(fd int) error {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return fmt.Errorf("SO_COOKIE: %w", err)
	}
	if err := d.objs.listeners().Put(cookie, uint32(1)); err != nil {
		return fmt.Errorf("write sm_listeners: %w", err)
	}
	return d.Own(fd)
}

// DisownListener has connect() pass a listener by, which is about to close: connections go where they go without a proxy,
// and none can be on its way when the socket is closed. It stays known to OwnsListener.
func (d *Datapath) DisownListener(fd int) error {
	if err := d.objs.sock().Delete(int32(fd)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("tell the programs that a listener closes: %w", err)
	}
	return nil
}

// OwnsListener tells whether a listener was made by an agent on these maps, this one or another.
func (d *Datapath) OwnsListener(cookie uint64) (bool, error) {
	var one uint32
	err := d.objs.listeners().Lookup(cookie, &one)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	return err == nil, err
}
