package loop

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Listeners stand in an epoll set of their own, and the ring waits for the set. A request on a listener would hold it: the
// kernel takes a dead process's ring apart some milliseconds after the process, and until then the listener would take
// connections that nobody serves, where they should meet the Service instead. An epoll set holds nothing.

// attachListener implements backend.
func (u *uring) attachListener(ln *Listener) error {
	if err := u.listener(unix.EPOLL_CTL_ADD, ln, unix.EPOLLIN); err != nil {
		return err
	}
	u.watchListeners()
	return nil
}

func (u *uring) listener(op int, ln *Listener, events uint32) error {
	u.l.stats.syscalls++
	if err := unix.EpollCtl(u.lnFD, op, int(ln.fd), &unix.EpollEvent{Events: events, Fd: ln.slot, Pad: ln.gen}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

// watchListeners waits for one readiness of the set at a time: that is level-triggered, and accept takes a batch.
func (u *uring) watchListeners() {
	if u.lnPolling {
		return
	}
	u.lnPolling = true
	e := u.request(kindListen, 0, 0)
	e.opcode, e.fd, e.opFlags = opPollAdd, int32(u.lnFD), pollMask(unix.POLLIN)
}

func (u *uring) updateListener(ln *Listener, on bool) {
	var events uint32
	if on {
		events = unix.EPOLLIN
	}
	if err := u.listener(unix.EPOLL_CTL_MOD, ln, events); err != nil {
		u.l.log.Error("cannot change a listener's events", "error", err)
	}
}

func (u *uring) detachListener(ln *Listener) {
	// Explicitly: whoever gave us the listener may hold a duplicate of its descriptor.
	_ = u.listener(unix.EPOLL_CTL_DEL, ln, 0)
}

// acceptAll takes what waits at the listeners.
func (u *uring) acceptAll() {
	u.l.stats.syscalls++
	n, err := unix.EpollWait(u.lnFD, u.lnEvents[:], 0)
	if err != nil {
		n = 0 // interrupted: the set is ready still
	}
	for i := range n {
		if ent := &u.l.entries[u.lnEvents[i].Fd]; ent.gen == u.lnEvents[i].Pad && ent.ln != nil {
			u.l.acceptable(ent.ln)
		}
	}
}
