package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// EnsureStateDir makes the state directory, readable by the agent alone: a control plane's configuration may
// hold secrets.
func EnsureStateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("--state-dir: %w", err)
	}
	probe, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return fmt.Errorf("--state-dir %s can't be written: %w", dir, err)
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// EnsureAdminDir makes the directory of the admin socket, and sees whether a socket can be made in it.
func EnsureAdminDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("--admin: %w", err)
	}
	probe, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return fmt.Errorf("--admin: %s can't be written: %w", dir, err)
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// EnsureNetnsDir makes the directory in which pods' network namespaces will be named, if the runtime has not
// made it yet: it makes it with its first pod, and the agent must not miss that one.
func EnsureNetnsDir(dir string) error {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("--netns-dir: %w", err)
		}
	case err != nil:
		return fmt.Errorf("--netns-dir: %w", err)
	case !st.IsDir():
		return fmt.Errorf("--netns-dir %s is not a directory", dir)
	}
	return nil
}

// MountBPFFS mounts a BPF file system at dir unless there is one, and says whether it did. It is for the DaemonSet's
// init container: what is mounted there in the host's mount namespace outlives every container, as the pins must.
func MountBPFFS(dir string) (mounted bool, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("%s: %w", dir, err)
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return false, nil
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return false, fmt.Errorf("mount a BPF file system at %s: %w (needs CAP_SYS_ADMIN and, in a container, Bidirectional mount propagation)", dir, err)
	}
	return true, nil
}
