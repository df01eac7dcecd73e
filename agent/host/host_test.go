package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

func TestMissingCapabilitiesAreNamedWithTheirPurpose(t *testing.T) {
	err := missing(1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_SYS_ADMIN)
	if err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN (") || strings.Contains(err.Error(), "CAP_BPF") {
		t.Errorf("got %v", err)
	}
	if err := missing(1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN); err != nil {
		t.Errorf("CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON: %v", err)
	}
}

func TestMembershipIsSeenInTheRealTree(t *testing.T) {
	root, err := datapath.FindCgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(root, "sockmesh-host-test-")
	if err != nil {
		t.Fatal(err)
	}
	inner := filepath.Join(dir, "inner")
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	// A child stands for the agent: moving the test itself would keep it in a directory that is to be removed.
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait()
		_ = os.Remove(inner)
		_ = os.Remove(dir)
	})
	if in, err := memberBelow(dir, child.Process.Pid); err != nil || in {
		t.Errorf("outside: got %v, %v", in, err)
	}
	pid := []byte(strconv.Itoa(child.Process.Pid))
	if err := os.WriteFile(filepath.Join(inner, "cgroup.procs"), pid, 0o644); err != nil {
		t.Fatal(err)
	}
	if in, err := memberBelow(dir, child.Process.Pid); err != nil || !in {
		t.Errorf("in a cgroup below: got %v, %v", in, err)
	}
}

func TestADirectoryThatIsNoCgroupStaysAsItIs(t *testing.T) {
	dir := t.TempDir()
	if _, err := JoinCgroup(dir); err == nil || !strings.Contains(err.Error(), "--cgroup-root "+dir+" is not a cgroup v2 directory") {
		t.Errorf("got %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left there: %v, %v", left, err)
	}
}

func TestStateDirIsPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := EnsureStateDir(dir); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestBPFFSIsMountedOnce(t *testing.T) {
	dir := t.TempDir()
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if mounted, err := MountBPFFS(dir); err != nil || !mounted {
		t.Fatalf("mounted %v, %v", mounted, err)
	}
	if mounted, err := MountBPFFS(dir); err != nil || mounted {
		t.Errorf("the second time nothing must be mounted: %v, %v", mounted, err)
	}
}
