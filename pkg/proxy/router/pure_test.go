package router

import (
	"math/rand/v2"
	"regexp"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

func TestPathsAreNormalisedAsBrowsersDo(t *testing.T) {
	for in, want := range map[string]string{
		"/":                  "/",
		"/a/b":               "/a/b",
		"/a/./b":             "/a/b",
		"/a/../b":            "/b",
		"/../..":             "/",
		"/..":                "/",
		"/a/b/..":            "/a/",
		"/a/b/.":             "/a/b/",
		"/a/...":             "/a/...",
		"/a/.b/..c":          "/a/.b/..c",
		"/%2e%2E/a":          "/a",
		"/a\\..\\b":          "/b",
		"/%41%5a%30%2d%7E":   "/AZ0-~",
		"/%2F%20":            "/%2F%20",
		"/ü":                 "/%C3%BC",
		"/a%":                "/a%",
		"/a%2":               "/a%2",
		"/%zz":               "/%zz",
		"/a/../b?c=/../d%41": "/b?c=/../d%41",
		"/.?":                "/?",
		"/a/..?b":            "/?b",
	} {
		got, ok := normalizePath(nil, in)
		if !ok || string(got) != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
		if !needsNormalizing(in) && in != want {
			t.Errorf("%q would not be looked at", in)
		}
		again, _ := normalizePath(nil, string(got))
		if string(again) != string(got) {
			t.Errorf("%q is not stable: %q", got, again)
		}
	}
	if _, ok := normalizePath(nil, "/a%00b"); ok {
		t.Error("a NUL was accepted")
	}
}

func FuzzNormalizedPathsHaveNoDotSegments(f *testing.F) {
	f.Add("/a/../b/./c")
	f.Add("/%2e%2e/%2E/x")
	f.Add("/\\..\\/")
	dots := regexp.MustCompile(`(^|/)\.{1,2}(/|$)`)
	f.Fuzz(func(t *testing.T, s string) {
		path := pathOnly("/" + s)
		got, ok := normalizePath(nil, path)
		if !ok {
			return
		}
		if len(got) == 0 || got[0] != '/' || dots.Match(got) {
			t.Errorf("%q became %q", path, got)
		}
		if again, _ := normalizePath(nil, string(got)); string(again) != string(got) {
			t.Errorf("%q is not stable: %q", got, again)
		}
		if !needsNormalizing(path) && string(got) != path {
			t.Errorf("%q becomes %q, but would not be looked at", path, got)
		}
	})
}

func TestSlashes(t *testing.T) {
	if got := string(mergeSlashes(nil, "//a///b//?x=//y")); got != "/a/b/?x=//y" {
		t.Errorf("merged: %q", got)
	}
	got, found := unescapeSlashes(nil, "/a%2fb%5Cc%2?d=%2F")
	if string(got) != "/a/b\\c%2?d=%2F" || !found {
		t.Errorf("unescaped: %q, %v", got, found)
	}
}

func TestTheTrustedAddressIsCountedFromTheEnd(t *testing.T) {
	for _, x := range []struct {
		list string
		skip int
		want string
		only bool
	}{
		{"1.1.1.1", 0, "1.1.1.1", true},
		{"1.1.1.1, 2.2.2.2", 0, "2.2.2.2", false},
		{"1.1.1.1, 2.2.2.2", 1, "1.1.1.1", false},
		{"1.1.1.1, 2.2.2.2", 2, "invalid IP", false},
		{"1.1.1.1,nonsense", 0, "invalid IP", false},
		{"::1", 0, "::1", true},
		{"::ffff:1.2.3.4", 0, "1.2.3.4", true},
		{"", 0, "invalid IP", false},
	} {
		var h header.Block
		h.Add(header.XForwardedFor, x.list)
		addr, only := lastFromXFF(&h, x.skip)
		if addr.String() != x.want || only != x.only {
			t.Errorf("%q skipping %d: %v %v", x.list, x.skip, addr, only)
		}
	}
}

func TestRequestIDsAreVersion4AndDoNotRepeat(t *testing.T) {
	ids := idSource{rand.NewChaCha8([32]byte{1})}
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := map[string]bool{}
	for range 10_000 {
		id := string(ids.append(nil))
		if !form.MatchString(id) || seen[id] {
			t.Fatalf("%q", id)
		}
		seen[id] = true
	}
	buf := make([]byte, 0, 64)
	if n := testing.AllocsPerRun(100, func() { buf = ids.append(buf[:0]) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestPortsAreSplitOff(t *testing.T) {
	for in, want := range map[string][2]string{
		"a:80":     {"a", "80"},
		"a":        {"a", ""},
		"[::1]:80": {"[::1]", "80"},
		"[::1]":    {"[::1]", ""},
		"::1":      {"::1", ""},
		"":         {"", ""},
	} {
		if name, port := splitPort(in); name != want[0] || port != want[1] {
			t.Errorf("%q: %q %q", in, name, port)
		}
	}
}

func TestRetryConditionsAreParsed(t *testing.T) {
	got := parseRetryOn("5xx, connect-failure,unknown ,retriable-headers")
	if want := mesh.Retry5xx | mesh.RetryConnectFailure | mesh.RetryRetriableHeaders; got != want {
		t.Errorf("%b, want %b", got, want)
	}
}
