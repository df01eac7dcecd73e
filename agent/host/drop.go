package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The agent gives up what it does not need before it reads a byte that anybody else wrote. What is kept is what the DaemonSet
// grants, so that an agent that was started by hand as root, or in a privileged container, is no more powerful than
// one on a cluster. What is kept is needed for as long as the agent runs:
//
//	CAP_SYS_ADMIN         pods come at any time, and their listeners and every upstream socket are made inside their
//	                      network namespaces: setns(2) asks for nothing less. Programs and maps by id; a BPF file
//	                      system that somebody has unmounted.
//	CAP_NET_ADMIN         to attach programs again that were detached, cut off a connection that can't be repaired
//	                      (sock_diag), attach to devices that appear.
//	CAP_BPF, CAP_PERFMON  maps are written and programs loaded all the time; CAP_SYS_ADMIN includes both, so they add
//	                      nothing, and are kept for the day when setns(2) can be had for less.
//	CAP_NET_BIND_SERVICE  listeners of the node on ports below 1024, which the control plane may add at any time.
//
// Everything else goes from every set of every thread, the bounding set included, and no_new_privs keeps a program that
// might be executed from getting anything back. What follows for files: no capability overrides their permissions any
// more, so what the agent reads or writes must be root's or open to root by its mode.
//
// A seccomp filter of our own is left out on purpose. What is kept can load BPF programs and enter namespaces: no filter
// that lets bpf(2) and setns(2) pass stands between such a process and the kernel, and one that is wrong about a
// Go runtime to come ends the node's data plane. The container runtime's default profile applies in the DaemonSet.

// kept says which capabilities remain, of those that the agent was given.
func kept() uint64 {
	set := uint64(1 << unix.CAP_NET_BIND_SERVICE)
	for _, c := range capabilities {
		set |= 1 << c.bit
	}
	return set
}

// DropPrivileges reduces every thread of this process, those to come included, to the capabilities above and sets
// no_new_privs. It returns the names of those that are left. It changes the bounding set only where that holds more, because
// changing it takes CAP_SETPCAP, which the DaemonSet doesn't grant and doesn't need.
func DropPrivileges() ([]string, error) {
	have, err := effectiveCapabilities()
	if err != nil {
		return nil, fmt.Errorf("drop privileges: reading this process's capabilities: %w", err)
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0); errno == unix.ENOTSUP {
		return nil, errors.New("drop privileges: this program was built with cgo, whose threads Go doesn't know all: build it with " +
			"CGO_ENABLED=0, as `make build` does (--drop-privileges=off goes on with everything)")
	}
	keep := have & kept()
	if err := errors.Join(dropBounding(keep), dropSets(keep)); err != nil {
		return nil, fmt.Errorf("drop privileges: %w (--drop-privileges=off goes on with everything)", err)
	}
	if err := everyThread(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return nil, fmt.Errorf("drop privileges: set no_new_privs: %w (--drop-privileges=off goes on without it)", err)
	}
	if err := verify(keep); err != nil {
		return nil, fmt.Errorf("drop privileges: %w", err)
	}
	return names(keep), nil
}

// dropBounding takes what goes beyond keep out of the bounding set.
func dropBounding(keep uint64) error {
	for c := 0; c <= unix.CAP_LAST_CAP+16; c++ { // the kernel may know more than our headers: it ends the list with EINVAL
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the bounding set: %w", err)
		}
		if in == 0 || keep&(1<<c) != 0 {
			continue
		}
		if err := everyThread(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0); err != nil {
			return fmt.Errorf("take %s out of the bounding set: %w: start the agent with CAP_SETPCAP, or with the capabilities of deploy/daemonset.yaml alone", names(1 << c)[0], err)
		}
	}
	return nil
}

// dropSets sets the effective and the permitted set, and empties the inheritable and the ambient one.
func dropSets(keep uint64) error {
	// EINVAL: a kernel without ambient capabilities.
	if err := everyThread(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clear the ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // pid 0: the calling thread
	var data [2]unix.CapUserData
	for i := range data {
		half := uint32(keep >> (32 * i))
		data[i] = unix.CapUserData{Effective: half, Permitted: half}
	}
	// Not by everyThread: pointers must be converted in the very call, which then keeps them where they are.
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0)
	if errno != 0 {
		return fmt.Errorf("set the capabilities: %w", errno)
	}
	return nil
}

// everyThread makes a system call on each of the process's threads, at one moment: Linux keeps these attributes per thread,
// and Go runs goroutines on any. Threads that are made later inherit.
func everyThread(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// verify reads from /proc what every thread is left with, rather than believe it.
func verify(keep uint64) error {
	files, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			return fmt.Errorf("look at a thread's capabilities: %w", err)
		}
		for _, field := range []string{"CapPrm", "CapEff", "CapBnd"} {
			got, err := capabilityField(string(b), field)
			if err != nil {
				return err
			}
			if extra := got &^ keep; extra != 0 {
				return fmt.Errorf("%s of %s still has %s", field, f, strings.Join(names(extra), ", "))
			}
		}
	}
	return nil
}

// names of capabilities, in the order of their numbers.
func names(set uint64) []string {
	var out []string
	for bit := range 64 {
		if set&(1<<bit) == 0 {
			continue
		}
		name := fmt.Sprintf("capability %d", bit)
		if bit == unix.CAP_NET_BIND_SERVICE {
			name = "CAP_NET_BIND_SERVICE"
		} else if i := slices.IndexFunc(capabilities, func(c capability) bool { return c.bit == bit }); i >= 0 {
			name = capabilities[i].name
		}
		out = append(out, name)
	}
	return out
}
