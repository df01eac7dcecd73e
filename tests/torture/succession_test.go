package torture

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// What an agent says of itself.
const (
	takenOver     = "another agent has taken over"
	inChargeAgain = "this one is in charge again"
)

// inCharge tells it by the agent's own words.
func inCharge(p *lab.Process) bool {
	log := p.Output()
	return p.Running() && strings.LastIndex(log, takenOver) <= strings.LastIndex(log, inChargeAgain) && strings.Contains(log, "canary connections go through")
}

// oneInCharge waits until exactly one of the agents is, has everything in force and is ready, and returns it.
func (w *town) oneInCharge(agents ...*lab.Process) *lab.Process {
	w.t.Helper()
	var chief *lab.Process
	w.eventually("one agent is in charge", func() error {
		chief = nil
		n := 0
		var said []string
		for _, a := range agents {
			if !a.Running() {
				return fmt.Errorf("an agent has ended:\n%s", a.Tail())
			}
			if inCharge(a) {
				chief, n = a, n+1
			}
			said = append(said, a.Tail())
		}
		if n != 1 {
			return fmt.Errorf("%d agents are in charge:\n%s", n, strings.Join(said, "\n\n"))
		}
		s, err := w.Status(w.ctx)
		if err == nil && !s.Ready {
			err = fmt.Errorf("not ready: %q", s.NotReadyReasons)
		}
		return err
	})
	return chief
}

// changesAreSeen makes one that only an agent in charge can put in force.
func (w *town) changesAreSeen() {
	w.t.Helper()
	late := service{"late", 99, tcpPort, echoPort}.spec(w.servers)
	w.must(w.SetService(late))
	frontends := func(want int) {
		w.t.Helper()
		w.must(w.WaitStatus(w.ctx, "the change is in the kernel", func(s lab.Status) bool {
			for _, m := range s.Datapath.Maps {
				if m.Name == "sm_frontends" {
					return m.Entries == want
				}
			}
			return false
		}))
	}
	frontends(12)
	w.must(w.DeleteService(late))
	frontends(10)
}

// A new agent takes over, and is killed, or ends: the old one, which still runs, takes charge again. Connections in the
// killed process break, nothing else does.
func TestSuccessorDiesUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	old := w.agent
	var kills []lab.Window
	for i := range times(2, 10) {
		w.agent = w.startAgent()
		w.eventually("the old agent steps back", func() error {
			if inCharge(old) {
				return errors.New("it does not")
			}
			return nil
		})
		load.flow(5)
		if i%2 == 0 {
			kills = append(kills, w.agent.KillTimed())
		} else {
			w.must(w.agent.Stop(time.Minute))
		}
		w.oneInCharge(old)
		load.flow(10)
		w.changesAreSeen()
	}
	w.agent = old
	w.judge("the successor dies", load.stop(killed(kills)), len(kills))
	w.nothingLeaked("the successor dies")
}

// Agents that start at one moment: one is in charge, the others wait; and when that one dies one of them takes its place,
// until the last.
func TestAgentsStartedAtOneMomentUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	var kills []lab.Window
	for i := range times(2, 10) {
		agents := []*lab.Process{w.agent}
		if i%2 == 1 { // with nobody there before
			w.must(w.agent.Stop(time.Minute))
			agents = nil
		}
		for range 2 {
			a, err := w.StartAgentNoWait()
			w.must(err)
			agents = append(agents, a)
		}
		for len(agents) > 1 {
			chief := w.oneInCharge(agents...)
			load.flow(5)
			w.changesAreSeen()
			kills = append(kills, chief.KillTimed())
			for i, a := range agents {
				if a == chief {
					agents = append(agents[:i:i], agents[i+1:]...)
					break
				}
			}
		}
		w.agent = w.oneInCharge(agents...)
		load.flow(5)
		w.changesAreSeen()
	}
	w.judge("agents started at one moment", load.stop(killed(kills)), len(kills))
	w.nothingLeaked("agents started at one moment")
}
