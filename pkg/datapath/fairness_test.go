package datapath

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// A Service's backends are drawn evenly, whichever came and went before. Real connections are counted where they arrive, and
// chi-square says whether the counts are those of a fair draw.

// chiSquareZ is the normal deviate that a fair draw exceeds once in two million tests: two statistics are looked at, so a
// false alarm is about one in a million runs.
const chiSquareZ = 4.892

// chiSquareLimit is the value that chi-square with so many degrees of freedom exceeds with that probability, by the
// approximation of Wilson and Hilferty.
func chiSquareLimit(freedom int) float64 {
	v := 2 / (9 * float64(freedom))
	return float64(freedom) * math.Pow(1-v+chiSquareZ*math.Sqrt(v), 3)
}

func TestBackendsAreDrawnFairlyWhileTheyComeAndGo(t *testing.T) {
	const (
		ports    = 140 // backends that there are
		present  = 100 // of which so many serve at a time
		core     = 50  // of which these always do
		epochs   = 15
		perEpoch = 1000
	)
	w := newWorld(t)
	client, server := w.pod(), w.pod()
	var arrived [ports]atomic.Int64
	var total atomic.Int64
	for i := range ports {
		server.serve(uint16(8000+i), func(c *net.TCPConn) {
			arrived[i].Add(1)
			total.Add(1)
			c.Close()
		})
	}
	d := w.open()
	synced(t, d)
	seed := rand.Uint64()
	pick := rand.New(rand.NewPCG(seed, seed))
	serving := make([]int, present)
	for i := range serving {
		serving[i] = i
	}
	set := func() {
		var to []netip.AddrPort
		for _, i := range serving {
			to = append(to, ap(server.v4, uint16(8000+i)))
		}
		d.Reconciler().SetService(svc("web", vip4, to...))
		flush(t, d)
	}
	// churn replaces some backends outside the core by others, in single steps as endpoints come and go.
	churn := func() {
		for range 1 + pick.IntN(12) {
			at := core + pick.IntN(len(serving)-core)
			serving = slices.Delete(serving, at, at+1)
			set()
			for {
				if next := pick.IntN(ports); !slices.Contains(serving, next) {
					serving = append(serving, next)
					break
				}
			}
			set()
		}
	}
	set()

	var sum float64 // over the epochs, in each of which the set stands still
	coreExpected := float64(epochs*perEpoch) / present
	made := int64(0)
	for range epochs {
		churn()
		var before [ports]int64
		for i := range before {
			before[i] = arrived[i].Load()
		}
		hangUp(t, client, vip4, perEpoch)
		made += perEpoch
		eventually(t, "every connection has arrived", func() bool { return total.Load() == made })
		expected := float64(perEpoch) / present
		counted := int64(0)
		for _, i := range serving {
			n := arrived[i].Load() - before[i]
			counted += n
			sum += (float64(n) - expected) * (float64(n) - expected) / expected
		}
		if counted != perEpoch {
			t.Fatalf("%d of %d connections went to backends that are none now (seed %d)", perEpoch-counted, perEpoch, seed)
		}
	}
	freedom := epochs * (present - 1)
	t.Logf("seed %d: chi-square within epochs %.1f with %d degrees of freedom, limit %.1f", seed, sum, freedom, chiSquareLimit(freedom))
	if sum > chiSquareLimit(freedom) {
		t.Errorf("picks are not those of a fair draw: chi-square %.1f exceeds %.1f (seed %d)", sum, chiSquareLimit(freedom), seed)
	}

	// A small but lasting preference would hide in single epochs: the core, over all of them, and all others together.
	var lasting float64
	others := float64(epochs * perEpoch)
	for i := range core {
		n := float64(arrived[i].Load())
		lasting += (n - coreExpected) * (n - coreExpected) / coreExpected
		others -= n
	}
	rest := coreExpected * (present - core)
	lasting += (others - rest) * (others - rest) / rest
	t.Logf("chi-square of the %d that always serve %.1f with %d degrees of freedom, limit %.1f", core, lasting, core, chiSquareLimit(core))
	if lasting > chiSquareLimit(core) {
		t.Errorf("some backends are preferred for long: chi-square %.1f exceeds %.1f (seed %d)", lasting, chiSquareLimit(core), seed)
	}
}

// TestTheFairnessTestNoticesAnUnfairDraw feeds the limit with a draw of which one backend in a hundred gets twice its share.
func TestTheFairnessTestNoticesAnUnfairDraw(t *testing.T) {
	const backends, draws = 100, 15000
	count := make([]float64, backends)
	pick := rand.New(rand.NewPCG(7, 7))
	for range draws {
		count[pick.IntN(backends+1)%backends]++
	}
	var x float64
	for _, n := range count {
		x += (n - draws/backends) * (n - draws/backends) / (draws / backends)
	}
	if limit := chiSquareLimit(backends - 1); x < limit {
		t.Errorf("chi-square %.1f is below the limit %.1f", x, limit)
	}
}

// hangUp connects so often, one after another, and resets each connection at once, so that ports are free again.
func hangUp(t testing.TB, from *ns, to netip.AddrPort, n int) {
	t.Helper()
	var err error
	from.do(func() {
		sa := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		for i := 0; i < n && err == nil; i++ {
			if err = connectAndReset(unix.AF_INET, sa); err != nil {
				err = fmt.Errorf("connection %d: %w", i, err)
			}
		}
	})
	must(t, err)
}
