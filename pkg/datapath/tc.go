package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/nodeaddr"
)

// How programs hang on a network device. From kernel 6.6 on by tcx links, pinned, one for each direction, taken over and
// updated in place by the next agent. Before that by filters of the clsact qdisc, which outlive the agent by themselves and
// are replaced in place too: one filter has one handle and priority, by which it is found again.
//
// Other tools' programs on the device stay. Ours come first at ingress and last at egress, so that the others see what the
// node's stack sees: clients and backends. Neither ends the chain.

const (
	tcHandle          = 0x534d // "SM"
	tcIngressPriority = 1      // first
	tcEgressPriority  = 0xf000 // late
	tcName            = "sockmesh"
	outsidePinPrefix  = "sm_nat_"
)

// deviceLink is one attached tcx link.
type deviceLink struct {
	link link.Link
	prog *ebpf.Program
}

func outsidePins(index int) (in, out string) {
	return fmt.Sprintf("%sin_%d", outsidePinPrefix, index), fmt.Sprintf("%sout_%d", outsidePinPrefix, index)
}

// attach puts both programs on a device, notes the pins that are in use in wanted, and says by what means.
func (o *outside) attach(l netlink.Link, p outsidePrograms, wanted map[string]bool) (mode string, err error) {
	in, out := outsidePins(l.Attrs().Index)
	if !o.noTCX {
		// Answers first: no packet may go in that would come out untranslated.
		err = errors.Join(
			o.attachTCX(l, out, ebpf.AttachTCXEgress, p.out),
			o.attachTCX(l, in, ebpf.AttachTCXIngress, p.in),
		)
		switch {
		case err == nil:
			wanted[in], wanted[out] = true, true
			return "tcx", removeFilters(l)
		case !errors.Is(err, ebpf.ErrNotSupported):
			return "", err
		}
		o.noTCX = true
		o.log.Info("this kernel has no tcx: programs are attached to the devices by clsact", "reason", err)
	}
	return "clsact", attachClsact(l, p)
}

func (o *outside) attachTCX(l netlink.Link, name string, at ebpf.AttachType, prog *ebpf.Program) error {
	pin := o.d.dir.linkPin(name)
	has := o.links[name]
	if has == nil {
		if found, err := link.LoadPinnedLink(pin, nil); err == nil {
			has = &deviceLink{link: found}
		} else if !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("open the pinned link %s: %w", pin, err)
		}
	}
	if has != nil {
		o.links[name] = has
		if tcxIndex(has.link) == l.Attrs().Index {
			if err := o.repin(name, has.link); err != nil {
				return err
			}
			if has.prog == prog {
				return nil
			}
			if err := has.link.Update(prog); err != nil {
				return fmt.Errorf("update %s: %w", name, err)
			}
			has.prog = prog
			return nil
		}
		o.forget(name) // the device has gone, and another one has its number
	}
	// In the order of the devices' other programs ours come first on the way in and last on the way out.
	anchor := link.Head()
	if at == ebpf.AttachTCXEgress {
		anchor = link.Tail()
	}
	made, err := link.AttachTCX(link.TCXOptions{Interface: l.Attrs().Index, Program: prog, Attach: at, Anchor: anchor})
	if err != nil {
		return err
	}
	if err := made.Pin(pin); err != nil {
		made.Close()
		return fmt.Errorf("pin the link of %s at %s: %w", l.Attrs().Name, pin, err)
	}
	o.links[name] = &deviceLink{made, prog}
	return nil
}

// repin puts a pin back that somebody has removed: see guard.go.
func (o *outside) repin(name string, l link.Link) error {
	pin := o.d.dir.linkPin(name)
	if _, err := os.Lstat(pin); !errors.Is(err, os.ErrNotExist) || o.d.movedOn() || !o.d.inCharge() {
		return nil
	}
	if err := errors.Join(o.d.dir.create(), l.Unpin(), l.Pin(pin)); err != nil {
		return fmt.Errorf("pin %s again: %w", pin, err)
	}
	o.d.repaired(repairPin, []string{name})
	return nil
}

// tcxIndex is the device that a link hangs on; 0: it has gone.
func tcxIndex(l link.Link) int {
	info, err := l.Info()
	if err != nil || info.TCX() == nil {
		return 0
	}
	return int(info.TCX().Ifindex)
}

// forget takes a link off its device.
func (o *outside) forget(name string) {
	l := o.links[name]
	delete(o.links, name)
	if err := dropLink(l.link); err != nil {
		o.log.Warn("take a program off a device", "link", name, "error", err)
	}
}

func dropLink(l link.Link) error {
	err := l.Detach()
	if errors.Is(err, unix.ENOLINK) {
		err = nil // the device has gone
	}
	return errors.Join(err, l.Unpin(), l.Close())
}

