package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFindCgroup2(t *testing.T) {
	for _, tt := range []struct{ name, mounts, want string }{
		{"unified", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "/sys/fs/cgroup"},
		{"hybrid", "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "/sys/fs/cgroup/unified"},
		{"elsewhere, with a space", `none /run/my\040cg cgroup2 rw 0 0` + "\n", "/run/my cg"},
		{"the usual place wins", "a /run/x cgroup2 rw 0 0\nb /sys/fs/cgroup cgroup2 rw 0 0\n", "/sys/fs/cgroup"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mounts, err := parseMounts(strings.NewReader(tt.mounts))
			if err != nil {
				t.Fatal(err)
			}
			got, err := FindCgroup2(mounts)
			if err != nil || got != tt.want {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
	if _, err := FindCgroup2(nil); err == nil || !strings.Contains(err.Error(), "--cgroup-root") {
		t.Errorf("no mount: error %v must name the cure", err)
	}
}

func TestMissingCapabilitiesAreNamedWithTheirPurpose(t *testing.T) {
	err := missing(1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_SYS_ADMIN)
	if err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN (") || strings.Contains(err.Error(), "CAP_BPF") {
		t.Errorf("got %v", err)
	}
	if err := missing(1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN); err != nil {
		t.Errorf("CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON: %v", err)
	}
}

// cgroup2Root is the machine's, for tests on the real file system.
func cgroup2Root(t *testing.T) string {
	t.Helper()
	mounts, err := Mounts()
	if err != nil {
		t.Fatal(err)
	}
	root, err := FindCgroup2(mounts)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func TestMembershipIsSeenInTheRealTree(t *testing.T) {
	root := cgroup2Root(t)
	if err := CheckCgroupRoot(root); err != nil {
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

func TestAnOrdinaryDirectoryIsNoCgroupRoot(t *testing.T) {
	if err := CheckCgroupRoot(t.TempDir()); err == nil || !strings.Contains(err.Error(), "cgroup2") {
		t.Errorf("got %v", err)
	}
}

func TestBPFFSIsMountedWhereNoneIs(t *testing.T) {
	// The usual case: an empty parent gets the mount, so that other tools may pin beside us.
	parent := filepath.Join(t.TempDir(), "bpf")
	dir := filepath.Join(parent, "sockmesh")
	at, err := EnsureBPFFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	if at != parent {
		t.Errorf("mounted at %q, expected %q", at, parent)
	}
	if on, err := isBPFFS(dir); err != nil || !on {
		t.Errorf("%s: on a BPF file system %v, %v", dir, on, err)
	}
	if again, err := EnsureBPFFS(dir); err != nil || again != "" {
		t.Errorf("the second time nothing must be mounted: %q, %v", again, err)
	}
}

func TestBPFFSIsNeverMountedOverFiles(t *testing.T) {
	parent := t.TempDir()
	if err := os.WriteFile(filepath.Join(parent, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(parent, "pins")
	at, err := EnsureBPFFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	if at != dir {
		t.Errorf("mounted at %q, expected %q", at, dir)
	}
	if _, err := os.Stat(filepath.Join(parent, "precious")); err != nil {
		t.Error("a file is hidden:", err)
	}

	full := filepath.Join(parent, "full")
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if at, err := EnsureBPFFS(full); err == nil {
		_ = unix.Unmount(at, unix.MNT_DETACH)
		t.Error("a directory with content must be refused")
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
