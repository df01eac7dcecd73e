// Package node tests the whole of sockmesh from outside: the real binaries on clusters made of network namespaces,
// with real clients and servers, seen only through what users see: answers, `sockmesh status`, /readyz.
//
// world_test.go builds the cluster that most tests use; each other file is one promise of the product.
package node

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// binaries is where TestMain built sockmesh-agent, sockmesh-control and sockmesh.
var binaries string

func TestMain(m *testing.M) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	traffic.MainIfAsked(ctx, "traffic")
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "sockmesh-node-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir+"/", "./cmd/...")
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the binaries: %v\n%s", err, out)
		return 1
	}
	binaries = dir
	return m.Run()
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
