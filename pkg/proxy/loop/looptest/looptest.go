// Package looptest runs the tests of packages above the loop once on each of its backends, because which one a node has
// depends on its kernel.
package looptest

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/loop"
)

// IO is the backend that is being tested, for loop.Config.
var IO string

// OnEachBackend runs the tests for each backend that this kernel has, and returns the exit code for TestMain.
func OnEachBackend(m *testing.M) int {
	code := 0
	for _, IO = range []string{loop.IOEpoll, loop.IORing} {
		l, err := loop.New(loop.Config{IO: IO})
		if errors.Is(err, loop.ErrNoRing) {
			fmt.Fprintln(os.Stdout, "this backend is not tested, because this kernel doesn't have it:", err)
			continue
		}
		if err != nil {
			fmt.Fprintln(os.Stdout, "FAIL:", err)
			return 1
		}
		l.Stop()
		if err := l.Run(); err != nil {
			fmt.Fprintln(os.Stdout, "FAIL:", err)
			return 1
		}
		fmt.Fprintln(os.Stdout, "backend", IO)
		code = max(code, m.Run())
	}
	return code
}
