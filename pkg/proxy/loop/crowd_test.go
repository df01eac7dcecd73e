package loop

import "testing"

// Clients that have answers written for them and never read hold a megabyte each while they are few, and little each
// when they are many: one pod's memory is everybody's.
func TestClientsThatNeverReadHoldLittleTogether(t *testing.T) {
	l := startLoop(t)
	held := make(chan [2]int)
	l.Post(func() {
		const many = 500
		var conns []*Conn
		piece := make([]byte, smallChunk)
		first := 0
		for range many {
			c := &Conn{l: l, fd: -1, state: stateOpen, blocked: true, high: 1 << 20}
			conns = append(conns, c)
			for !c.AboveHigh() {
				c.Write(piece)
			}
			if first == 0 {
				first = l.pool.lent
			}
		}
		all := l.pool.lent
		for _, c := range conns {
			c.state = stateDead // nobody is to be told that there is room again
			c.dropOutput()
		}
		held <- [2]int{first, all - crowded - 1<<20 - many*(crowdedHigh+2*smallChunk)}
	})
	got := <-held
	if got[0] < 1<<20 {
		t.Errorf("a client alone may hold %d bytes, want its listener's limit", got[0])
	}
	if got[1] > 0 {
		t.Errorf("many clients hold %d bytes more than they should", got[1])
	}
}
