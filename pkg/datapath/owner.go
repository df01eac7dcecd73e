package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Who is in charge, and does it live?
//
// Whoever opens the maps writes its own number into sm_config and is in charge; the agent that was before sees another
// number and leaves the kernel's part alone. That is how an upgrade hands over. But the new agent may die, and the old one
// is still there, with its connections, its listeners and its knowledge of the cluster: then it should take charge again
// rather than watch Services go stale.
//
// So each agent holds a lock (flock) on a file that is named after its number, below Config.Owners. The kernel lets go of
// it when the process ends, however it ends. Whoever waits reads the number in sm_config and tries the lock of that file:
// it is free, so its owner is dead. A file that is missing says nothing: the agent may be of a build that makes none.
//
// Not everything can be taken back. An agent whose successor has maps of another layout, or has made its maps anew after
// the pins were lost, has no part in them; it stays out, as before.

// owner is this agent's file.
type owner struct {
	file *os.File // nil: Config.Owners is not set
}

func ownerPath(dir string, number uint64) string {
	return filepath.Join(dir, fmt.Sprintf("%016x", number))
}

// register makes and locks the file. Call it before the number is in sm_config.
func register(dir string, number uint64) (owner, error) {
	if dir == "" {
		return owner{}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return owner{}, fmt.Errorf("make the directory of agents: %w", err)
	}
	f, err := os.OpenFile(ownerPath(dir, number), os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return owner{}, fmt.Errorf("make this agent's own file: %w", err)
	}
	o := owner{f}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		o.retract()
		return owner{}, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return o, nil
}

// release lets go of the lock. The file stays: it tells a predecessor that waits that this agent has ended.
func (o owner) release() {
	if o.file != nil {
		o.file.Close()
	}
}

// retract is release of an agent that was never in charge.
func (o owner) retract() {
	if o.file != nil {
		_ = os.Remove(o.file.Name())
		o.file.Close()
	}
}

// ownerDead: the file is there, and nobody holds it.
func ownerDead(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
}

// Accompanied tells whether another agent of this node lives, in charge or not.
func (d *Datapath) Accompanied() bool {
	if d.cfg.Owners == "" {
		return false
	}
	entries, err := os.ReadDir(d.cfg.Owners)
	if err != nil {
		return false
	}
	own := filepath.Base(ownerPath("", d.owner))
	return slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		return e.Name() != own && !ownerDead(filepath.Join(d.cfg.Owners, e.Name()))
	})
}

// sweepOwners removes what dead agents have left, once nobody needs to be told any more.
func sweepOwners(dir string) error {
	if dir == "" {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if ownerDead(path) {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// InCharge tells whether this agent is the one that writes the maps and looks after pins and attachments.
func (d *Datapath) InCharge() bool { return d.inCharge() }

// Orphaned tells whether the agent that has taken over from this one is dead, so that Retake may be called.
func (d *Datapath) Orphaned() bool {
	d.mu.Lock()
	displaced := d.guard.displaced
	d.mu.Unlock()
	var c configValue
	if displaced || d.cfg.Owners == "" || d.objs.config().Lookup(uint32(0), &c) != nil || c.Owner == d.owner {
		return false
	}
	return ownerDead(ownerPath(d.cfg.Owners, c.Owner))
}

// Retake puts this agent in charge again after its successor has died: settings and programs are this one's, and the maps
// are made what its sources want, from what the successor left in them. Call it where no agent can be starting.
func (d *Datapath) Retake() error {
	if !d.Orphaned() {
		return errors.New("the agent that has taken over is not known to be dead")
	}
	// Nothing else of ours may write before the tables are known again.
	d.rec.applyMu.Lock()
	defer d.rec.applyMu.Unlock()
	t, err := newTables(d.objs)
	if err != nil {
		return fmt.Errorf("read what the maps hold: %w", err)
	}
	d.rec.adopt(t)
	if err := d.setFlags(d.rec.tableFlags(), flagTables); err != nil {
		return err
	}
	d.rec.superseded = false
	d.mu.Lock()
	verdict := d.guard.verdict
	d.mu.Unlock()
	if verdict {
		if err := d.attachMsg(); err != nil {
			return err
		}
	}
	if err := d.attachAll(); err != nil {
		return err
	}
	if d.outside != nil {
		d.outside.takeBack()
	} else if err := d.detachOutside(); err != nil {
		d.log.Warn("take the programs for clients outside off the devices", "error", err)
	}
	d.rec.wake()
	return sweepOwners(d.cfg.Owners)
}
