// Package datapath owns everything of sockmesh that lives in the kernel: it loads the programs of bpf/, attaches
// them to the cgroup root, keeps the maps equal to what the rest of the agent wants, and reads them back for
// people.
//
// Reading order: config.go (what can be set), datapath.go (Open, Close), objects.go, pin.go and attach.go (what
// survives a restart, and how it is taken over), reconciler.go (wanted state against actual maps), status.go and
// sockets.go (what can be seen).
//
// Programs and maps are pinned, so traffic keeps flowing while no agent runs. The package knows nothing of HTTP,
// of Kubernetes objects or of xDS: it gets service.Service values, mesh.Claim values and pods.
package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
)

// ErrNoOrigin is returned by OriginalDst for a connection that no hook of ours redirected: somebody dialled the
// proxy's port directly.
var ErrNoOrigin = errors.New("connection has no original destination: it was not redirected by sockmesh")

// ErrSuperseded: another agent has opened the same maps since; this one no longer writes them.
var ErrSuperseded = errors.New("another agent has taken over the maps under this --bpffs")

// Datapath is the loaded and attached data plane of one agent. Its methods may be called from any goroutine.
type Datapath struct {
	cfg       Config
	log       *slog.Logger
	dir       layoutDir
	objs      *objects
	probes    *probeList
	rec       *Reconciler
	splice    *spliceWatch           // nil: nothing watches
	owner     uint64                 // what sm_config says while nobody else has opened the maps
	ownerFile owner                  // says that this agent lives
	asides    atomic.Pointer[asides] // nil: no connection skips the proxy
	nodeNetns *os.File               // the node's own network namespace
	outside   *outside               // nil: clients outside aren't served
	nat       *collector
	counts    counts // of the maps that programs fill

	endedTCP, endedUDP atomic.Uint64

	mu          sync.Mutex
	links       map[string]link.Link // guarded by mu
	flags       uint32               // guarded by mu; what sm_config holds
	accelReason string               // guarded by mu; why acceleration is not active, "" if it is
	asideReason string               // guarded by mu; why no connection skips the proxy
	guard       guard                // guarded by mu
	attached    bool                 // guarded by mu; false while an incompatible layout is being filled
}

// Bits of sm_config.flags; bpf/common.h explains them.
const (
	flagAccelerate     = 1 << 0
	flagServices       = 1 << 1
	flagFailClosed     = 1 << 2
	flagAcceleratePods = 1 << 3
	flagClaimsExact    = 1 << 4
	flagClaimsPort     = 1 << 5
	flagClaimsCatchAll = 1 << 6
	flagOutside        = 1 << 7
	flagLoopbackPorts  = 1 << 8
	flagForeign        = 1 << 9
	flagPatient        = 1 << 10
	flagClaims         = flagClaimsExact | flagClaimsPort | flagClaimsCatchAll
	// flagTables say what the maps hold, so that programs need not look into empty ones.
	flagTables = flagClaims | flagOutside | flagLoopbackPorts
)

// Open loads the programs and attaches them, or takes over what an earlier agent left pinned: its maps are adopted with
// everything in them, and its links get the new programs atomically, so no connection notices. Nothing is changed
// where a requirement isn't met; the error names it and the cure.
//
// Where the pinned maps are of another layout, the new ones are filled by the Reconciler first, and the links move
// over when every source has synced.
func Open(cfg Config) (*Datapath, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	probes := &probeList{}
	if err := probes.btf(); err != nil {
		return nil, err
	}
	if err := checkCgroup2(cfg.CgroupRoot); err != nil {
		return nil, err
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("lift the limit on locked memory, which maps count against on kernels before 5.11: %w (grant CAP_SYS_RESOURCE)", err)
	}
	if err := ensureBPFFS(cfg.BPFFS); err != nil {
		return nil, err
	}
	dir := layoutDir{cfg.BPFFS, layoutVersion}
	if err := dir.create(); err != nil {
		return nil, err
	}
	objs, err := load(cfg, dir, probes)
	if err != nil {
		return nil, err
	}
	d := &Datapath{cfg: cfg, log: cfg.Logger, dir: dir, objs: objs, probes: probes, owner: rand.Uint64(), links: map[string]link.Link{}, nat: &collector{},
		guard: guard{inodes: map[string]uint64{}, status: GuardStatus{Repairs: map[string]uint64{}}}}
	if d.nodeNetns, err = openNetns(cfg.NodeNetns); err != nil {
		d.Close()
		return nil, err
	}
	if d.rec, err = newReconciler(d); err != nil {
		d.Close()
		return nil, err
	}
	if d.ownerFile, err = register(cfg.Owners, d.owner); err != nil {
		d.Close()
		return nil, err
	}
	if err := d.start(); err != nil {
		d.ownerFile.retract()
		d.Close()
		return nil, err
	}
	if err := sweepOwners(cfg.Owners); err != nil {
		d.log.Warn("remove the files of agents that have ended", "error", err)
	}
	return d, nil
}

