package loop

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestTheWheelAgreesWithASortedList plays random starts, stops and advances against a plain list.
func TestTheWheelAgreesWithASortedList(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 2))
		var w wheel
		now := int64(rng.Uint64N(1 << 50))
		w.init(now)
		type timer struct {
			Timer
			due   uint64
			fired bool
		}
		var started []*timer
		fire := func(tm *timer) {
			if tm.due*uint64(tick) > uint64(now) {
				t.Fatalf("seed %d: called %d ticks early", seed, tm.due-uint64(now/tick))
			}
			tm.fired = true
		}
		for range 300 {
			switch rng.IntN(4) {
			case 0, 1:
				tm := &timer{}
				tm.Init(func() { fire(tm) })
				tm.due = uint64(now/tick) + 1 + rng.Uint64N(1<<rng.UintN(37))
				w.insert(&tm.Timer, tm.due)
				started = append(started, tm)
			case 2:
				if len(started) > 0 {
					i := rng.IntN(len(started))
					started[i].Stop()
					started = slices.Delete(started, i, i+1)
				}
			case 3:
				now += int64(rng.Uint64N(1 << rng.UintN(44)))
				if d := w.wait(now); len(started) > 0 && d < 0 {
					t.Fatalf("seed %d: would sleep for ever", seed)
				}
				w.advance(now)
				started = slices.DeleteFunc(started, func(tm *timer) bool {
					if due := tm.due <= uint64(now/tick); due != tm.fired {
						t.Fatalf("seed %d: due %v, called %v", seed, due, tm.fired)
					}
					return tm.fired
				})
				for _, tm := range started {
					if d := w.wait(now); int64(d) > int64(tm.due)*tick-now {
						t.Fatalf("seed %d: would sleep past a timer", seed)
					}
				}
			}
			if w.count != len(started) {
				t.Fatalf("seed %d: %d timers, want %d", seed, w.count, len(started))
			}
		}
	}
}

func TestTimersMayStopAndRestartEachOther(t *testing.T) {
	l := startLoop(t)
	done := make(chan int)
	do(t, l, func() {
		var a, b, c Timer
		n := 0
		b.Init(func() { t.Error("a stopped timer was called") })
		c.Init(func() { a.Stop(); done <- n })
		l.StartTimer(&a, time.Millisecond)
		l.StartTimer(&b, time.Millisecond)
		a.Init(func() {
			b.Stop()
			if n++; n < 5 {
				l.StartTimer(&a, 0)
			} else {
				l.StartTimer(&c, time.Millisecond)
			}
		})
	})
	select {
	case n := <-done:
		if n != 5 {
			t.Fatalf("called %d times", n)
		}
	case <-time.After(patience):
		t.Fatal("never called")
	}
}
