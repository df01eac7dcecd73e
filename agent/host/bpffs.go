package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// EnsureBPFFS makes dir a directory on a BPF file system and returns where it mounted one, "" if there was one
// already. Without pins the kernel would drop maps and programs with the agent, and with them every Service.
//
// What is mounted stays mounted when the agent ends, as the pins do.
func EnsureBPFFS(dir string) (mounted string, err error) {
	above := existingAncestor(dir)
	on, err := isBPFFS(above)
	if err != nil {
		return "", fmt.Errorf("--bpffs %s: %w", dir, err)
	}
	if !on {
		if mounted, err = mountBPFFS(dir); err != nil {
			return "", err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return mounted, fmt.Errorf("--bpffs: %w", err)
	}
	return mounted, nil
}

// mountBPFFS mounts at the parent where that is the usual place or empty, else at dir itself: mounting over a
// directory hides what is in it.
func mountBPFFS(dir string) (string, error) {
	at := filepath.Dir(dir)
	if err := os.MkdirAll(at, 0o755); err != nil {
		return "", fmt.Errorf("--bpffs: %w", err)
	}
	if !empty(at) {
		at = dir
		if err := os.MkdirAll(at, 0o700); err != nil {
			return "", fmt.Errorf("--bpffs: %w", err)
		}
		if !empty(at) {
			return "", fmt.Errorf("--bpffs %s is a directory with files on an ordinary file system: "+
				"mount a BPF file system there (mount -t bpf bpf %s) or give another directory", dir, dir)
		}
	}
	if err := unix.Mount("bpf", at, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return "", fmt.Errorf("no BPF file system at %s and mounting one failed: %w: mount it before the agent starts "+
			"(mount -t bpf bpf %s), or give the agent CAP_SYS_ADMIN", at, err, at)
	}
	return at, nil
}

func isBPFFS(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, err
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}

func existingAncestor(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func empty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) == 0
}

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