// start writes the configuration and attaches.
func (d *Datapath) start() error {
	var before configValue
	if err := d.objs.config().Lookup(uint32(0), &before); err != nil {
		return fmt.Errorf("read sm_config: %w", err)
	}
	// From here on the agent that runs takes nothing that is attached below for damage.
	taken := before
	taken.Owner = d.owner
	if err := d.objs.config().Put(uint32(0), taken); err != nil {
		return fmt.Errorf("write sm_config: %w", err)
	}
	// A start that fails must not take the maps from the agent that runs.
	if err := d.takeCharge(); err != nil {
		return errors.Join(err, d.objs.config().Put(uint32(0), before))
	}
	return nil
}

// takeCharge writes the settings and attaches what they ask for.
func (d *Datapath) takeCharge() error {
	want := d.rec.tableFlags()
	for bit, on := range map[uint32]bool{
		flagServices: d.cfg.Services, flagFailClosed: d.cfg.FailClosed, flagAcceleratePods: d.cfg.AcceleratePods,
		flagForeign: d.cfg.ForeignProxy, flagPatient: runtime.NumCPU() > 1,
	} {
		if on {
			want |= bit
		}
	}
	if d.cfg.Acceleration {
		err := d.probes.fionread()
		if e := d.attachMsg(); e != nil {
			err = e
			d.probes.add("sk_msg", e, "bytes are never redirected socket to socket")
		} else {
			d.probes.add("sk_msg", nil, "")
		}
		if e := d.watchSplices(); e != nil {
			err = errors.Join(err, e)
		}
		if err == nil {
			want |= flagAccelerate
			d.enableStepAside()
		} else {
			d.accelReason = err.Error()
			d.log.Warn("acceleration is off", "reason", err)
		}
	} else {
		d.accelReason = "switched off by --acceleration=off"
	}
	if err := d.setFlags(want, ^uint32(0)); err != nil {
		return err
	}
	if d.objs.fresh && d.findLink(sockmeshProgSmConnect4) != nil {
		d.log.Info("the pinned maps have another layout: the old programs stay in charge until the new maps are filled")
		return nil
	}
	return d.goLive()
}

// goLive puts the programs in charge.
func (d *Datapath) goLive() error {
	err := d.attachAll()
	d.probes.add("cgroup_hooks", err, "")
	if err != nil {
		return err
	}
	if d.cfg.Outside {
		d.startOutside()
	} else if err := d.detachOutside(); err != nil {
		d.log.Warn("take the programs for clients outside off the devices", "error", err)
	}
	d.mu.Lock()
	d.attached = true
	d.mu.Unlock()
	return nil
}

// Live tells whether this build's programs are in charge; not so while an incompatible layout is being filled.
func (d *Datapath) Live() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.attached
}

// setFlags changes the bits of mask in sm_config.
func (d *Datapath) setFlags(bits, mask uint32) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	flags := d.flags&^mask | bits&mask
	value := configValue{Flags: flags, ProxyPort: d.cfg.OutboundPort, Layout: layoutVersion,
		BacklogLimit: d.cfg.BacklogLimit, Owner: d.owner, HostNetns: d.cfg.HostNetns,
		NatPortMin: d.cfg.NATPorts[0], NatPortMax: d.cfg.NATPorts[1]}
	if err := d.objs.config().Put(uint32(0), value); err != nil {
		return fmt.Errorf("write sm_config: %w", err)
	}
	d.flags = flags
	return nil
}

// inCharge tells whether this is still the agent that opened the maps last. Two that write the same maps would undo each
// other's work; the one that is being replaced, and drains its connections, has to leave them alone.
func (d *Datapath) inCharge() bool {
	d.mu.Lock()
	displaced := d.guard.displaced
	d.mu.Unlock()
	var c configValue
	if err := d.objs.config().Lookup(uint32(0), &c); displaced || err != nil {
		return false
	}
	return c.Owner == d.owner
}

// SetAcceleration switches redirection of new connections on or off at run time; reason is what status says while it
// is off. Connections that are being redirected go on.
func (d *Datapath) SetAcceleration(on bool, reason string) error {
	var bits uint32
	if on {
		if d.splice == nil {
			return errors.New("acceleration was not possible at start: see the probes")
		}
		if err := d.attachMsg(); err != nil {
			return err
		}
		bits, reason = flagAccelerate, ""
	}
	if !d.inCharge() {
		return ErrSuperseded
	}
	if err := d.setFlags(bits, flagAccelerate); err != nil {
		return err
	}
	d.mu.Lock()
	d.accelReason = reason
	d.mu.Unlock()
	return nil
}

// Close releases descriptors; programs and maps stay pinned and keep working.
func (d *Datapath) Close() error {
	d.ownerFile.release()
	d.outside.close()
	d.nat.close()
	if d.nodeNetns != nil {
		d.nodeNetns.Close()
	}
	d.splice.close()
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, l := range d.links {
		errs = append(errs, l.Close())
	}
	d.links = nil
	d.objs.close()
	return errors.Join(errs...)
}

// Reconciler is the only writer of the maps that hold configuration.
func (d *Datapath) Reconciler() *Reconciler { return d.rec }

// addrPort turns the maps' form of an address into Go's; addr16 is the way back.
func addrPort(addr [16]byte, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(addr).Unmap(), port)
}

func addr16(a netip.Addr) [16]byte { return a.As16() }
