package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// pairsGrace is how long Cleanup waits for redirected connections to end by themselves.
const pairsGrace = 5 * time.Second

// Cleanup detaches and removes everything that agents with this BPFFS directory left in the kernel, of any layout. New
// connections go where their callers said from the first moment. Connections through the proxy end with the
// proxy; redirected ones between two applications are given a few seconds, because bytes that are under way between
// them when the map goes are lost; what is left then is named in the log.
func Cleanup(cfg Config) error {
	if cfg.BPFFS == "" || cfg.Logger == nil || cfg.CgroupRoot == "" {
		if cfg.CgroupRoot == "" {
			cfg.CgroupRoot = "/" // not needed here, and cgroup v2 may be gone
		}
		var err error
		if cfg, err = cfg.withDefaults(); err != nil {
			return err
		}
	}
	ok, err := onBPFFS(cfg.BPFFS)
	if err != nil {
		return err
	}
	if _, err := os.Stat(cfg.BPFFS); errors.Is(err, os.ErrNotExist) || !ok {
		return nil // never started here
	}
	own := layoutDir{cfg.BPFFS, layoutVersion}
	layouts := append([]layoutDir{own}, own.otherLayouts()...)
	var errs []error
	for _, dir := range layouts {
		errs = append(errs, cleanDevices(cfg, dir), detachLinks(dir))
	}
	for _, dir := range layouts {
		errs = append(errs, drainPairs(cfg, dir.mapPin(sockmeshMapSmPairs)), dir.remove())
	}
	retired, _ := os.ReadDir(own.retired())
	for _, e := range retired {
		errs = append(errs, os.Remove(filepath.Join(own.retired(), e.Name())))
	}
	if err := os.Remove(own.retired()); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	if isMountPoint(cfg.BPFFS) {
		errs = append(errs, unix.Unmount(cfg.BPFFS, 0))
	}
	if err := os.Remove(cfg.BPFFS); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// cleanDevices takes the programs for clients outside off the node's devices. Their connections end.
func cleanDevices(cfg Config, dir layoutDir) error {
	ns, err := openNetns(cfg.NodeNetns)
	if err != nil {
		return err
	}
	defer ns.Close()
	return inNetns(ns, func() error { return stopOutside(dir) })
}

func detachLinks(dir layoutDir) error {
	var errs []error
	entries, _ := os.ReadDir(filepath.Join(dir.path(), "links"))
	for _, e := range entries {
		l, err := link.LoadPinnedLink(dir.linkPin(e.Name()), nil)
		if err != nil {
			errs = append(errs, fmt.Errorf("open link %s: %w", e.Name(), err))
			continue
		}
		// Detach works although a running agent holds the link too. ENOLINK: its cgroup is gone.
		if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
			errs = append(errs, fmt.Errorf("detach %s: %w", e.Name(), err))
		}
		l.Close()
	}
	return errors.Join(errs...)
}

func drainPairs(cfg Config, pin string) error {
	pairs, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	defer pairs.Close()
	left := 0
	for end := time.Now().Add(pairsGrace); ; time.Sleep(20 * time.Millisecond) {
		if left = countEntries(pairs); left == 0 || time.Now().After(end) {
			break
		}
	}
	if left > 0 {
		cfg.Logger.Warn("redirected connections fall back to TCP; bytes under way between their ends at this moment are lost", "sockets", left)
	}
	return nil
}
