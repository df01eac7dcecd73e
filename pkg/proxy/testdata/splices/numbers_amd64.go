package sample

import (
	"syscall"

	"golang.org/x/sys/unix"
)

const mine = 275 // splice on amd64

func numbers(a, b, which uintptr) {
	_, _, _ = syscall.RawSyscall6(mine, a, 0, b, 0, 1, 0)               // caught: SYS_SPLICE
	_, _, _ = syscall.Syscall6(276, a, b, 1, 0, 0, 0)                   // caught: SYS_TEE
	_, _, _ = unix.Syscall6(20+20, a, b, 0, 1, 0, 0)                    // caught: SYS_SENDFILE
	_, _, _ = unix.RawSyscall(unix.SYS_VMSPLICE, a, b, 1)               // caught: golang.org/x/sys/unix.SYS_VMSPLICE
	_, _, _ = syscall.RawSyscall6(syscall.SYS_SPLICE, a, 0, b, 0, 1, 0) // caught: syscall.SYS_SPLICE
	_, _, _ = syscall.RawSyscall(which, a, b, 1)                        // caught: the number of a raw system call must be a constant
	_, _, _ = syscall.RawSyscall(unix.SYS_READ, a, b, 1)
	_, _, _ = syscall.RawSyscall(unix.SYS_SENDTO, a, b, 1)
}
