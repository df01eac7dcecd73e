// Package node tests the whole of sockmesh from outside: the real binaries on clusters made of network namespaces,
// with real clients and servers, seen only through what users see: answers, `sockmesh status`, /readyz.
//
// world_test.go builds the cluster that most tests use; each other file is one promise of the product.
package node

import (
	"os"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
)

func TestMain(m *testing.M) {
	squatIfAsked()
	hostileIfAsked()
	withoutUringIfAsked()
	mainIfDNS()
	labtest.Main(m, "../..")
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
