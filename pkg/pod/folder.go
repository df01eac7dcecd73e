package pod

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// A file whose namespace is not mounted yet is looked at again soon, then less often, then by the regular scan.
const (
	probeFirst  = time.Millisecond
	probeLast   = 100 * time.Millisecond
	probeGiveUp = 10 * time.Second
	// scanEvery is for what inotify cannot tell: a folder that appears or is mounted over, a symbolic link into
	// /proc whose process ended, an overflowed queue.
	scanEvery = 2 * time.Second
	// inspectEvery counts the scans between two looks at who else listens in pods.
	inspectEvery = 3
)

// folder follows the files of the netns folder. It belongs to the Manager's goroutine.
type folder struct {
	dir     string
	log     *slog.Logger
	watcher *fsnotify.Watcher
	watched spaceID // the folder itself, by identity
	own     spaceID // the agent's own namespace is nobody's
	files   map[string]spaceID
	probes  map[string]*probe
	missing bool
}

// probe is a file that is not a namespace yet.
type probe struct {
	next, since time.Time
	wait        time.Duration
	said        string // the last error that was logged
}

func newFolder(dir string, log *slog.Logger) (*folder, error) {
	watcher, err := fsnotify.NewBufferedWatcher(256)
	if err != nil {
		return nil, err
	}
	own, err := identifyPath("/proc/self/ns/net")
	if err != nil {
		_ = watcher.Close()
		return nil, err
	}
	return &folder{dir: dir, log: log, watcher: watcher, own: own, files: map[string]spaceID{}, probes: map[string]*probe{}}, nil
}

func (f *folder) close() { _ = f.watcher.Close() }

// folderEvents is what the Manager does about a file; found keeps or closes the descriptor.
type folderEvents interface {
	found(name string, file *os.File, id spaceID) error
	lost(name string, id spaceID)
}

// scan compares the folder with what is known of it.
func (f *folder) scan(now time.Time, to folderEvents) {
	f.rewatch()
	entries, err := os.ReadDir(f.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.log.Warn("the folder of network namespaces cannot be read", "dir", f.dir, "error", err)
		return
	}
	present := make(map[string]bool, len(entries))
	for _, e := range entries {
		present[e.Name()] = true
		f.look(e.Name(), now, to)
	}
	for name := range f.files {
		if !present[name] {
			f.look(name, now, to)
		}
	}
	for name := range f.probes {
		if !present[name] {
			delete(f.probes, name)
		}
	}
}

// rewatch subscribes to the folder again if another one stands in its place.
func (f *folder) rewatch() {
	id, err := identifyPath(f.dir)
	if err != nil {
		if !f.missing {
			f.missing = true
			f.log.Warn("the folder of network namespaces is not there yet", "dir", f.dir, "error", err)
		}
		f.watched = spaceID{}
		return
	}
	if id == f.watched {
		return
	}
	_ = f.watcher.Remove(f.dir)
	if err := f.watcher.Add(f.dir); err != nil {
		f.log.Warn("the folder of network namespaces cannot be watched; it is scanned instead", "dir", f.dir, "error", err)
		return
	}
	f.watched, f.missing = id, false
}

// look notices whether a file came, went, or was replaced.
func (f *folder) look(name string, now time.Time, to folderEvents) {
	path := filepath.Join(f.dir, name)
	known, isKnown := f.files[name]
	id, err := identifyPath(path)
	if isKnown && err == nil && id == known {
		return
	}
	if isKnown {
		delete(f.files, name)
		to.lost(name, known)
	}
	if errors.Is(err, fs.ErrNotExist) {
		delete(f.probes, name)
		return
	}
	if err == nil {
		err = f.take(name, path, to)
	}
	if err != nil {
		f.later(name, now, err)
		return
	}
	delete(f.probes, name)
}

func (f *folder) take(name, path string, to folderEvents) error {
	file, id, err := openNetns(path)
	if err != nil {
		return err
	}
	if id == f.own {
		f.files[name] = id
		return file.Close()
	}
	if err := to.found(name, file, id); err != nil {
		return err
	}
	f.files[name] = id
	return nil
}

// later looks at a file again after a while.
func (f *folder) later(name string, now time.Time, err error) {
	p := f.probes[name]
	if p == nil {
		p = &probe{since: now, wait: probeFirst}
		f.probes[name] = p
	}
	p.next = now.Add(p.wait)
	p.wait = min(2*p.wait, probeLast)
	if now.Sub(p.since) > probeGiveUp {
		p.next = now.Add(scanEvery)
	}
	if said := err.Error(); said != p.said && !errors.Is(err, errNotNetns) {
		p.said = said
		f.log.Warn("a network namespace cannot be used, retrying", "file", filepath.Join(f.dir, name), "error", err)
	}
}

// due looks again at files whose time has come, and tells when the next one's is.
func (f *folder) due(now time.Time, to folderEvents) (next time.Time) {
	for name, p := range f.probes {
		if !p.next.After(now) {
			f.look(name, now, to)
		}
	}
	for _, p := range f.probes {
		if next.IsZero() || p.next.Before(next) {
			next = p.next
		}
	}
	return next
}
