package kube

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

// tree is a folder with its subfolders, all of them watched.
//
// Symbolic links are followed, because a ConfigMap volume consists of them; a folder that is reached twice is read
// once.
type tree struct {
	dir     string
	watcher *fsnotify.Watcher
	watched map[string]inode // folders, by path
	// unreadable are folders that could not be read at the last walk.
	unreadable []string
}

type inode struct{ dev, ino uint64 }

// stamp tells whether a file may have changed.
type stamp struct {
	inode
	size     int64
	modified time.Time
	changed  syscall.Timespec
}

func newTree(dir string) (*tree, error) {
	watcher, err := fsnotify.NewBufferedWatcher(256)
	if err != nil {
		return nil, err
	}
	return &tree{dir: dir, watcher: watcher, watched: map[string]inode{}}, nil
}

func (t *tree) close() { _ = t.watcher.Close() }

func (t *tree) absolute(path string) string { return filepath.Join(t.dir, path) }

func (t *tree) relative(path string) string {
	if r, err := filepath.Rel(t.dir, path); err == nil {
		return r
	}
	return path
}

// walk lists all manifest files, by path relative to the folder, and what could not be read.
func (t *tree) walk() (files map[string]stamp, problems []string) {
	files = map[string]stamp{}
	t.unreadable = nil
	seen := map[inode]bool{}
	present := map[string]bool{}
	t.enter("", files, seen, present, &problems)
	for dir := range t.watched {
		if !present[dir] {
			_ = t.watcher.Remove(t.absolute(dir)) // The kernel has mostly done so already.
			delete(t.watched, dir)
		}
	}
	return files, problems
}

func (t *tree) enter(dir string, files map[string]stamp, seen map[inode]bool, present map[string]bool, problems *[]string) {
	path := t.absolute(dir)
	st, err := statFile(path)
	if err != nil {
		t.failed(dir, err, problems)
		return
	}
	if seen[st.inode] {
		return
	}
	seen[st.inode] = true
	present[dir] = true
	// Watch first and read then, so that nothing falls between.
	if t.watched[dir] != st.inode {
		_ = t.watcher.Remove(path)
		if err := t.watcher.Add(path); err != nil {
			*problems = append(*problems, fmt.Sprintf("%s: cannot be watched, changes are noticed late: %v", path, err))
		} else {
			t.watched[dir] = st.inode
		}
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		t.failed(dir, err, problems)
		return
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		st, mode, err := statMode(t.absolute(name))
		switch {
		case err != nil:
			if isManifest(e.Name()) && !os.IsNotExist(err) {
				t.failed(name, err, problems)
			}
		case mode.IsDir():
			t.enter(name, files, seen, present, problems)
		case mode.IsRegular() && isManifest(e.Name()):
			files[name] = st
		}
	}
}

func (t *tree) failed(path string, err error, problems *[]string) {
	t.unreadable = append(t.unreadable, path)
	*problems = append(*problems, err.Error())
}

// uncertain tells whether a file that was not found may still be there, in a folder that cannot be read now. The
// folder itself being gone is no reason to forget all it had: that is a mistake or a moment's state.
func (t *tree) uncertain(path string) bool {
	for _, dir := range t.unreadable {
		if dir == "" || path == dir || strings.HasPrefix(path, dir+string(filepath.Separator)) {
			return true
		}
	}
	return false
}

func isManifest(name string) bool {
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

func statFile(path string) (stamp, error) {
	s, _, err := statMode(path)
	return s, err
}

func statMode(path string) (stamp, fs.FileMode, error) {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}, 0, err
	}
	st := info.Sys().(*syscall.Stat_t) // Linux gives no other.
	return stamp{inode{st.Dev, st.Ino}, st.Size, info.ModTime(), st.Ctim}, info.Mode(), nil
}
