package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// layoutVersion counts incompatible changes of the maps. A new version gets its own directory: its maps are filled
// while the old programs still work on theirs, and then the links move over.
const layoutVersion = 2

const bpfFSMagic = 0xcafe4a11

// layoutDir is <bpffs>/v<layout>.
type layoutDir struct {
	base    string
	version int
}

func (d layoutDir) path() string               { return filepath.Join(d.base, "v"+strconv.Itoa(d.version)) }
func (d layoutDir) mapPin(name string) string  { return filepath.Join(d.path(), "maps", name) }
func (d layoutDir) linkPin(name string) string { return filepath.Join(d.path(), "links", name) }
func (d layoutDir) retired() string            { return filepath.Join(d.base, "retired") }

func (d layoutDir) create() error {
	for _, sub := range []string{"maps", "links"} {
		if err := os.MkdirAll(filepath.Join(d.path(), sub), 0o700); err != nil {
			return fmt.Errorf("make the directory for pins: %w", err)
		}
	}
	return nil
}

// retire keeps a sockhash alive that has been replaced: sockets whose map goes away lose the bytes that are queued
// between them. sweepRetired removes it when the last socket has gone.
func (d layoutDir) retire(m *ebpf.Map, pin string) error {
	info, err := m.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	if err := os.MkdirAll(d.retired(), 0o700); err != nil {
		return err
	}
	return os.Rename(pin, filepath.Join(d.retired(), fmt.Sprintf("%s_%d", filepath.Base(pin), id)))
}

// sweepRetired unpins retired sockhashes that are empty.
func (d layoutDir) sweepRetired() {
	entries, _ := os.ReadDir(d.retired())
	for _, e := range entries {
		p := filepath.Join(d.retired(), e.Name())
		m, err := ebpf.LoadPinnedMap(p, nil)
		if err != nil {
			continue
		}
		key := make([]byte, m.KeySize())
		if err := m.NextKey(nil, &key); errors.Is(err, ebpf.ErrKeyNotExist) {
			os.Remove(p)
		}
		m.Close()
	}
	os.Remove(d.retired()) // fails while something is in it
}

// otherLayouts are the directories that earlier or later versions left.
func (d layoutDir) otherLayouts() []layoutDir {
	var out []layoutDir
	entries, _ := os.ReadDir(d.base)
	for _, e := range entries {
		v, err := strconv.Atoi(strings.TrimPrefix(e.Name(), "v"))
		if err == nil && strings.HasPrefix(e.Name(), "v") && v != d.version {
			out = append(out, layoutDir{d.base, v})
		}
	}
	return out
}

// remove deletes the directory with the maps and links in it.
func (d layoutDir) remove() error {
	var errs []error
	for _, sub := range []string{"links", "maps", ""} {
		dir := filepath.Join(d.path(), sub)
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				errs = append(errs, err)
			}
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ensureBPFFS makes sure that dir lies on a BPF file system. Where none is mounted, one is mounted at /sys/fs/bpf if
// dir is below that, else on dir itself: never on a directory that holds other things.
func ensureBPFFS(dir string) error {
	ok, err := onBPFFS(dir)
	if err != nil || ok {
		return err
	}
	target := dir
	if parent := filepath.Dir(dir); parent == "/sys/fs/bpf" {
		target = parent
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	if entries, err := os.ReadDir(target); err != nil {
		return fmt.Errorf("no BPF file system is mounted for %s: %w", dir, err)
	} else if len(entries) > 0 {
		return fmt.Errorf("%s is not on a BPF file system and is not empty: mount one (mount -t bpf bpf %s) or choose another --bpffs", target, target)
	}
	if err := unix.Mount("bpf", target, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF file system at %s: %w (run `mount -t bpf bpf %s` on the host, or grant CAP_SYS_ADMIN)", target, err, target)
	}
	return nil
}

// onBPFFS looks at dir or at its nearest ancestor that exists.
func onBPFFS(dir string) (bool, error) {
	if !filepath.IsAbs(dir) {
		return false, fmt.Errorf("--bpffs %q: must be an absolute path", dir)
	}
	for p := dir; ; p = filepath.Dir(p) {
		var st unix.Statfs_t
		err := unix.Statfs(p, &st)
		if err == nil {
			return int64(st.Type) == bpfFSMagic, nil
		}
		if !errors.Is(err, unix.ENOENT) || p == "/" {
			return false, fmt.Errorf("look at %s: %w", p, err)
		}
	}
}

// isMountPoint tells whether something is mounted on dir itself.
func isMountPoint(dir string) bool {
	var self, parent unix.Stat_t
	if unix.Stat(dir, &self) != nil || unix.Stat(filepath.Dir(dir), &parent) != nil {
		return false
	}
	return self.Dev != parent.Dev
}
