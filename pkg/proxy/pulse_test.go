package proxy

import (
	"strings"
	"testing"
	"time"
)

// A loop that is blocked is named, the others are not, and it is forgiven when it goes on.
func TestALoopThatIsStuckIsNoticed(t *testing.T) {
	e := startEngine(t, Config{Concurrency: 2})
	block := make(chan struct{})
	if !e.workers[1].loop.Post(func() { <-block }) {
		t.Fatal("the loop has ended")
	}
	defer func() {
		select {
		case <-block:
		default:
			close(block)
		}
	}()
	eventually(t, "the loop is called stuck", func() bool { return len(e.Stuck()) > 0 })
	if got := e.Stuck(); len(got) != 1 || got[0].Index != 1 || got[0].For < StuckAfter || !strings.Contains(got[0].String(), "proxy loop 1 ") {
		t.Errorf("%v", got)
	}
	if silent := e.Silent(); silent[0] >= StuckAfter || silent[1] < StuckAfter {
		t.Errorf("%v", silent)
	}
	close(block)
	eventually(t, "the loop is forgiven", func() bool { return len(e.Stuck()) == 0 })
}

// Loops that work, and loops that have nothing to do, answer.
func TestLoopsThatWorkAreNotCalledStuck(t *testing.T) {
	e := startEngine(t, Config{Concurrency: 2})
	busy := true
	var again func()
	again = func() {
		for end := time.Now().Add(10 * time.Millisecond); time.Now().Before(end); {
		}
		if busy {
			e.workers[0].loop.Post(again)
		}
	}
	e.workers[0].loop.Post(again)
	time.Sleep(StuckAfter + 2*time.Second)
	if got := e.Stuck(); len(got) > 0 {
		t.Errorf("%v", got)
	}
	e.workers[0].loop.Post(func() { busy = false })
}
