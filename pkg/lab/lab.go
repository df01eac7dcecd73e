// Package lab builds small clusters out of network namespaces on one machine: a node, pods on its bridge, the
// Kubernetes objects that describe them, an xDS control plane and the agent. The demo, the end-to-end tests and the
// benchmark all stand on it.
//
// The node is a network namespace too, and has no uplink: when the hooks are off, a Service address must not leave
// the machine. Each lab has a cgroup of its own below the machine's cgroup2 mount, in which all its processes live,
// a bpffs of its own, and a directory for everything else, so several labs run side by side and none sees another.
//
// Whatever happens, nothing stays behind: Close undoes all of it; processes die with the one that started them; and
// what a killed run could not undo (mounts, cgroups, orphans) the next New removes, recognised by its lock.
package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// prefix begins the names of everything that a lab leaves visible on the machine: its directory and its cgroup.
const prefix = "sockmesh-lab-"

// Config says what kind of cluster is wanted. The zero value is a good one.
type Config struct {
	// NodeName is the node's name in the Kubernetes objects; "node-1" if empty.
	NodeName string
	// Subnets from which pods take their addresses, all on one bridge; the node owns the first address of each.
	// DefaultSubnets if empty.
	Subnets []netip.Prefix
	// Binaries is where sockmesh-agent, sockmesh-control and sockmesh are; only needed to start them.
	Binaries string
	// Helper is the command line that ends up in traffic.Main, for StartTraffic: the caller's own executable
	// and what makes it do that.
	Helper []string
}

// DefaultSubnets are private ranges of both families.
var DefaultSubnets = []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("fd77::/64")}

// Lab is one cluster. Its methods may be called from several goroutines.
type Lab struct {
	// Dir holds netns/ (pods), bpf/ (a bpffs), manifests/, xds/, state/, log/ and the admin socket. Its path is
	// short, for the socket's sake.
	Dir string
	// Cgroup is the directory of the lab's own cgroup.
	Cgroup string
	// Node is the node's own network namespace, where agent and control plane run.
	Node *Place

	cfg   Config
	lock  *os.File
	mu    sync.Mutex // guards what follows
	pods  map[string]*Pod
	procs []*Process
	links int
	ended bool
}

// New makes the node with its bridge and no pods. It first removes what killed runs left behind. The caller must
// Close it; see also CloseOnSignal.
func New(cfg Config) (*Lab, error) {
	if err := Check(); err != nil {
		return nil, err
	}
	if cfg.NodeName == "" {
		cfg.NodeName = "node-1"
	}
	if len(cfg.Subnets) == 0 {
		cfg.Subnets = DefaultSubnets
	}
	if err := Sweep(); err != nil {
		return nil, err
	}
	root, err := cgroup2Mount()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(os.TempDir(), prefix)
	if err != nil {
		return nil, fmt.Errorf("make the lab's directory: %w", err)
	}
	l := &Lab{Dir: dir, Cgroup: filepath.Join(root, filepath.Base(dir)), cfg: cfg, pods: map[string]*Pod{}}
	if err := l.build(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) build() error {
	var err error
	if l.lock, err = takeLock(l.Dir); err != nil {
		return err
	}
	for _, d := range []string{"netns", "pods", "bpf", "manifests", "xds", "state", "log", "tmp"} {
		if err := os.Mkdir(filepath.Join(l.Dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("bpf", filepath.Join(l.Dir, "bpf"), "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount a bpffs at %s/bpf: %w", l.Dir, err)
	}
	if err := os.Mkdir(l.Cgroup, 0o755); err != nil {
		return fmt.Errorf("make the lab's cgroup: %w", err)
	}
	if l.Node, err = l.newPlace("node", filepath.Join(l.Dir, "node")); err != nil {
		return err
	}
	if err := l.writeEnter(); err != nil {
		return err
	}
	return l.buildNode()
}

// writeEnter leaves a script in the lab's directory that runs a command as a pod would, for people.
func (l *Lab) writeEnter() error {
	script := fmt.Sprintf(`#!/bin/sh
# in NAMESPACE/POD COMMAND...: runs the command in that pod's network namespace and cgroup.
set -eu
pod=$(echo "$1" | tr / _); shift
echo $$ > %s/$pod/cgroup.procs
exec nsenter --net=%s/pods/$pod "$@"
`, l.Cgroup, l.Dir)
	return os.WriteFile(filepath.Join(l.Dir, "in"), []byte(script), 0o755)
}

// Close ends every process of the lab and removes its namespaces, mounts, cgroup and directory. It may be called more
// than once.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return nil
	}
	l.ended = true
	procs := l.procs
	l.mu.Unlock()

	// All are asked first and waited for afterwards, so that closing takes as long as the slowest alone.
	for i := len(procs) - 1; i >= 0; i-- {
		procs[i].signal(unix.SIGTERM)
	}
	deadline := time.After(3 * time.Second)
	for _, p := range procs {
		select {
		case <-p.Done():
		case <-deadline:
			deadline = closedTime
			p.signal(unix.SIGKILL)
			<-p.Done()
		}
	}
	for _, p := range l.Places() {
		p.netns.Close()
	}
	err := demolish(l.Dir, l.Cgroup)
	if l.lock != nil {
		l.lock.Close()
	}
	return err
}

// closedTime stands for a deadline that has passed.
var closedTime = func() <-chan time.Time { c := make(chan time.Time); close(c); return c }()

// Places are the node and the pods that there are now.
func (l *Lab) Places() []*Place {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*Place
	if l.Node != nil {
		all = append(all, l.Node)
	}
	for _, p := range l.pods {
		all = append(all, &p.Place)
	}
	return all
}

// Sweep removes labs whose owner is dead. An owner holds a lock on its lab's directory as long as it lives.
func Sweep() error {
	root, err := cgroup2Mount()
	if err != nil {
		return err
	}
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		lock, err := takeLock(dir)
		if err != nil {
			continue // somebody lives there
		}
		err = demolish(dir, filepath.Join(root, filepath.Base(dir)))
		lock.Close()
		if err != nil {
			return fmt.Errorf("remove what a killed run left at %s: %w", dir, err)
		}
	}
	return nil
}

func takeLock(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// demolish ends whatever still lives in the lab's cgroup, then removes mounts, cgroups and files. Everything below
// these two directories is the lab's own.
func demolish(dir, cgroup string) error {
	if err := removeCgroup(cgroup); err != nil {
		return err
	}
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i], unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", mounts[i], err)
		}
	}
	return os.RemoveAll(dir)
}

// removeCgroup kills what is in the cgroup and below it and removes them all. A killed process takes a moment to
// leave its cgroup, which until then cannot be removed.
func removeCgroup(cgroup string) error {
	if _, err := os.Stat(cgroup); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("end the processes in %s: %w", cgroup, err)
	}
	var err error
	for range 200 {
		if err = removeTree(cgroup); err == nil {
			return nil
		}
		time.Sleep(25 * time.Millisecond)
	}
	return fmt.Errorf("remove the cgroup %s: %w", cgroup, err)
}

// removeTree is rmdir from the leaves up: a cgroup's files go with its directory.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return unix.Rmdir(dir)
}

// mountsBelow lists the mount points under dir, in the order in which they were mounted.
func mountsBelow(dir string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) > 1 && strings.HasPrefix(fields[1], dir+"/") {
			found = append(found, fields[1])
		}
	}
	return found, nil
}
