package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// What somebody takes out of the kernel by hand, the guard puts back: pins (an emptied or unmounted BPF file system),
// links (`bpftool link detach`, another tool's clean-up), the verdict program of sm_pairs. The reconciler's drift
// check does the same for the entries of the maps.
//
// A look costs an lstat for each pin and a query for each link, so it is taken every guardInterval. Repairs are counted,
// and told in status and log, because somebody out there believes that these things may be removed.
//
// Only the agent in charge repairs. Where the pins are another agent's, made after ours had been removed, this one has
// been replaced without having been asked: it is superseded as if its maps had been taken over.

// guardInterval is the time between two looks.
const guardInterval = time.Second

// Kinds of repairs.
const (
	repairPin     = "pin"
	repairLink    = "link"
	repairVerdict = "verdict"
)

// GuardStatus is what the guard had to do.
type GuardStatus struct {
	// Repairs by kind: pin, link, verdict.
	Repairs map[string]uint64 `json:"repairs"`
	// Last is what was repaired last, and when.
	Last   string    `json:"last,omitempty"`
	LastAt time.Time `json:"last_at"`
	// Problem is what could not be repaired.
	Problem string `json:"problem,omitempty"`
}

// guard is the state of one datapath's guard; all of it is guarded by Datapath.mu.
type guard struct {
	status GuardStatus
	inodes map[string]uint64 // of pins that are known to be ours
	// verdict: sm_msg was attached to sm_pairs, and should be.
	verdict bool
	// enrolled is the counter at the last look that found the verdict program in its place.
	enrolled uint64
	// displaced: the pins are another agent's.
	displaced bool
}

// Guard looks after pins and attachments until ctx ends.
func (d *Datapath) Guard(ctx context.Context) error {
	tick := time.NewTicker(guardInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			d.lookAfter()
		}
	}
}

// lookAfter takes one look, and repairs.
func (d *Datapath) lookAfter() {
	if !d.Live() || !d.inCharge() {
		return
	}
	err := errors.Join(d.lookAfterPins(), d.lookAfterLinks(), d.lookAfterVerdict())
	d.mu.Lock()
	defer d.mu.Unlock()
	problem := ""
	if err != nil {
		problem = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	if problem != "" && problem != d.guard.status.Problem {
		d.log.Error("what was removed from the kernel can't be put back", "error", problem)
	}
	d.guard.status.Problem = problem
}

// repaired counts.
func (d *Datapath) repaired(kind string, names []string) {
	if len(names) == 0 {
		return
	}
	sort.Strings(names)
	list := strings.Join(names, ", ")
	d.mu.Lock()
	s := &d.guard.status
	s.Repairs[kind] += uint64(len(names))
	s.Last, s.LastAt = kind+" of "+list, time.Now()
	d.mu.Unlock()
	d.log.Warn("somebody had removed a part of the datapath; it has been put back", "what", kind, "of", list)
}

// pinnable is a map or a link.
type pinnable interface {
	Pin(string) error
	Unpin() error
}

// lookAfterPins puts missing pins back. Maps come first: they tell whether this agent is still the one.
func (d *Datapath) lookAfterPins() error {
	d.mu.Lock()
	missing := map[string]pinnable{}
	var foreign []string
	for name, m := range d.objs.maps {
		switch d.pinned(d.dir.mapPin(name), func(p string) bool { return sameMap(p, m) }) {
		case pinMissing:
			missing[d.dir.mapPin(name)] = m
		case pinForeign:
			foreign = append(foreign, name)
		}
	}
	for name, l := range d.links {
		switch pin := d.dir.linkPin(name); d.pinned(pin, func(p string) bool { return sameLink(p, l) }) {
		case pinForeign:
			if len(foreign) == 0 {
				_ = os.Remove(pin)
				missing[pin] = l
			}
		case pinMissing:
			missing[pin] = l
		}
	}
	if len(foreign) > 0 {
		d.guard.displaced = true
	}
	d.mu.Unlock()
	if len(foreign) > 0 {
		d.log.Error("the pins had been removed, and another agent has made its own since: this one leaves the kernel to it", "maps", foreign)
		return nil
	}
	if len(missing) == 0 || d.movedOn() {
		return nil
	}
	if err := ensureBPFFS(d.cfg.BPFFS); err != nil {
		return err
	}
	if err := d.dir.create(); err != nil {
		return err
	}
	var back []string
	var errs []error
	d.mu.Lock()
	for pin, object := range missing {
		// Unpin, because the object believes that it is pinned already.
		if err := errors.Join(object.Unpin(), object.Pin(pin)); err != nil {
			errs = append(errs, fmt.Errorf("pin %s again: %w", pin, err))
			continue
		}
		back = append(back, filepath.Base(pin))
	}
	d.mu.Unlock()
	d.repaired(repairPin, back)
	return errors.Join(errs...)
}

// movedOn tells whether an agent of another layout has moved the links over to its maps and removed our pins.
func (d *Datapath) movedOn() bool {
	for _, other := range d.dir.otherLayouts() {
		if _, err := os.Lstat(other.linkPin(sockmeshProgSmConnect4)); err == nil {
			d.mu.Lock()
			d.guard.displaced = true
			d.mu.Unlock()
			return true
		}
	}
	return false
}

// What a pin can be.
const (
	pinOurs = iota
	pinMissing
	pinForeign
)

// pinned looks at the file first, and opens it only where its inode is not known yet. Caller holds mu.
func (d *Datapath) pinned(pin string, same func(pin string) bool) int {
	info, err := os.Lstat(pin)
	if err != nil {
		return pinMissing
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if ok && d.guard.inodes[pin] == st.Ino {
		return pinOurs
	}
	if !same(pin) {
		return pinForeign
	}
	if ok {
		d.guard.inodes[pin] = st.Ino
	}
	return pinOurs
}

func sameMap(pin string, ours *ebpf.Map) bool {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		return false
	}
	defer m.Close()
	return mapID(m) == mapID(ours)
}

func mapID(m *ebpf.Map) ebpf.MapID {
	info, err := m.Info()
	if err != nil {
		return 0
	}
	id, _ := info.ID()
	return id
}

func sameLink(pin string, ours link.Link) bool {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return false
	}
	defer l.Close()
	a, err := l.Info()
	if err != nil {
		return false
	}
	b, err := ours.Info()
	return err == nil && a.ID == b.ID
}

