package node

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The demo succeeds and leaves nothing behind.
func TestDemo(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	before := leftovers(t)
	out, err := exec.CommandContext(ctx, filepath.Join(binaries, "sockmesh"), "demo").CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	if after := leftovers(t); after != before {
		t.Errorf("left behind: %s; before: %s", after, before)
	}
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
	if err := os.CopyFS(dir, os.DirFS(binaries)); err != nil {
		t.Fatal(err)
	}
	before := leftovers(t)
	out, err := exec.CommandContext(t.Context(), "setpriv", "--reuid=65534", "--clear-groups", filepath.Join(dir, "sockmesh"), "demo").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "root") || strings.Count(strings.TrimSpace(string(out)), "\n") > 0 {
		t.Errorf("%v: %s; want one line that asks for root", err, out)
	}
	if after := leftovers(t); after != before {
		t.Errorf("left behind: %s; before: %s", after, before)
	}
}

// leftovers are the directories of labs.
func leftovers(t *testing.T) string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "sockmesh-lab-*"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(dirs, " ")
}
