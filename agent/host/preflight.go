package host

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// capability is one that the agent can't work without, and what for. deploy/daemonset.yaml grants exactly these.
type capability struct {
	bit  int
	name string
	why  string
}

// capabilities are required at start. The numbers are those of linux/capability.h.
var capabilities = []capability{
	{unix.CAP_BPF, "CAP_BPF", "load programs and maps"},
	{unix.CAP_PERFMON, "CAP_PERFMON", "programs that read kernel memory by BTF"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "attach programs to cgroups and devices"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "enter pods' network namespaces, mount bpffs"},
}

// CheckPrivileges says in one message which capabilities are missing and what each is for.
func CheckPrivileges() error {
	have, err := effectiveCapabilities()
	if err != nil {
		return fmt.Errorf("reading this process's capabilities: %w", err)
	}
	return missing(have)
}

func missing(have uint64) error {
	var lack []string
	for _, c := range capabilities {
		// The kernel takes CAP_SYS_ADMIN for the two that were split off it.
		split := c.bit == unix.CAP_BPF || c.bit == unix.CAP_PERFMON
		if have&(1<<c.bit) == 0 && !(split && have&(1<<unix.CAP_SYS_ADMIN) != 0) {
			lack = append(lack, fmt.Sprintf("%s (%s)", c.name, c.why))
		}
	}
	if len(lack) == 0 {
		return nil
	}
	return fmt.Errorf("not privileged enough: missing %s; run as root, or with the capabilities of deploy/daemonset.yaml",
		strings.Join(lack, ", "))
}

func effectiveCapabilities() (uint64, error) {
	b, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return 0, err
	}
	return capabilityField(string(b), "CapEff")
}

// capabilityField reads one of a thread's capability sets out of its status file.
func capabilityField(status, field string) (uint64, error) {
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, field+":"); ok {
			var v uint64
			_, err := fmt.Sscanf(strings.TrimSpace(hex), "%x", &v)
			return v, err
		}
	}
	return 0, fmt.Errorf("no %s in a thread's status file", field)
}
