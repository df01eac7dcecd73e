package node

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A node whose kernel, or whose container runtime, has no io_uring. Docker's and containerd's seccomp profiles forbid it, so
// this is no rarity.

// withoutUringIfAsked makes the process that COMMAND which was started as `EXE without-io-uring COMMAND...`, under a
// filter that answers io_uring_setup as a kernel without it does.
func withoutUringIfAsked() {
	if len(os.Args) < 3 || os.Args[1] != "without-io-uring" {
		return
	}
	runtime.LockOSThread() // filters are a thread's, and exec keeps those of the thread that calls it
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "without-io-uring:", err)
		os.Exit(1)
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_IO_URING_SETUP},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		fail(err)
	}
	path, err := exec.LookPath(os.Args[2])
	if err != nil {
		fail(err)
	}
	fail(syscall.Exec(path, os.Args[2:], os.Environ()))
}

func TestWithoutIoUringTheAgentSaysSoAndServes(t *testing.T) {
	w := newBareWorld(t, anywhere)
	exe, err := os.Executable()
	w.must(err)
	without := func(flags ...string) []string {
		return append([]string{exe, "without-io-uring"}, w.AgentCommand(append(flags, "--concurrency", "2")...)...)
	}
	// Asked for by name it is an error that says why.
	refused, err := w.Node.Start("sockmesh-agent", without("--io", "io_uring")...)
	w.must(err)
	select {
	case <-refused.Done():
	case <-w.ctx.Done():
		t.Fatal("the agent runs on a ring that there is not")
	}
	if out := refused.Output(); !strings.Contains(out, "no usable io_uring") || !strings.Contains(out, "function not implemented") {
		t.Errorf("the agent says: %s", out)
	}
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
	w.agent, err = w.Node.Start("sockmesh-agent", without()...)
	w.must(err)
	w.must(w.WaitReady(w.ctx, w.agent))
	w.eventually("the pod goes through the proxy", func() error { return w.proxied(w.client) })
	const said = "the proxy loop uses epoll"
	if out := w.agent.Output(); strings.Count(out, said) != 2 || !strings.Contains(out, "function not implemented") {
		t.Errorf("want %q once for each loop, with the reason: %s", said, out)
	}
}
