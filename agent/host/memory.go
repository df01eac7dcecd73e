package host

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// gcPercent is how much the heap may grow beyond what lives before garbage is collected. Go's default of 100 doubles what
// 250,000 endpoints hold; the paths that traffic takes allocate nothing, so collecting more often costs them nothing.
const gcPercent = 50

// LimitGarbage sets the garbage collector's pace, unless GOGC says otherwise.
func LimitGarbage() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// GiveBackMemory returns to the kernel what only the start needed: the heap's garbage, and the pages of the program itself,
// most of which are descriptions of Envoy's and Kubernetes' APIs that are read once. Code and constants that are used
// again come back from the page cache, a few at a time.
func GiveBackMemory() error {
	debug.FreeOSMemory()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("give memory back: %w", err)
	}
	text, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("give memory back: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		// 00400000-03a00000 r-xp 00000000 fe:00 12345 /usr/local/bin/sockmesh-agent
		fields := strings.Fields(line)
		if len(fields) < 6 || fields[5] != exe || strings.Contains(fields[1], "w") {
			continue // pages that may have been written exist here alone
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil {
			return fmt.Errorf("give memory back: /proc/self/maps has %q", line)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(end-start), unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("give the program's pages back: madvise: %w", errno)
		}
	}
	return nil
}
