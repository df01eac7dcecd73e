package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Which core runs what. From four cores on, client and server have one each, the last two, and the proxy the rest; on fewer
// the kernel decides, and they share.

type role int

const (
	clientRole role = iota
	serverRole
	proxyRole
)

const coresToPin = 4

// coresOf the role: its first and its last.
func coresOf(r role) (first, last int) {
	switch n := runtime.NumCPU(); r {
	case clientRole:
		return n - 1, n - 1
	case serverRole:
		return n - 2, n - 2
	default:
		return 0, n - 3
	}
}

// pinned is the command line that runs args on the cores of its role.
func pinned(r role, args ...string) []string {
	if runtime.NumCPU() < coresToPin {
		return args
	}
	first, last := coresOf(r)
	return append([]string{"taskset", "-c", fmt.Sprintf("%d-%d", first, last)}, args...)
}

// pin moves a process that runs, its threads and its children to the cores of its role.
func pin(r role, p *lab.Process) error {
	if runtime.NumCPU() < coresToPin {
		return nil
	}
	var set unix.CPUSet
	for first, last := coresOf(r); first <= last; first++ {
		set.Set(first)
	}
	return eachProcess(p.PID(), func(pid int) error {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		for _, t := range threads {
			tid, _ := strconv.Atoi(t.Name())
			// A thread that has ended meanwhile needs no core.
			if e := unix.SchedSetaffinity(tid, &set); e != nil && tid == pid {
				err = e
			}
		}
		return err
	})
}

// coreUse says so.
func coreUse() string {
	n := runtime.NumCPU()
	if n < coresToPin {
		return fmt.Sprintf("client, server and proxy share %d cores", n)
	}
	return fmt.Sprintf("client on core %d, server on core %d, the proxy on cores 0 to %d", n-1, n-2, n-3)
}
