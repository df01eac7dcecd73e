package node

import (
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
)

// Every example validates, with nothing refused and nothing ignored.
func TestExamplesValidate(t *testing.T) {
	seen := 0
	err := filepath.WalkDir("../../examples", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".yaml" || strings.Contains(path, "/manifests/") {
			return err
		}
		seen++
		out, err := exec.CommandContext(t.Context(), filepath.Join(labtest.Binaries(), "sockmesh"), "validate", path).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "0 fields ignored") {
			t.Errorf("%s: %v\n%s", path, err, out)
		}
		return nil
	})
	if err != nil || seen == 0 {
		t.Fatalf("%d examples: %v", seen, err)
	}
}

// A wrong resource is refused, and the message names file, resource and field.
func TestValidateNamesWhatIsWrong(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.listeners.yaml")
	write(t, file, badListener)
	out, err := exec.CommandContext(t.Context(), filepath.Join(labtest.Binaries(), "sockmesh"), "validate", file).CombinedOutput()
	if err == nil {
		t.Errorf("a listener with an unknown filter passed: %s", out)
	}
	for _, want := range []string{"x.listeners.yaml", "bad", "no.such.filter"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the message lacks %q: %s", want, out)
		}
	}
}
