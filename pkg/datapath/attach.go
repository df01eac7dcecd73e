package datapath

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Cgroup programs are attached by bpf_link and the links are pinned. A start that finds a pinned link updates the
// program in it, atomically: no connect() in between sees no program, or two. What a link says then:
//
//	ENOLINK  its cgroup was removed (a test's, a container's): attach anew
//	EPERM    on a new link: a legacy program without BPF_F_ALLOW_MULTI holds the cgroup; it must go first
//
// sk_msg has no usable link before 6.9, so it is attached to the sockhash raw; attaching again replaces it. Sockets
// that are in the map keep the program that they came with.

// cgroupHooks are the programs that hang on the cgroup, in the order in which they must come: sockops first, so that
// no connection is redirected without its origin being passed on; recvmsg before what sends, so that no answer comes
// under a backend's address.
var cgroupHooks = []struct {
	prog   string
	attach ebpf.AttachType
}{
	{sockmeshProgSmSockops, ebpf.AttachCGroupSockOps},
	{sockmeshProgSmGetpeer4, ebpf.AttachCgroupInet4GetPeername},
	{sockmeshProgSmGetpeer6, ebpf.AttachCgroupInet6GetPeername},
	{sockmeshProgSmRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
	{sockmeshProgSmRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
	{sockmeshProgSmSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{sockmeshProgSmSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
	{sockmeshProgSmConnect4, ebpf.AttachCGroupInet4Connect},
	{sockmeshProgSmConnect6, ebpf.AttachCGroupInet6Connect},
	{sockmeshProgSmBind4, ebpf.AttachCGroupInet4Bind},
	{sockmeshProgSmBind6, ebpf.AttachCGroupInet6Bind},
	{sockmeshProgSmGetsockopt, ebpf.AttachCGroupGetsockopt},
}

// attachAll attaches or updates every cgroup program that is loaded, and detaches those that are not wanted.
func (d *Datapath) attachAll() error {
	cgroup, err := os.Open(d.cfg.CgroupRoot)
	if err != nil {
		return fmt.Errorf("open the cgroup root: %w", err)
	}
	defer cgroup.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(cgroup.Fd()), &st); err != nil {
		return fmt.Errorf("look at the cgroup root: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, h := range cgroupHooks {
		prog := d.objs.progs[h.prog]
		if prog == nil {
			d.detachHook(h.prog)
			continue
		}
		l, err := d.attachHook(cgroup, st.Ino, h.prog, h.attach, prog)
		if err != nil {
			return err
		}
		if old := d.links[h.prog]; old != nil {
			old.Close()
		}
		d.links[h.prog] = l
	}
	for _, other := range d.dir.otherLayouts() {
		d.retireLayout(other)
	}
	return nil
}

// attachHook takes over the pinned link of a hook, or makes one.
func (d *Datapath) attachHook(cgroup *os.File, cgroupID uint64, name string, typ ebpf.AttachType, prog *ebpf.Program) (link.Link, error) {
	pin := d.dir.linkPin(name)
	found := d.findLink(name)
	if found != nil {
		if linkCgroupID(found) == cgroupID {
			err := found.Update(prog)
			if err == nil {
				if err := found.Pin(pin); err != nil {
					return nil, fmt.Errorf("pin the link of %s at %s: %w", name, pin, err)
				}
				return found, nil
			}
			d.log.Warn("a pinned link can't be updated and is made anew", "program", name, "error", err)
		} else {
			d.log.Warn("a pinned link belongs to another cgroup and is replaced", "program", name, "cgroup", d.cfg.CgroupRoot)
		}
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: d.cfg.CgroupRoot, Attach: typ, Program: prog})
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("attach %s to cgroup %s: %w: another program is attached there exclusively (see `bpftool cgroup show %s`); detach it or attach it with multi", name, d.cfg.CgroupRoot, err, d.cfg.CgroupRoot)
		}
		return nil, fmt.Errorf("attach %s to cgroup %s: %w", name, d.cfg.CgroupRoot, err)
	}
	if found != nil { // only now, so that there is always one
		if err := found.Unpin(); err != nil {
			d.log.Warn("remove a stale link's pin", "program", name, "error", err)
		}
		found.Close()
	}
	if err := l.Pin(pin); err != nil {
		l.Close()
		return nil, fmt.Errorf("pin the link of %s at %s: %w", name, pin, err)
	}
	return l, nil
}

// findLink looks in our layout first, then in the others'.
func (d *Datapath) findLink(name string) link.Link {
	for _, dir := range append([]layoutDir{d.dir}, d.dir.otherLayouts()...) {
		l, err := link.LoadPinnedLink(dir.linkPin(name), nil)
		if err == nil {
			return l
		}
		if !errors.Is(err, os.ErrNotExist) {
			d.log.Warn("a pinned link can't be opened", "pin", dir.linkPin(name), "error", err)
		}
	}
	return nil
}

// detachHook removes the link of a hook that is switched off.
func (d *Datapath) detachHook(name string) {
	l := d.findLink(name)
	if l == nil {
		return
	}
	if err := errors.Join(l.Detach(), l.Unpin(), l.Close()); err != nil {
		d.log.Warn("detach a program that is switched off", "program", name, "error", err)
	}
}

func linkCgroupID(l link.Link) uint64 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	if cg := info.Cgroup(); cg != nil {
		return cg.CgroupId
	}
	return 0
}

// retireLayout removes another layout's pins once our links are in place, but for the sockhash in use.
func (d *Datapath) retireLayout(other layoutDir) {
	pin := other.mapPin(sockmeshMapSmPairs)
	if m, err := ebpf.LoadPinnedMap(pin, nil); err == nil {
		if err := d.dir.retire(m, pin); err != nil {
			d.log.Warn("keep the sockets of an earlier layout", "error", err)
		}
		m.Close()
	}
	if err := other.remove(); err != nil {
		d.log.Warn("remove an earlier layout's pins", "error", err)
	}
}

// attachMsg hangs the verdict program on the sockhash.
func (d *Datapath) attachMsg() error {
	prog := d.objs.progs[progMsg]
	if prog == nil {
		return errors.New("sm_msg does not load on this kernel")
	}
	err := link.RawAttachProgram(link.RawAttachProgramOptions{
		Target:  d.objs.pairs().FD(),
		Program: prog,
		Attach:  ebpf.AttachSkMsgVerdict,
	})
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("attach sm_msg to sm_pairs: %w: a link of another tool holds the map's verdict program", err)
	}
	if err != nil {
		return fmt.Errorf("attach sm_msg to sm_pairs: %w", err)
	}
	d.mu.Lock()
	d.guard.verdict = true
	d.mu.Unlock()
	return nil
}
