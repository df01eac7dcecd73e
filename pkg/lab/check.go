package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// Check says whether this machine can carry a lab, without changing anything: the error names every reason and what
// would cure it. Programs that the caller will run may be given too.
func Check(programs ...string) error {
	var problems []string
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }

	if os.Geteuid() != 0 {
		bad("it must run as root (network namespaces, BPF): try sudo")
	} else if missing := missingCapabilities(); len(missing) > 0 {
		bad("it lacks the capabilities %s: in a container, run it with --privileged", strings.Join(missing, ", "))
	}
	if err := kernelAtLeast(5, 15); err != nil {
		bad("%v", err)
	}
	if text, err := os.ReadFile("/proc/filesystems"); err == nil && !strings.Contains(string(text), "\tbpf\n") {
		bad("the kernel has no bpffs (CONFIG_BPF_SYSCALL)")
	}
	if _, err := os.Stat("/sys/fs/bpf"); err != nil {
		bad("there is no /sys/fs/bpf: the kernel lacks BPF, or /sys is not mounted")
	}
	if _, err := cgroup2Mount(); err != nil {
		bad("%v", err)
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			bad("the program %s is missing: scripts/deps.sh installs it", p)
		}
	}
	if len(problems) == 0 {
		return nil
	}
	return errors.New("this machine cannot run it: " + strings.Join(problems, "; "))
}

// missingCapabilities asks for the effective set rather than trying and failing half way.
func missingCapabilities() []string {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return nil // an odd kernel: let the real calls speak
	}
	var missing []string
	for name, bit := range map[string]uint{"CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN} {
		if data[bit/32].Effective&(1<<(bit%32)) == 0 {
			missing = append(missing, name)
		}
	}
	return missing
}

func kernelAtLeast(major, minor int) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	var ma, mi int
	if _, err := fmt.Sscanf(release, "%d.%d", &ma, &mi); err != nil {
		return nil
	}
	if ma < major || ma == major && mi < minor {
		return fmt.Errorf("the kernel is %s, and %d.%d or newer is needed", release, major, minor)
	}
	return nil
}

// cgroup2Mount finds the unified hierarchy: /sys/fs/cgroup on most machines, /sys/fs/cgroup/unified beside v1.
func cgroup2Mount() (string, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("no cgroup2 is mounted: `mount -t cgroup2 none /sys/fs/cgroup/unified`")
}
