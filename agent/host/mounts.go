// Package host prepares the machine for the agent: finds the cgroup2 mount, moves the agent below --cgroup-root,
// mounts a BPF file system, makes the state directory, and says in one message what is missing before anything
// was changed.
//
// It must never guess silently: whatever it found or made is returned, and logged by the agent.
package host

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Mount is one line of /proc/self/mounts.
type Mount struct {
	Path string
	Type string
}

// Mounts reads the mounts that this process sees.
func Mounts() ([]Mount, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f)
}

func parseMounts(r io.Reader) ([]Mount, error) {
	var out []Mount
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20) // overlay mounts have option lists longer than the scanner's default
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) >= 3 {
			out = append(out, Mount{Path: unescape(f[1]), Type: f[2]})
		}
	}
	return out, s.Err()
}

// unescape undoes the kernel's \040 for space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// FindCgroup2 returns where the cgroup v2 hierarchy is mounted: /sys/fs/cgroup on most nodes,
// /sys/fs/cgroup/unified where v1 controllers are mounted beside it.
func FindCgroup2(mounts []Mount) (string, error) {
	var found []string
	for _, m := range mounts {
		if m.Type != "cgroup2" {
			continue
		}
		if m.Path == "/sys/fs/cgroup" || m.Path == "/sys/fs/cgroup/unified" {
			return m.Path, nil
		}
		found = append(found, m.Path)
	}
	if len(found) > 0 {
		return found[0], nil
	}
	return "", fmt.Errorf("no cgroup2 file system is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified), " +
		"and in a container mount the host's /sys/fs/cgroup, or give --cgroup-root")
}

// mountOf is the mount that path lies on: the longest mount path above it, and of equals the last mounted.
func mountOf(path string, mounts []Mount) (Mount, bool) {
	var best Mount
	for _, m := range mounts {
		if within(path, m.Path) && len(m.Path) >= len(best.Path) {
			best = m
		}
	}
	return best, best.Path != ""
}

// within says whether path is dir or below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}
