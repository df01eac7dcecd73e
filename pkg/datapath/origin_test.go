package datapath

import (
	"errors"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The look-up hands the kernel a Go struct to write into: it must have the size of the map's value, and cost nothing but the
// system call.
func TestAskingForAnOriginalDestinationAllocatesNothing(t *testing.T) {
	d := newWorld(t).open()
	if got, want := uint32(unsafe.Sizeof(sockValue{})), d.objs.sock().ValueSize(); got != want {
		t.Fatalf("the map's values have %d bytes, Go's form of them %d", want, got)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	ask := func() {
		if _, _, err := d.OriginalDst(fd); !errors.Is(err, ErrNoOrigin) {
			t.Fatalf("a socket that nobody redirected has an original destination: %v", err)
		}
	}
	ask()
	if n := testing.AllocsPerRun(1000, ask); n > 0.1 { // the pool is emptied by a collection
		t.Errorf("%v allocations", n)
	}
}
