package node

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// freeze stops one thread of a process, found by its name, as a debugger does; the result lets it go on. Both happen on a
// thread of their own: only the one that has attached may detach.
func freeze(t *testing.T, p *lab.Process, name string) (thaw func()) {
	t.Helper()
	tid := 0
	comms, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range comms {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == name {
			tid, _ = strconv.Atoi(filepath.Base(filepath.Dir(file)))
		}
	}
	if tid == 0 {
		t.Fatalf("no thread of %v is called %s", comms, name)
	}
	frozen, release, ended := make(chan error), make(chan struct{}), make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := unix.PtraceAttach(tid)
		if err == nil {
			var status unix.WaitStatus
			_, err = unix.Wait4(tid, &status, unix.WALL, nil)
		}
		frozen <- err
		if err == nil {
			<-release
			ended <- unix.PtraceDetach(tid)
		}
	}()
	if err := <-frozen; err != nil {
		t.Fatal("stop a thread of the agent:", err)
	}
	done := false
	thaw = func() {
		if !done {
			done = true
			close(release)
			if err := <-ended; err != nil {
				t.Error("let the thread go on:", err)
			}
		}
	}
	t.Cleanup(thaw)
	return thaw
}

// A loop of the real agent that doesn't come round any more is named by /healthz, which the kubelet's liveness probe asks,
// and by a metric; when it goes on all is well again.
func TestAStuckLoopIsToldByHealthzAndAMetric(t *testing.T) {
	w := newWorld(t, anywhere, "--concurrency=2")
	if _, err := w.Metrics(w.ctx, "/healthz"); err != nil {
		t.Fatal(err)
	}
	thaw := freeze(t, w.agent, "sockmesh-loop-1")
	w.must(lab.Wait(w.ctx, func() error {
		body, err := w.Metrics(w.ctx, "/healthz")
		if err == nil {
			return fmt.Errorf("healthy: %s", body)
		}
		if !strings.Contains(err.Error(), "503") || !strings.Contains(err.Error(), "proxy loop 1 ") || strings.Contains(err.Error(), "proxy loop 0 ") {
			return err
		}
		return nil
	}))
	text, err := w.Metrics(w.ctx, "/metrics")
	w.must(err)
	silent := func(loop string) float64 {
		_, rest, ok := strings.Cut(text, fmt.Sprintf("sockmesh_proxy_loop_silent_seconds{loop=%q} ", loop))
		if !ok {
			t.Fatalf("no metric for loop %s:\n%s", loop, text)
		}
		value, _, _ := strings.Cut(rest, "\n")
		n, err := strconv.ParseFloat(value, 64)
		w.must(err)
		return n
	}
	if s0, s1 := silent("0"), silent("1"); s0 >= 5 || s1 < 5 {
		t.Errorf("loop 0 has been silent for %v seconds, loop 1 for %v", s0, s1)
	}
	if log := w.agent.Output(); !strings.Contains(log, "a proxy loop is stuck") {
		t.Errorf("the log does not tell:\n%s", w.agent.Tail())
	}
	thaw()
	w.must(lab.Wait(w.ctx, func() error { _, err := w.Metrics(w.ctx, "/healthz"); return err }))
	w.must(lab.Wait(w.ctx, func() error { return w.proxied(w.client) }))
}
