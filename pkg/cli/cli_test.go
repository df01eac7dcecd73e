package cli

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestTable(t *testing.T) {
	table := NewTable("NAME", "VALUE", "LAST")
	table.Row("a", "", "x")
	table.Row("longer", "ü", "y")
	var b strings.Builder
	if err := table.Write(&b, "none"); err != nil {
		t.Fatal(err)
	}
	want := "NAME     VALUE   LAST\na        -       x\nlonger   ü       y\n"
	if b.String() != want {
		t.Errorf("got\n%q\nwant\n%q", b.String(), want)
	}
	b.Reset()
	if err := NewTable("NAME").Write(&b, "none"); err != nil || b.String() != "none\n" {
		t.Errorf("%q %v", b.String(), err)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 3 << 20: "3.0 MiB", 1 << 60: "1.0 EiB"} {
		if got := Bytes(n); got != want {
			t.Errorf("%d: %s, expected %s", n, got, want)
		}
	}
}

func TestPrintRefusesWhatIsNoJSON(t *testing.T) {
	for _, f := range []Format{JSONFormat, YAMLFormat} {
		if err := Print(&bytes.Buffer{}, f, []byte("<html>"), nil); f == JSONFormat && err == nil {
			t.Errorf("%s: no error", f)
		}
	}
}

// tree is a root with a group that has no action of its own, and a command that fails as told.
func tree(fail error) *cobra.Command {
	root := &cobra.Command{Use: "tool"}
	group := &cobra.Command{Use: "group", Short: "g"}
	group.AddCommand(&cobra.Command{Use: "leaf", Short: "l", RunE: func(*cobra.Command, []string) error { return fail }})
	root.AddCommand(group, &cobra.Command{Use: "one", Short: "o", Args: cobra.ExactArgs(1), RunE: func(*cobra.Command, []string) error { return fail }})
	return root
}

func TestExitCodes(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		args string
		fail error
		code int
		says string
	}{
		{"one x", nil, 0, ""}, {"one x", boom, 1, "tool one: boom"}, {"one", nil, 2, "tool one --help"}, {"one x", Usagef("bad %d", 1), 2, "bad 1"},
		{"one x", &SilentError{3}, 3, ""}, {"grop", nil, 2, "did you mean group?"}, {"group lef", nil, 2, "lef"}, {"group leaf x", nil, 2, `"x"`},
		{"--what", nil, 2, "--what"}, {"group", nil, 0, ""},
	} {
		var out, errOut bytes.Buffer
		code := Run(t.Context(), tree(tt.fail), strings.Fields(tt.args), &out, &errOut)
		if code != tt.code || !strings.Contains(errOut.String(), tt.says) || tt.says == "" && errOut.Len() > 0 {
			t.Errorf("%s (%v): exit code %d, stderr %q; expected %d, %q", tt.args, tt.fail, code, errOut.String(), tt.code, tt.says)
		}
	}
}
