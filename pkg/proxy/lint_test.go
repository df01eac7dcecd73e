package proxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// On an accelerated socket bytes arrive past the TCP receive queue, where splice(2), tee(2) and sendfile(2) never look: they
// return nothing and hang for ever (docs/traps.md). The proxy must not use them, by whatever name: the functions of
// syscall and x/sys/unix, their numbers in a raw system call, io_uring's operations, and the ways in which the standard
// library comes to them: io.Copy, and the methods ReadFrom and WriteTo of connections, files and what wraps them. The
// guard resolves names as the compiler does, so that an alias or a constant of one's own hides nothing.

// splicing are the names that must not be used, by package.
var splicing = map[string]*regexp.Regexp{
	"golang.org/x/sys/unix": regexp.MustCompile(`^(Splice|Tee|Vmsplice|Sendfile|SYS_(SPLICE|TEE|VMSPLICE|SENDFILE|SENDFILE64))$`),
	"syscall":               regexp.MustCompile(`^(Splice|Tee|Vmsplice|Sendfile|SYS_(SPLICE|TEE|VMSPLICE|SENDFILE|SENDFILE64))$`),
	"io":                    regexp.MustCompile(`^(Copy|CopyN|CopyBuffer)$`),
}

// copying are the packages whose methods ReadFrom and WriteTo may splice: io's are interfaces that a connection satisfies.
var copying = map[string]bool{"net": true, "io": true, "os": true, "bufio": true, "net/http": true, "crypto/tls": true}

// rawCall are the functions whose first argument is the number of a system call.
var rawCall = regexp.MustCompile(`^(Raw)?Syscall(6|9|NoError)?$`)

// The same numbers on every Linux that Go has: include/uapi/linux/io_uring.h.
var ringOps = map[int64]string{30: "IORING_OP_SPLICE", 33: "IORING_OP_TEE"}

// module is what `go list` tells of the packages and of what they import.
type module struct {
	fset     *token.FileSet
	own      map[string]listed
	importer types.Importer
	numbers  map[int64]string // system calls that splice, on this machine
}

type listed struct {
	ImportPath, Dir, Export   string
	GoFiles, CgoFiles, SFiles []string
	DepOnly                   bool
}

func listModule(t *testing.T) *module {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-export", "-deps", "-json=ImportPath,Dir,Export,GoFiles,CgoFiles,SFiles,DepOnly", "./...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%v: %s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	m := &module{fset: token.NewFileSet(), own: map[string]listed{}, numbers: map[int64]string{}}
	exports := map[string]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		exports[p.ImportPath] = p.Export
		if !p.DepOnly {
			m.own[p.ImportPath] = p
		}
	}
	m.importer = importer.ForCompiler(m.fset, "gc", func(path string) (io.ReadCloser, error) {
		file, ok := exports[path]
		if !ok {
			return nil, fmt.Errorf("%s is not among what pkg/proxy imports", path)
		}
		return os.Open(file)
	})
	unix, err := m.importer.Import("golang.org/x/sys/unix")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range unix.Scope().Names() {
		if c, ok := unix.Scope().Lookup(name).(*types.Const); ok && strings.HasPrefix(name, "SYS_") && splicing[unix.Path()].MatchString(name) {
			n, _ := constant.Int64Val(c.Val())
			m.numbers[n] = name
		}
	}
	if len(m.numbers) < 4 {
		t.Fatalf("these system calls are known to splice: %v; want at least four", m.numbers)
	}
	return m
}