// drop takes off every link but the wanted ones: of devices that have gone, or are served otherwise now.
func (o *outside) drop(wanted map[string]bool) {
	for name := range o.links {
		if !wanted[name] {
			o.forget(name)
		}
	}
	for _, name := range pinnedOutside(o.d.dir) {
		if wanted[name] {
			continue
		}
		l, err := link.LoadPinnedLink(o.d.dir.linkPin(name), nil)
		if err == nil {
			err = dropLink(l)
		}
		if err != nil {
			o.log.Warn("take a program off a device", "link", name, "error", err)
		}
	}
}

func pinnedOutside(dir layoutDir) []string {
	var names []string
	entries, _ := os.ReadDir(filepath.Join(dir.path(), "links"))
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), outsidePinPrefix) {
			names = append(names, e.Name())
		}
	}
	return names
}

// attachClsact makes both filters, or replaces what is there by them.
func attachClsact(l netlink.Link, p outsidePrograms) error {
	qdisc := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add the clsact qdisc: %w", err)
	}
	for _, f := range ourFilters(l) { // answers first
		prog := p.in
		if f.Parent == netlink.HANDLE_MIN_EGRESS {
			prog = p.out
		}
		if has := findFilter(l, f); has != nil && uint32(has.Id) == progID(prog) {
			continue
		}
		f.Fd = prog.FD()
		if err := netlink.FilterReplace(f); err != nil {
			return fmt.Errorf("attach to the clsact qdisc: %w", err)
		}
	}
	return nil
}

// ourFilters are a device's two filters, without programs.
func ourFilters(l netlink.Link) []*netlink.BpfFilter {
	one := func(parent uint32, priority uint16) *netlink.BpfFilter {
		return &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
			LinkIndex: l.Attrs().Index, Parent: parent, Handle: tcHandle, Priority: priority, Protocol: unix.ETH_P_ALL,
		}, Name: tcName, DirectAction: true}
	}
	return []*netlink.BpfFilter{one(netlink.HANDLE_MIN_EGRESS, tcEgressPriority), one(netlink.HANDLE_MIN_INGRESS, tcIngressPriority)}
}

// filtersOf lists the filters at one hook of the device.
func filtersOf(l netlink.Link, parent uint32) ([]netlink.Filter, error) {
	return nodeaddr.Whole(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent) })
}

// findFilter finds ours on the device.
func findFilter(l netlink.Link, f *netlink.BpfFilter) *netlink.BpfFilter {
	filters, err := filtersOf(l, f.Parent)
	if err != nil {
		return nil
	}
	for _, x := range filters {
		if b, ok := x.(*netlink.BpfFilter); ok && b.Handle == f.Handle && b.Priority == f.Priority && b.Name == tcName {
			return b
		}
	}
	return nil
}

// removeFilters takes ours off the device, and the qdisc with the last filter. A device that goes meanwhile takes them along.
func removeFilters(l netlink.Link) error {
	if err := takeFiltersOff(l); !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

func takeFiltersOff(l netlink.Link) error {
	qdiscs, err := nodeaddr.Whole(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(l) })
	if err != nil {
		return fmt.Errorf("list the qdiscs of %s: %w", l.Attrs().Name, err)
	}
	var clsact netlink.Qdisc
	for _, q := range qdiscs {
		if q.Type() == "clsact" {
			clsact = q
		}
	}
	if clsact == nil {
		return nil
	}
	removed := false
	for _, f := range ourFilters(l) {
		if findFilter(l, f) == nil {
			continue
		}
		if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("take our filter off %s: %w", l.Attrs().Name, err)
		}
		removed = true
	}
	if !removed {
		return nil
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS} {
		if left, err := filtersOf(l, parent); err != nil || len(left) > 0 {
			return err
		}
	}
	if err := netlink.QdiscDel(clsact); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove the clsact qdisc of %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// stopOutside takes what an earlier agent attached off the devices of the calling thread's network namespace.
func stopOutside(dir layoutDir) error {
	var errs []error
	for _, name := range pinnedOutside(dir) {
		l, err := link.LoadPinnedLink(dir.linkPin(name), nil)
		if err == nil {
			err = dropLink(l)
		}
		errs = append(errs, err)
	}
	links, err := nodeaddr.Whole(netlink.LinkList)
	errs = append(errs, err)
	for _, l := range links {
		errs = append(errs, removeFilters(l))
	}
	return errors.Join(errs...)
}

// detachOutside is stopOutside in the node's network namespace.
func (d *Datapath) detachOutside() error {
	return inNetns(d.nodeNetns, func() error { return stopOutside(d.dir) })
}
