package datapath

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The committed object and its Go types must be what the generate directive makes of bpf/ today.
func TestObjectMatchesSource(t *testing.T) {
	src, err := os.ReadFile("generate.go")
	must(t, err)
	_, directive, ok := strings.Cut(string(src), "//go:generate ")
	if !ok {
		t.Fatal("generate.go has no directive")
	}
	directive, _, _ = strings.Cut(directive, "\n")
	args := strings.Fields(directive)
	for i, a := range args {
		if a == "-output-stem" {
			args = append(args[:i:i], append([]string{"-output-dir", t.TempDir()}, args[i:]...)...)
			break
		}
	}
	dir := args[len(args)-1]
	for i, a := range args {
		if a == "-output-dir" {
			dir = args[i+1]
		}
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "GOPACKAGE=datapath", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s(clang-19 and llvm-strip-19 come with Debian's clang-19 and llvm-19)", cmd, err, out)
	}
	for _, name := range []string{"sockmesh_bpfel.o", "sockmesh_bpfel.go"} {
		want, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		got, err := os.ReadFile(name)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what its source compiles to: run `make bpf` and commit the result", name)
		}
	}
}
