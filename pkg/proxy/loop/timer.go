package loop

import (
	"math/bits"
	"time"
)

// The wheel is hierarchical: six levels of 64 slots, one millisecond per slot on the lowest. Starting and
// stopping a timer is O(1), and the bitmaps tell when the next one is due, so that a loop full of one-hour idle
// timers sleeps instead of ticking.
const (
	wheelLevels = 6
	wheelBits   = 6
	wheelSlots  = 1 << wheelBits
	tick        = int64(time.Millisecond)
)

// Timer calls a function on the loop after a delay. It is meant to be embedded: starting and stopping it
// allocates nothing. The zero Timer needs Init before use.
type Timer struct {
	next, prev *Timer
	w          *wheel
	fn         func()
	when       uint64 // tick
	level      int8   // -1: taken out of the wheel, about to be called
	slot       uint8
}

// Init sets what the timer calls. The function runs on the loop's thread.
func (t *Timer) Init(fn func()) { t.fn = fn }

// Active says whether the timer is started and has not been called yet.
func (t *Timer) Active() bool { return t.w != nil }

// Stop keeps the timer from being called. Stopping a stopped timer does nothing. Only on the loop's thread.
func (t *Timer) Stop() {
	if t.w != nil {
		t.w.remove(t)
	}
}

// StartTimer (re)starts t so that it is called after d, rounded up to a millisecond. Only on the loop's thread.
func (l *Loop) StartTimer(t *Timer, d time.Duration) {
	if d < 0 {
		d = 0
	}
	t.Stop()
	l.wheel.insert(t, uint64((l.now+int64(d)+tick-1)/tick))
}

type wheel struct {
	elapsed  uint64 // ticks up to which the wheel has been advanced
	occupied [wheelLevels]uint64
	slots    [wheelLevels][wheelSlots]Timer // list heads
	firing   Timer                          // list head
	count    int
}

func (w *wheel) init(now int64) {
	w.elapsed = uint64(now / tick)
	for l := range w.slots {
		for s := range w.slots[l] {
			h := &w.slots[l][s]
			h.next, h.prev = h, h
		}
	}
	w.firing.next, w.firing.prev = &w.firing, &w.firing
}

func (w *wheel) insert(t *Timer, when uint64) {
	if when <= w.elapsed {
		when = w.elapsed + 1
	}
	const horizon = 1<<(wheelBits*wheelLevels) - 1
	if when-w.elapsed > horizon {
		when = w.elapsed + horizon
	}
	t.when, t.w = when, w
	w.count++
	w.place(t)
}

// place links t at the level where its tick first differs from the present.
func (w *wheel) place(t *Timer) {
	level := (bits.Len64((w.elapsed^t.when)|(wheelSlots-1)) - 1) / wheelBits
	if level >= wheelLevels {
		level = wheelLevels - 1
	}
	slot := (t.when >> (wheelBits * level)) & (wheelSlots - 1)
	t.level, t.slot = int8(level), uint8(slot)
	h := &w.slots[level][slot]
	t.prev, t.next = h.prev, h
	h.prev.next = t
	h.prev = t
	w.occupied[level] |= 1 << slot
}

func (w *wheel) unlink(t *Timer) {
	t.prev.next, t.next.prev = t.next, t.prev
	t.next, t.prev = nil, nil
	if t.level >= 0 {
		if h := &w.slots[t.level][t.slot]; h.next == h {
			w.occupied[t.level] &^= 1 << t.slot
		}
	}
}

func (w *wheel) remove(t *Timer) {
	w.unlink(t)
	t.w = nil
	w.count--
}

// due returns the tick at which the wheel must be looked at next, and where.
func (w *wheel) due() (deadline uint64, level, slot int, ok bool) {
	for level = range w.occupied {
		occ := w.occupied[level]
		if occ == 0 {
			continue
		}
		shift := uint(wheelBits * level)
		nowSlot := int(w.elapsed>>shift) & (wheelSlots - 1)
		slot = (bits.TrailingZeros64(bits.RotateLeft64(occ, -nowSlot)) + nowSlot) & (wheelSlots - 1)
		span := uint64(1) << (shift + wheelBits)
		deadline = w.elapsed&^(span-1) + uint64(slot)<<shift
		if deadline < w.elapsed { // wrapped round the top level
			deadline += span
		}
		return deadline, level, slot, true
	}
	return 0, 0, 0, false
}

// advance calls every timer that is due at now. Timers started by the called functions are not called in the
// same round.
func (w *wheel) advance(now int64) {
	to := uint64(now / tick)
	for w.count > 0 {
		deadline, level, slot, ok := w.due()
		if !ok || deadline > to {
			break
		}
		if deadline > w.elapsed {
			w.elapsed = deadline
		}
		h := &w.slots[level][slot]
		w.occupied[level] &^= 1 << slot
		for h.next != h {
			t := h.next
			h.next, t.next.prev = t.next, h
			if t.when > w.elapsed {
				w.place(t)
				continue
			}
			t.level = -1
			f := &w.firing
			t.prev, t.next = f.prev, f
			f.prev.next = t
			f.prev = t
		}
		for f := &w.firing; f.next != f; {
			t := f.next
			w.remove(t)
			t.fn()
		}
	}
	if to > w.elapsed {
		w.elapsed = to
	}
}

// wait returns how long the loop may sleep at now; negative means until something happens.
func (w *wheel) wait(now int64) time.Duration {
	deadline, _, _, ok := w.due()
	if !ok {
		return -1
	}
	return time.Duration(max(int64(deadline)*tick-now, 0))
}
