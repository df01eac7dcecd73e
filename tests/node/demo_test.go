package node

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
)

// The demo succeeds and leaves nothing behind.
func TestDemo(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	tmp := shortDir(t)
	cmd := exec.CommandContext(ctx, filepath.Join(labtest.Binaries(), "sockmesh"), "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	nothingLeft(t, tmp)
}

// Without root it says so, once, and changes nothing.
func TestDemoWithoutRootSaysSo(t *testing.T) {
	dir := t.TempDir() // readable for everybody, unlike where TestMain builds
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dir, os.DirFS(labtest.Binaries())); err != nil {
		t.Fatal(err)
	}
	tmp := shortDir(t)
	cmd := exec.CommandContext(t.Context(), "setpriv", "--reuid=65534", "--clear-groups", filepath.Join(dir, "sockmesh"), "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "root") || strings.Count(strings.TrimSpace(string(out)), "\n") > 0 {
		t.Errorf("%v: %s; want one line that asks for root", err, out)
	}
	nothingLeft(t, tmp)
}

// Ctrl-C in the middle: everything is removed all the same.
func TestDemoInterrupted(t *testing.T) {
	tmp := shortDir(t)
	cmd := exec.Command(filepath.Join(labtest.Binaries(), "sockmesh"), "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted demo should not exit 0")
	}
	nothingLeft(t, tmp)
}

// shortDir is a directory for temporary files that no other lab uses; its path leaves room for a Unix socket's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "d")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// nothingLeft checks that no directory, mount or process of a lab in tmp remains.
func nothingLeft(t *testing.T, tmp string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(tmp, "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), " "+tmp+"/") {
		t.Errorf("mounts below %s are left: %v", tmp, err)
	}
}
