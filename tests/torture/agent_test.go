package torture

import (
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// SIGTERM and a new start, again and again: nobody notices.
func TestAgentStoppedAndStartedUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	for range times(1, 10) {
		w.must(w.agent.Stop(time.Minute))
		load.flow(10)
		w.agent = w.startAgent()
		load.flow(10)
	}
	w.judge("SIGTERM and restart", load.stop(nothing), 0)
	w.nothingLeaked("SIGTERM and restart")
}

// kill -9 at random moments: connections in the killed process break, each once; nothing else does, and no connect is
// refused while nobody is there.
func TestAgentKilledAtRandomMomentsUnderMixedLoad(t *testing.T) {
	w := newTown(t, 20*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	var kills []lab.Window
	for range times(5, 100) {
		kills = append(kills, w.kill())
		w.agent = w.startAgent()
	}
	w.judge("kill -9", load.stop(killed(kills)), len(kills))
	w.nothingLeaked("kill -9")
}

// An upgrade: the new agent starts beside the old one and takes over its listeners, the old one drains. Nothing fails,
// nothing is reset.
func TestAgentUpgradedUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 20*time.Millisecond)
	for range times(2, 20) {
		w.upgrade()
		load.flow(5)
	}
	w.judge("upgrade", load.stop(nothing), 0)
	w.nothingLeaked("upgrade")
}
