package datapath

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// FindCgroupRoot returns where cgroup v2 is mounted: /sys/fs/cgroup on most nodes, /sys/fs/cgroup/unified where
// version 1 is in use too.
func FindCgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", fmt.Errorf("find the cgroup v2 mount: %w", err)
	}
	defer f.Close()
	return findCgroup2(f)
}

func findCgroup2(mounts io.Reader) (string, error) {
	sc := bufio.NewScanner(mounts)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) >= 3 && f[2] == "cgroup2" {
			return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(f[1]), nil
		}
	}
	if err := sc.Err(); err != nil {
		return "", fmt.Errorf("read the mount table: %w", err)
	}
	return "", errors.New("no cgroup v2 is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified) and name it by --cgroup-root")
}

// checkCgroup2 refuses a directory that is not in a cgroup v2 hierarchy, before anything is changed.
func checkCgroup2(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("--cgroup-root %s: %w", dir, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("--cgroup-root %s is not a cgroup v2 directory (see `mount -t cgroup2`)", dir)
	}
	return nil
}
