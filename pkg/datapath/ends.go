package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// Sockets outlive backends. One that sends to a backend which is gone waits for nothing, so it is ended, and its
// application connects anew:
//
//   - connected UDP as soon as its backend takes no more traffic (it is no member of the pool any more). The kernel asks
//     nobody when such a socket sends, so it can't be sent elsewhere. Sockets that name the address in each call need
//     no end: sendmsg moves them.
//   - TCP when its endpoint has left the Service altogether, no other Service has it, and a grace is over. A backend that
//     drains still stands in the Service, as excluded, and keeps its connections for as long as they last.
//
// What left while no agent ran is seen at the first full list: sockets remember that they were sent to a backend, and one whose
// backend no Service lists has lost it. Its grace begins then.

const (
	// endPause joins what happens at once, since looking for sockets walks over all of the node's.
	endPause = 200 * time.Millisecond
	// endCheck is how often graces are looked at.
	endCheck = time.Second
)

// departures are addresses that a Service stopped listing, and when.
type departures map[netip.AddrPort]time.Time

// left notes which addresses of a Service's old meaning the new one (nil: it is deleted) doesn't know any more.
func (g departures) left(old, next *service.Service, now time.Time) {
	if old == nil && len(g) == 0 {
		return // the first list of a large cluster comes this way
	}
	var stays map[netip.AddrPort]bool
	if next != nil {
		stays = listed(next)
	}
	for a := range stays {
		delete(g, a)
	}
	if old == nil {
		return
	}
	for a := range listed(old) {
		if _, known := g[a]; !stays[a] && !known {
			g[a] = now
		}
	}
}

// listed are all endpoints of TCP that a Service knows, whether they take traffic or not.
func listed(s *service.Service) map[netip.AddrPort]bool {
	out := map[netip.AddrPort]bool{}
	for i := range frontendCount(s) {
		f := frontendAt(s, i)
		if f.Protocol != service.TCP {
			continue
		}
		for _, b := range f.Backends {
			out[normal(b.Addr)] = true
		}
		if f.External != nil {
			for _, b := range f.External.Backends {
				out[normal(b.Addr)] = true
			}
		}
	}
	for _, e := range s.Excluded {
		out[normal(e.Addr)] = true
	}
	return out
}

// unlisted removes what a Service lists. Caller holds mu.
func (r *Reconciler) unlisted(all map[netip.AddrPort]bool) {
	if len(all) == 0 {
		return
	}
	for _, s := range r.services {
		for a := range listed(s) {
			delete(all, a)
		}
	}
}

