package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/proxy"
)

// One agent of a node is in charge of the kernel's part: the one that was started last, as long as it lives.
//
// An agent that is started beside another one takes over (pkg/datapath says how); the other one goes on serving the
// connections that it has and gets, and waits: for SIGTERM, as at an upgrade, or for its successor's death, after which
// it takes charge again. Starts are made one after the other, by a lock that lasts until an agent is in charge in every
// respect: two that start at one moment would meet in the self-test's addresses, and each could find the other's traces
// and step back.

// agentsDir is the part of --state-dir that agents of one node share.
func agentsDir(stateDir string) string { return filepath.Join(stateDir, "agents") }

const (
	// turnWait bounds the wait for another agent's start, which takes seconds, or --sync-timeout where maps of another layout
	// have to be filled. One that hangs for longer must not keep a node without an agent.
	turnWait = time.Minute
	turnPoll = 20 * time.Millisecond
)

// turn is the lock of starts.
type turn struct{ file *os.File }

// tryTurn takes it; nil without an error: somebody else has it.
func tryTurn(stateDir string) (*turn, error) {
	f, err := os.OpenFile(filepath.Join(stateDir, "starting"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--state-dir: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return &turn{f}, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
}

// end lets the next one start.
func (t *turn) end() {
	if t != nil {
		t.file.Close()
	}
}

// awaitTurn waits until no other agent is starting.
func (a *Agent) awaitTurn() error {
	for began, told := time.Now(), false; ; time.Sleep(turnPoll) {
		t, err := tryTurn(a.cfg.StateDir)
		if err != nil {
			return err
		}
		if t != nil {
			a.turn.Store(t)
			return nil
		}
		if !told {
			a.log.Info("another agent is starting on this node: this one waits, and takes over from it then")
			told = true
		}
		if time.Since(began) > turnWait {
			a.log.Warn("another agent has been starting for too long: this one takes over", "waited", turnWait)
			return nil
		}
	}
}

// endTurn is called when this agent is in charge in every respect, or has ended.
func (a *Agent) endTurn() { a.turn.Swap(nil).end() }

// successionPoll is how often an agent looks whether another one has taken over, or has died after that.
const successionPoll = 250 * time.Millisecond

// watchSuccession notices that another agent has been started beside this one, as at an upgrade: it has taken the admin
// socket's name, and pkg/datapath leaves the maps to whoever opened them last. This one serves the connections that it
// has and gets; its canary is not in the kernel's tables any more. And it notices that the other one has died.
func (a *Agent) watchSuccession(ctx context.Context) error {
	tick := time.NewTicker(successionPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		switch {
		case !a.succeeded.Load():
			if a.superseded() {
				a.succeeded.Store(true)
				a.closeHealth()
				a.log.Warn("another agent has taken over: this one only serves what it has, until SIGTERM or the other one's end", "admin", a.cfg.Admin)
			}
		case a.draining.Load():
			// It is on its way out: what is in the kernel keeps working without it.
		case a.datapath.Orphaned(), a.datapath.InCharge() && a.nameIsFree():
			a.takeBack(ctx)
		}
	}
}

// superseded: another agent has been started beside this one and has taken over.
func (a *Agent) superseded() bool {
	return a.succeeded.Load() || a.admin != nil && a.admin.Replaced() || !a.datapath.InCharge()
}

// leaveListener is told of a pod's listener that is about to close. Where another agent lives, the hooks must go on sending
// connections to the port, and that one gets them: the successor, whose listener came second, or the one that was there
// before and takes charge again. Without another they must not send any.
func (a *Agent) leaveListener(fd int) (heir int, err error) {
	switch {
	case a.superseded():
		return 1, nil
	case a.datapath.Accompanied():
		return 0, nil
	}
	return proxy.NoHeir, a.datapath.DisownListener(fd)
}

// nameIsFree: the admin socket is this agent's, or that of one that has ended before the kernel's part was its own.
func (a *Agent) nameIsFree() bool { return !a.admin.Replaced() || a.admin.Abandoned() }

// takeBack puts this agent in charge again. What fails is tried again at the next look.
func (a *Agent) takeBack(ctx context.Context) {
	t, err := tryTurn(a.cfg.StateDir)
	if err != nil {
		a.log.Error("look whether another agent is starting", "error", err)
		return
	}
	if t == nil {
		return // it will be in charge itself
	}
	defer t.end()
	if !a.datapath.InCharge() {
		if !a.datapath.Orphaned() {
			return // it has been, in between
		}
		if err := a.datapath.Retake(); err != nil {
			a.log.Error("the agent that had taken over is dead, and this one can't take charge again", "error", err)
			return
		}
	}
	if a.admin.Replaced() || a.admin.Abandoned() {
		if err := a.admin.TakeName(); err != nil {
			a.log.Error("take the admin socket's name back", "error", err)
			return
		}
	}
	a.succeeded.Store(false)
	if a.healthOpen.Load() {
		a.checks.Reopen()
		if a.nodeHealth != nil {
			a.nodeHealth.Reopen()
		}
	}
	if err := a.datapath.Reconciler().Flush(ctx); err != nil && !errors.Is(err, datapath.ErrSuperseded) {
		a.log.Warn("the kernel's tables don't follow", "error", err)
	}
	a.log.Warn("the agent that had taken over is dead: this one is in charge again")
}
