// Package version says which build this is, for --version, `sockmesh status`, the User-Agent of the Kubernetes
// client and the metric sockmesh_build_info.
//
// Release builds set it with -ldflags "-X github.com/sockmesh/sockmesh/agent/version.version=v1.2.3"; any other
// build falls back to what the Go tool recorded about the checkout, so that a binary never calls itself nothing.
package version

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is set by the linker.
var version string

// Info is everything that is known about this build.
type Info struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a checkout with uncommitted changes
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// Get reads it.
func Get() Info {
	in := Info{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	build, ok := debug.ReadBuildInfo()
	if ok {
		for _, s := range build.Settings {
			switch s.Key {
			case "vcs.revision":
				in.Revision = s.Value
			case "vcs.modified":
				in.Modified = s.Value == "true"
			}
		}
		if in.Version == "" && build.Main.Version != "(devel)" {
			in.Version = build.Main.Version
		}
	}
	if in.Version == "" {
		in.Version = "devel"
	}
	return in
}

// String is the version alone.
func String() string { return Get().Version }

// Line is what `version` prints.
func (i Info) Line() string {
	rev := i.Revision
	if rev == "" {
		rev = "unknown"
	}
	if i.Modified {
		rev += " (modified)"
	}
	return fmt.Sprintf("%s, revision %s, %s, %s", i.Version, rev, i.Go, i.Platform)
}