// inherit notes which backends of TCP connections from before this agent no Service lists now.
func (r *Reconciler) inherit(now time.Time) error {
	rows, err := r.d.socketRows()
	if err != nil {
		return err
	}
	left := map[netip.AddrPort]bool{}
	for i := range rows {
		if row := &rows[i]; row.Protocol == uint8(service.TCP) && Role(row.State.Role) == RoleService && row.RemotePort != 0 {
			left[normal(addrPort(row.Remote, row.RemotePort))] = true
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unlisted(left)
	for a := range left {
		if _, known := r.ends[a]; !known {
			r.ends[a] = now
		}
	}
	return nil
}

// takeHeirs tells, once, that there may be sockets from before this agent.
func (r *Reconciler) takeHeirs() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.heirs
	r.heirs = false
	return was
}

// over takes the addresses whose grace has ended and that no Service lists.
func (r *Reconciler) over(now time.Time) map[netip.AddrPort]bool {
	grace := r.d.cfg.TCPGrace
	r.mu.Lock()
	defer r.mu.Unlock()
	var out map[netip.AddrPort]bool
	for a, since := range r.ends {
		if grace >= 0 && now.Sub(since) < grace {
			continue
		}
		delete(r.ends, a)
		if grace >= 0 {
			if out == nil {
				out = map[netip.AddrPort]bool{}
			}
			out[a] = true
		}
	}
	r.unlisted(out)
	return out
}

// endLoop ends sockets until ctx ends.
func (r *Reconciler) endLoop(ctx context.Context) {
	check := time.NewTicker(endCheck)
	defer check.Stop()
	for {
		udp := false
		select {
		case <-ctx.Done():
			return
		case <-r.endKick:
			udp = true
			select {
			case <-ctx.Done():
				return
			case <-time.After(endPause):
			}
		case <-check.C:
		}
		if udp && r.takeHeirs() {
			if err := r.inherit(time.Now()); err != nil {
				r.log.Warn("connections to endpoints that left while no agent ran can't be looked for; they end by their own time-outs", "error", err)
			}
		}
		if tcp := r.over(time.Now()); udp || len(tcp) > 0 {
			if err := r.d.endSockets(udp, tcp); err != nil {
				r.log.Warn("sockets whose backend is gone could not all be ended; they end by their own time-outs", "error", err)
			}
		}
	}
}

// endSockets ends the connected UDP sockets that hold on to a backend which is no member, and the TCP connections to the
// addresses.
func (d *Datapath) endSockets(udp bool, tcp map[netip.AddrPort]bool) error {
	if !d.inCharge() {
		return nil // whoever took the maps over does it
	}
	rows, err := d.socketRows()
	if err != nil {
		return fmt.Errorf("look for them: %w", err)
	}
	doomed := map[uint64][]socketRow{} // by network namespace
	for _, row := range rows {
		isUDP := row.Protocol == uint8(service.UDP)
		if isUDP && udp && d.isStray(&row) || !isUDP && tcp[normal(addrPort(row.Remote, row.RemotePort))] && row.State.OriginPort != 0 {
			doomed[row.Netns] = append(doomed[row.Netns], row)
		}
	}
	var errs []error
	for cookie, rows := range doomed {
		errs = append(errs, d.endIn(cookie, rows))
	}
	return errors.Join(errs...)
}

// isStray: a UDP socket that is connected to a backend which takes no more traffic.
func (d *Datapath) isStray(row *socketRow) bool {
	if Role(row.State.Role) != RoleService || row.RemotePort == 0 || row.State.Pool == 0 {
		return false
	}
	var member uint32
	err := d.objs.members().Lookup(memberKey{Pool: row.State.Pool, Backend: row.State.Backend}, &member)
	return errors.Is(err, ebpf.ErrKeyNotExist)
}

// endIn ends sockets of one network namespace.
func (d *Datapath) endIn(cookie uint64, rows []socketRow) error {
	netns, err := d.netnsOf(cookie, rows)
	if err != nil {
		return fmt.Errorf("%d sockets in the network namespace with cookie %d: %w", len(rows), cookie, err)
	}
	defer netns.Close()
	return inNetns(netns, func() error {
		var errs []error
		for _, udp := range []bool{false, true} {
			some := slices.DeleteFunc(slices.Clone(rows), func(r socketRow) bool { return (r.Protocol == uint8(service.UDP)) != udp })
			if len(some) == 0 {
				continue
			}
			prog, count := d.objs.progs[progEndTCP], &d.endedTCP
			if udp {
				prog, count = d.objs.progs[progEndUDP], &d.endedUDP
			}
			n, err := d.end(prog, some)
			count.Add(uint64(n))
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
}

// end destroys sockets of the thread's network namespace by the iterator, or, where there is none, by sock_diag. It returns
// how many that were.
func (d *Datapath) end(prog *ebpf.Program, rows []socketRow) (int, error) {
	if prog == nil {
		n := 0
		var errs []error
		for i := range rows {
			err := sockDestroy(rows[i].Protocol, rows[i].Cookie, rowKey(&rows[i]))
			if err == nil {
				n++
			}
			errs = append(errs, err)
		}
		return n, errors.Join(errs...)
	}
	for i := range rows {
		if err := d.objs.doomed().Put(rows[i].Cookie, uint32(1)); err != nil {
			return 0, fmt.Errorf("name a socket in sm_doomed: %w", err)
		}
	}
	err := runIter(prog)
	n := 0
	for i := range rows { // what is left has ended by itself
		if e := d.objs.doomed().Delete(rows[i].Cookie); errors.Is(e, ebpf.ErrKeyNotExist) {
			n++
		}
	}
	return n, err
}

// netnsOf finds the network namespace of sockets: the node's own, one that the caller of Open knows, or that of a process
// which has one of them.
func (d *Datapath) netnsOf(cookie uint64, rows []socketRow) (*os.File, error) {
	if cookie == d.cfg.HostNetns {
		return openNetns(fmt.Sprintf("/proc/self/fd/%d", d.nodeNetns.Fd()))
	}
	var errs []error
	if d.cfg.OpenNetns != nil {
		f, err := d.cfg.OpenNetns(cookie)
		if err == nil {
			return f, nil
		}
		errs = append(errs, err)
	}
	for _, row := range d.owned(rows) {
		f, err := netnsOfDescriptor(int(row.Pid), int(row.Fd))
		if err == nil {
			return f, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil, errors.New("no process that the agent can see has them")
	}
	return nil, errors.Join(errs...)
}

// owned are rows that say which process has the socket; where the listing has none, all descriptors are walked over.
func (d *Datapath) owned(rows []socketRow) []socketRow {
	if len(rows) > 0 && rows[0].Pid != 0 || d.objs.progs[progSockFiles] == nil {
		return rows
	}
	wanted := map[uint64]bool{}
	for _, r := range rows {
		wanted[r.Cookie] = true
	}
	all, err := d.readRows(d.objs.progs[progSockFiles], nil)
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(all, func(r socketRow) bool { return !wanted[r.Cookie] })
}
