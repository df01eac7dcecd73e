// Package labtest is what tests on a lab have in common: the real binaries, built once, and a lab that leaves its logs
// behind where a test fails.
package labtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// helper is the first argument that makes a test binary a traffic generator.
const helper = "traffic"

// binaries is where Main built sockmesh-agent, sockmesh-control and sockmesh.
var binaries string

// Binaries is the directory with the real binaries. Only within Main.
func Binaries() string { return binaries }

// Main is what TestMain does: it builds the binaries of the module, whose root is given relative to the test's
// directory, and runs the tests. In a process that pkg/lab started as a traffic generator it is that instead.
func Main(m *testing.M, root string) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	traffic.MainIfAsked(ctx, helper)
	os.Exit(run(m, root))
}

func run(m *testing.M, root string) int {
	dir, err := os.MkdirTemp("", "sockmesh-binaries-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir+"/", "./cmd/...")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the binaries: %v\n%s", err, out)
		return 1
	}
	binaries = dir
	return m.Run()
}

// New makes a lab for the test, with the binaries that Main built, which is closed at the test's end. What the
// processes wrote is kept where the test fails.
func New(t *testing.T, cfg lab.Config) *lab.Lab {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Binaries, cfg.Helper = binaries, []string{exe, helper}
	l, err := lab.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			dir := filepath.Join(os.TempDir(), "sockmesh-failed", strings.ReplaceAll(t.Name(), "/", "_"))
			os.RemoveAll(dir)
			if err := l.SaveLogs(dir); err == nil {
				t.Logf("what the processes wrote is in %s", dir)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}
