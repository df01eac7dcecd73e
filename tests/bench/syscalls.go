package main

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// System calls are counted in the kernel, by a program at the tracepoint that every call enters: strace would stop the proxy
// at each, requests would pile up meanwhile, and a proxy that works in batches would look better than it is.

// callNames are the calls that proxies make at load; the rest is counted as "other".
var callNames = map[int]string{
	unix.SYS_READ: "read", unix.SYS_WRITE: "write", unix.SYS_READV: "readv", unix.SYS_WRITEV: "writev",
	unix.SYS_RECVFROM: "recvfrom", unix.SYS_SENDTO: "sendto", unix.SYS_RECVMSG: "recvmsg", unix.SYS_SENDMSG: "sendmsg",
	unix.SYS_EPOLL_WAIT: "epoll_wait", unix.SYS_EPOLL_PWAIT: "epoll_wait", unix.SYS_EPOLL_PWAIT2: "epoll_wait", unix.SYS_EPOLL_CTL: "epoll_ctl",
	unix.SYS_ACCEPT: "accept", unix.SYS_ACCEPT4: "accept", unix.SYS_SOCKET: "socket", unix.SYS_CONNECT: "connect", unix.SYS_CLOSE: "close",
	unix.SYS_SHUTDOWN: "shutdown", unix.SYS_SETSOCKOPT: "setsockopt", unix.SYS_GETSOCKOPT: "getsockopt", unix.SYS_GETSOCKNAME: "getsockname",
	unix.SYS_BIND: "bind", unix.SYS_BPF: "bpf", unix.SYS_SETNS: "setns", unix.SYS_FUTEX: "futex", unix.SYS_IO_URING_ENTER: "io_uring_enter",
	unix.SYS_SPLICE: "splice", unix.SYS_NANOSLEEP: "nanosleep", unix.SYS_GETPID: "getpid", unix.SYS_TGKILL: "tgkill",
	unix.SYS_FCNTL: "fcntl", unix.SYS_IOCTL: "ioctl", unix.SYS_MADVISE: "madvise", unix.SYS_CLOCK_GETTIME: "clock_gettime",
}

// lastCall is where calls with higher numbers are counted.
const lastCall = 511

// syscallCounter counts the calls of a proxy's processes. Nil, for no proxy, counts nothing.
type syscallCounter struct {
	counts *ebpf.Map
	close  func()
}

func countSyscalls(set setup) (c *syscallCounter, err error) {
	if set.proxy == nil {
		return nil, nil
	}
	var toClose []interface{ Close() error }
	c = &syscallCounter{close: func() {
		for _, x := range toClose {
			_ = x.Close()
		}
	}}
	defer func() {
		if err != nil {
			c.close()
			err = fmt.Errorf("count system calls: %w", err)
		}
	}()
	watched, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 64})
	if err != nil {
		return nil, err
	}
	toClose = append(toClose, watched)
	if c.counts, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: lastCall + 1}); err != nil {
		return nil, err
	}
	toClose = append(toClose, c.counts)
	if err := eachProcess(set.proxy.PID(), func(pid int) error { return watched.Put(uint32(pid), uint32(1)) }); err != nil {
		return nil, err
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_syscalls", Type: ebpf.RawTracepoint, License: "GPL", Instructions: countingProgram(watched, c.counts)})
	if err != nil {
		return nil, err
	}
	toClose = append(toClose, program)
	attached, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sys_enter", Program: program})
	if err != nil {
		return nil, err
	}
	toClose = append(toClose, attached)
	return c, nil
}

// countingProgram adds one to the call's count if the caller is watched.
func countingProgram(watched, counts *ebpf.Map) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetCurrentPidTgid.Call(),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, -4, asm.R0, asm.Word),
		asm.LoadMapPtr(asm.R1, watched.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R1, asm.R6, 8, asm.DWord), // the call's number
		asm.JLE.Imm(asm.R1, lastCall, "known"),
		asm.Mov.Imm(asm.R1, lastCall),
		asm.StoreMem(asm.RFP, -4, asm.R1, asm.Word).WithSymbol("known"),
		asm.LoadMapPtr(asm.R1, counts.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}
}

// perRequest ends the counting. The error is that of the load, passed on.
func (c *syscallCounter) perRequest(requests int64, loadErr error) (map[string]float64, error) {
	if c == nil {
		return nil, loadErr
	}
	defer c.close()
	if loadErr != nil {
		return nil, loadErr
	}
	if requests == 0 {
		return nil, errors.New("not one request was answered")
	}
	calls := map[string]float64{}
	for number := range uint32(lastCall + 1) {
		var n uint64
		if err := c.counts.Lookup(number, &n); err != nil {
			return nil, err
		}
		if n == 0 {
			continue
		}
		name := callNames[int(number)]
		if name == "" {
			name = "other"
		}
		calls[name] += float64(n) / float64(requests)
	}
	return calls, nil
}
