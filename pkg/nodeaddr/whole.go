package nodeaddr

import (
	"errors"
	"time"

	"github.com/vishvananda/netlink"
)

// Lists from the kernel come in pieces, and what changes between two of them can be missing or be there twice.

// wholeTries bounds how often a list is asked for; a node on which pods start without pause interrupts some of them.
const wholeTries = 50

// Whole asks a netlink dump until nothing changed while it was made: the kernel marks one that may lack entries or have
// some twice (NLM_F_DUMP_INTR), since the list of devices is one for all that happens in a network namespace. What it
// returns in the end is the last answer, with netlink.ErrDumpInterrupted if even that was cut up.
func Whole[T any](list func() ([]T, error)) ([]T, error) {
	for tries := 1; ; tries++ {
		got, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || tries == wholeTries {
			return got, err
		}
		time.Sleep(time.Duration(tries) * 100 * time.Microsecond)
	}
}
