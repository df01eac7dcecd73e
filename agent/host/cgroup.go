// Package host prepares the machine for the agent: moves the agent below --cgroup-root, makes its directories, and says
// in one message which privileges are missing, before anything was changed. The BPF file system and the cgroup2
// mount are pkg/datapath's.
package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// OwnCgroup is the cgroup that the agent makes below --cgroup-root for itself where it is outside.
const OwnCgroup = "sockmesh-agent"

// JoinCgroup moves this process into root/sockmesh-agent unless it is in root or below already, and says
// whether it did. The hooks see a socket by the cgroup of the process that made it: outside the root, the
// proxy's own connections would be neither balanced nor accelerated. So call it before any socket is made.
//
// Membership is looked for in the tree rather than computed from /proc/self/cgroup: that file is relative to
// the cgroup namespace, and a container that has the host's hierarchy mounted sees paths that don't match it.
func JoinCgroup(root string) (moved bool, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return false, fmt.Errorf("--cgroup-root %s: %w", root, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC { // or the "cgroup" below would be made as a directory anywhere
		return false, fmt.Errorf("--cgroup-root %s is not a cgroup v2 directory (see `mount -t cgroup2`)", root)
	}
	in, err := memberBelow(root, os.Getpid())
	if err != nil {
		return false, fmt.Errorf("looking for this process below --cgroup-root %s: %w", root, err)
	}
	if in {
		return false, nil
	}
	dir := filepath.Join(root, OwnCgroup)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return false, fmt.Errorf("making a cgroup for the agent: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
		return false, fmt.Errorf("the agent is outside --cgroup-root %s and can't be moved into it: %w", root, err)
	}
	return true, nil
}

// LeaveCgroup removes the cgroup that JoinCgroup made, if nobody is in it.
func LeaveCgroup(root string) {
	if root != "" {
		_ = os.Remove(filepath.Join(root, OwnCgroup)) // EBUSY: somebody is; ENOENT: there is none
	}
}

// memberBelow looks for pid in every cgroup.procs of the tree. Cgroups come and go meanwhile; what vanishes
// is skipped.
func memberBelow(root string, pid int) (bool, error) {
	want := []byte(strconv.Itoa(pid))
	found := errors.New("found")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if path != root && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		// A threaded cgroup's file can't be read (EOPNOTSUPP); its processes are listed in its domain above.
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil
		}
		for line := range bytes.Lines(b) {
			if bytes.Equal(bytes.TrimSpace(line), want) {
				return found
			}
		}
		return nil
	})
	if errors.Is(err, found) {
		return true, nil
	}
	return false, err
}