// violations are the lines of files, which are one package, that use what splices.
func (m *module) violations(path string, files ...string) (found []string, err error) {
	var parsed []*ast.File
	complain := func(at token.Pos, what string) {
		p := m.fset.Position(at)
		found = append(found, fmt.Sprintf("%s:%d: %s", filepath.Base(p.Filename), p.Line, what))
	}
	for _, f := range files {
		file, err := parser.ParseFile(m.fset, f, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		parsed = append(parsed, file)
		for _, group := range file.Comments {
			for _, c := range group.List {
				if strings.HasPrefix(c.Text, "//go:linkname") {
					complain(c.Pos(), "go:linkname can reach the standard library's splice unseen")
				}
			}
		}
		for _, i := range file.Imports {
			if i.Path.Value == `"C"` {
				complain(i.Pos(), "C can't be looked into")
			}
		}
	}
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}}
	if _, err := (&types.Config{Importer: m.importer, FakeImportC: true}).Check(path, m.fset, parsed, info); err != nil {
		return nil, err
	}
	number := func(e ast.Expr) (int64, bool) {
		v := info.Types[e].Value
		if v == nil {
			return 0, false
		}
		return constant.Int64Val(constant.ToInt(v))
	}
	opcode := func(e ast.Expr) {
		if n, known := number(e); !known {
			complain(e.Pos(), "the operation of an io_uring request must be a constant, so that it can be looked at")
		} else if name := ringOps[n]; name != "" {
			complain(e.Pos(), name+" does not see redirected bytes")
		}
	}
	for _, file := range parsed {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				obj := info.Uses[n]
				if obj == nil || obj.Pkg() == nil {
					break
				}
				name, pkg := obj.Name(), obj.Pkg().Path()
				f, isFunc := obj.(*types.Func)
				switch {
				case isFunc && f.Signature().Recv() != nil:
					if (name == "ReadFrom" || name == "WriteTo") && copying[pkg] {
						complain(n.Pos(), fmt.Sprintf("%s may splice, which does not see redirected bytes", f.FullName()))
					}
				case splicing[pkg] != nil && splicing[pkg].MatchString(name):
					complain(n.Pos(), fmt.Sprintf("%s.%s does not see redirected bytes", pkg, name))
				}
			case *ast.CallExpr:
				var callee *ast.Ident
				switch f := ast.Unparen(n.Fun).(type) {
				case *ast.Ident:
					callee = f
				case *ast.SelectorExpr:
					callee = f.Sel
				}
				if callee == nil || len(n.Args) == 0 {
					break
				}
				f, ok := info.Uses[callee].(*types.Func)
				if !ok || f.Pkg() == nil || f.Pkg().Path() != "syscall" && f.Pkg().Path() != "golang.org/x/sys/unix" || !rawCall.MatchString(f.Name()) {
					break
				}
				if call, known := number(n.Args[0]); !known {
					complain(n.Pos(), "the number of a raw system call must be a constant, so that it can be looked at")
				} else if name := m.numbers[call]; name != "" {
					complain(n.Pos(), name+" does not see redirected bytes")
				}
			case *ast.AssignStmt:
				for i, lhs := range n.Lhs {
					if s, ok := lhs.(*ast.SelectorExpr); ok && s.Sel.Name == "opcode" && len(n.Lhs) == len(n.Rhs) {
						opcode(n.Rhs[i])
					}
				}
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "opcode" {
					opcode(n.Value)
				}
			}
			return true
		})
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}

func TestNobodySplices(t *testing.T) {
	m := listModule(t)
	files := 0
	for path, p := range m.own {
		if strings.HasSuffix(path, "/proxytest") { // peers of tests, on sockets that nobody enrols
			continue
		}
		if len(p.CgoFiles)+len(p.SFiles) > 0 {
			t.Errorf("%s: what is not Go can't be looked into: %v", path, append(p.CgoFiles, p.SFiles...))
		}
		var full []string
		for _, f := range p.GoFiles {
			full = append(full, filepath.Join(p.Dir, f))
		}
		files += len(full)
		found, err := m.violations(path, full...)
		if err != nil {
			t.Error(err)
		}
		for _, f := range found {
			t.Errorf("%s/%s", path, f)
		}
	}
	if files < 20 {
		t.Fatalf("only %d files looked at", files)
	}
}

// The guard catches what it is there for: in testdata/splices each line that says so is a violation, and no other is.
func TestTheGuardAgainstSplicesCatchesThem(t *testing.T) {
	m := listModule(t)
	samples, err := filepath.Glob("testdata/splices/*.go")
	if err != nil || len(samples) == 0 {
		t.Fatal(samples, err)
	}
	for _, file := range samples {
		t.Run(filepath.Base(file), func(t *testing.T) {
			if strings.HasSuffix(file, "_amd64.go") && runtime.GOARCH != "amd64" {
				return // other numbers
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for i, line := range strings.Split(string(text), "\n") {
				if _, words, ok := strings.Cut(line, "// caught: "); ok {
					want = append(want, fmt.Sprintf("%s:%d: %s", filepath.Base(file), i+1, words))
				}
			}
			got, err := m.violations("sample", file)
			if err != nil {
				t.Fatal(err)
			}
			for _, g := range got {
				line, _, _ := strings.Cut(g, ": ") // which may break two rules at once
				if !slices.ContainsFunc(want, func(w string) bool { return strings.HasPrefix(w, line+": ") }) {
					t.Errorf("caught without need: %s", g)
				}
			}
			for _, w := range want {
				if !slices.ContainsFunc(got, func(g string) bool { return strings.HasPrefix(g, w) }) {
					t.Errorf("not caught: %s; caught: %v", w, got)
				}
			}
		})
	}
}
