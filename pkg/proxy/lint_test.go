package proxy

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// TestNobodySplices: on an accelerated socket bytes arrive past the TCP receive queue, where splice(2) and
// sendfile(2) never look: they return nothing and hang for ever. io.Copy, ReadFrom and WriteTo of net.TCPConn
// use them.
func TestNobodySplices(t *testing.T) {
	banned := map[string]string{
		"io.Copy": "", "io.CopyN": "", "io.CopyBuffer": "",
		"unix.Splice": "", "unix.Tee": "", "unix.Vmsplice": "", "unix.Sendfile": "", "syscall.Splice": "", "syscall.Tee": "", "syscall.Sendfile": "",
		"unix.SYS_SPLICE": "", "unix.SYS_TEE": "", "unix.SYS_SENDFILE": "", "syscall.SYS_SPLICE": "", "syscall.SYS_TEE": "", "syscall.SYS_SENDFILE": "",
	}
	files := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "proxytest/") {
			return err
		}
		files++
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			name := sel.Sel.Name
			if x, ok := sel.X.(*ast.Ident); ok {
				if _, bad := banned[x.Name+"."+name]; bad {
					t.Errorf("%s: %s.%s does not see redirected bytes", set.Position(sel.Pos()), x.Name, name)
				}
			}
			if name == "ReadFrom" || name == "WriteTo" {
				t.Errorf("%s: %s may splice, which does not see redirected bytes", set.Position(sel.Pos()), name)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 20 {
		t.Fatalf("only %d files looked at", files)
	}
}