// lookAfterLinks attaches again what hangs nowhere or has another program in it.
func (d *Datapath) lookAfterLinks() error {
	d.mu.Lock()
	var lost []string
	for name, l := range d.links {
		info, err := l.Info()
		if err != nil {
			continue
		}
		if detached(info) || d.objs.progs[name] != nil && uint32(info.Program) != progID(d.objs.progs[name]) {
			lost = append(lost, name)
		}
	}
	d.mu.Unlock()
	if len(lost) == 0 || d.movedOn() || !d.inCharge() { // a successor's programs are not an intruder's
		return nil
	}
	if err := d.attachAll(); err != nil {
		return err
	}
	d.repaired(repairLink, lost)
	return nil
}

// detached tells whether a link has been cut off from what it hung on; only its descriptors are left then.
func detached(info *link.Info) bool {
	if cg := info.Cgroup(); cg != nil {
		return cg.CgroupId == 0
	}
	if tcx := info.TCX(); tcx != nil {
		return tcx.Ifindex == 0
	}
	return false
}

// lookAfterVerdict attaches sm_msg to sm_pairs again. Kernels before 5.17 can't say what is attached; there it is
// attached anew at each look, which changes nothing where it was there.
func (d *Datapath) lookAfterVerdict() error {
	d.mu.Lock()
	wanted := d.guard.verdict
	d.mu.Unlock()
	if !wanted {
		return nil
	}
	q, err := link.QueryPrograms(link.QueryOptions{Target: d.objs.pairs().FD(), Attach: ebpf.AttachSkMsgVerdict})
	counters, countErr := d.Counters()
	if err == nil && len(q.Programs) == 1 && uint32(q.Programs[0].ID) == progID(d.objs.progs[progMsg]) {
		if countErr == nil {
			d.mu.Lock()
			d.guard.enrolled = counters.Enrolled
			d.mu.Unlock()
		}
		return nil
	}
	if e := d.attachMsg(); e != nil || err != nil {
		return e
	}
	d.repaired(repairVerdict, []string{progMsg})
	d.mu.Lock()
	meanwhile := countErr == nil && counters.Enrolled != d.guard.enrolled
	d.mu.Unlock()
	if meanwhile {
		return d.releaseMute()
	}
	return nil
}

// releaseMute takes sockets out of sm_pairs whose peers were enrolled while no program was there to decide about their
// messages: such a peer keeps what it was enrolled with, sends by TCP for good, and on kernels that count only redirected
// bytes FIONREAD would say 0 for what comes from it.
//
// A socket that leaves loses what was redirected to it and is not read yet. So only those leave to whom nothing ever is:
// a mute peer has no program to redirect with, and aside.bpf.c lets nothing skip the proxy on its way to a socket that the
// proxy can't redirect to itself. Whether a socket is mute doesn't change while it is enrolled.
func (d *Datapath) releaseMute() error {
	rows, err := d.socketRows()
	if err != nil {
		return fmt.Errorf("look for sockets that were enrolled without sm_msg: %w", err)
	}
	mute := map[tupleKey]bool{}
	for i := range rows {
		if rows[i].State.State == stateEnrolled && rows[i].Mute != 0 {
			mute[rowKey(&rows[i])] = true
		}
	}
	for i := range rows {
		key := rowKey(&rows[i])
		// Another connection may have got the same addresses and ports since.
		if !mute[mirror(key)] || d.enrolled(key) != rows[i].Cookie {
			continue
		}
		if err := d.objs.pairs().Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("take a socket out of sm_pairs: %w", err)
		}
	}
	return nil
}

// Repairs counts by kind what was put back.
func (d *Datapath) Repairs() map[string]uint64 { return d.guardStatus().Repairs }

// guardStatus copies.
func (d *Datapath) guardStatus() GuardStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.guard.status
	s.Repairs = map[string]uint64{}
	for _, kind := range []string{repairPin, repairLink, repairVerdict} {
		s.Repairs[kind] = d.guard.status.Repairs[kind]
	}
	return s
}
