package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Rehearse makes the proxy's connections to addrs inside the network namespace with that cookie be redirected, as if it
// was a pod of this node, so that the programs can be tried on sockets of one's own. end undoes it. The addresses must
// not be those of a pod.
func (d *Datapath) Rehearse(cookie uint64, addrs ...netip.Addr) (end func() error, err error) {
	if !d.Live() {
		return nil, errors.New("the programs of an earlier layout are still in charge")
	}
	var before []counterValue // what is rehearsed doesn't count
	if err := d.objs.counters().Lookup(uint32(0), &before); err != nil {
		return nil, fmt.Errorf("read sm_counters: %w", err)
	}
	end = func() error {
		errs := []error{d.objs.counters().Put(uint32(0), before)}
		for _, a := range addrs {
			if err := d.objs.local().Delete(localKey{Addr: addr16(a)}); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs = append(errs, fmt.Errorf("take the rehearsal's address %s out of sm_local: %w", a, err))
			}
		}
		return errors.Join(append(errs, d.forgetSplicing(cookie))...)
	}
	for _, a := range addrs {
		if err := d.objs.local().Update(localKey{Addr: addr16(a)}, localValue{Netns: cookie}, ebpf.UpdateNoExist); err != nil {
			return nil, errors.Join(fmt.Errorf("put the rehearsal's address %s into sm_local: %w", a, err), end())
		}
	}
	return end, nil
}

// forgetSplicing drops what was learned of the applications of one network namespace.
func (d *Datapath) forgetSplicing(cookie uint64) error {
	m := d.objs.maps[sockmeshMapSmNosplice]
	var keys []appKey
	var k appKey
	var v uint64
	it := m.Iterate()
	for it.Next(&k, &v) {
		if k.Netns == cookie {
			keys = append(keys, k)
		}
	}
	errs := []error{it.Err()}
	for _, k := range keys {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// AddProbes records what was tried from outside this package; status shows it with the rest.
func (d *Datapath) AddProbes(probes []Probe) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range probes {
		if p.OK {
			d.probes.note(p.Name, p.Detail)
		} else {
			d.probes.add(p.Name, errors.New(p.Detail), "")
		}
	}
}

// BacklogLimit is the configured bound of what may lie unread.
func (d *Datapath) BacklogLimit() uint32 { return d.cfg.BacklogLimit }

// Accelerating tells whether new connections are redirected.
func (d *Datapath) Accelerating() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flags&flagAccelerate != 0
}

// Sends tells how the bytes of the socket with that cookie travel: redirect, tcp, empty before the first.
func (d *Datapath) Sends(cookie uint64) (string, error) {
	rows, err := d.socketRows()
	if err != nil {
		return "", err
	}
	for i := range rows {
		if rows[i].Cookie == cookie {
			return d.socket(&rows[i]).Sends, nil
		}
	}
	return "", fmt.Errorf("no socket with the cookie %d is known", cookie)
}
