package kube

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Changes are taken up when the folder has been quiet for settle, but at the latest after settleMost. rescan is for
// what inotify cannot tell: targets of symbolic links, a folder that is replaced, a queue that overflowed.
const (
	settle     = 50 * time.Millisecond
	settleMost = time.Second
	rescan     = 5 * time.Second
)

// manifestSource serves a folder of manifests as if it were an API server.
//
// It works on the whole folder: files that changed are parsed again, then what should be is worked out from all files
// and compared with what is (applied). So the result does not depend on the order of changes, with two exceptions that
// keep a mistake from disturbing what runs: what can't be read any more stays as it was read last, and of two files
// that describe one object the one that was there first stays.
type manifestSource struct {
	*table
	log      *slog.Logger
	dir      string
	recorder EventRecorder
	files    map[string]*manifestFile // by path relative to dir
	applied  map[key]parsedObject
	tree     *tree

	mu       sync.Mutex
	problems []string
	warnings []string
}

// manifestFile is a file as it was parsed last.
type manifestFile struct {
	stamp   stamp
	content *parsed
	err     error // it cannot be read
}

// NewManifests gives a source that reads a folder, and follows its changes.
//
// All files ending in .yaml, .yml and .json are read, in subfolders too, names beginning with a dot excepted. A Pod
// without spec.nodeName counts as one of this node's: whether it is here is told by whether a network namespace owns
// one of its status.podIPs.
func NewManifests(cfg Config, dir string) (Source, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("--manifests: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("--manifests: %s is not a folder", dir)
	}
	log := cfg.Logger.With("source", "manifests", "dir", dir)
	recorder := logRecorder{log}
	return &manifestSource{
		table:    newTable(cfg, recorder),
		log:      log,
		dir:      dir,
		recorder: recorder,
		files:    map[string]*manifestFile{},
		applied:  map[key]parsedObject{},
	}, nil
}

// Status says what is seen.
func (s *manifestSource) Status() Status {
	st := s.status(s.dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Errors = slices.Clone(s.problems)
	return st
}

// Recorder logs: there is nowhere to publish Events.
func (s *manifestSource) Recorder() EventRecorder { return s.recorder }

// Run follows the folder until ctx ends.
func (s *manifestSource) Run(ctx context.Context) error {
	tree, err := newTree(s.dir)
	if err != nil {
		return fmt.Errorf("--manifests %s: %w", s.dir, err)
	}
	defer tree.close()
	s.tree = tree
	s.log.Info("watching a folder of manifests", "node", s.cfg.NodeName)
	var handler sync.WaitGroup
	defer handler.Wait()
	handler.Go(func() { s.run(ctx) })

	s.load(nil)
	for _, k := range kinds {
		s.listed(k)
	}
	s.follow(ctx)
	return nil
}

// follow loads what changed, until ctx ends.
func (s *manifestSource) follow(ctx context.Context) {
	ticker := time.NewTicker(rescan)
	defer ticker.Stop()
	quiet := time.NewTimer(time.Hour)
	defer quiet.Stop()
	touched := map[string]bool{} // Files that changed, whatever their time stamps say.
	var first time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-s.tree.watcher.Events:
			if event.Op == fsnotify.Chmod && !s.broken(event.Name) {
				continue
			}
			if len(touched) == 0 {
				first = time.Now()
			}
			touched[event.Name] = true
			quiet.Reset(max(0, min(settle, settleMost-time.Since(first))))
		case err := <-s.tree.watcher.Errors:
			s.log.Warn("inotify lost events, reading the folder again", "error", err)
			quiet.Reset(settle)
		case <-quiet.C:
			s.load(touched)
			touched = map[string]bool{}
		case <-ticker.C:
			if len(touched) == 0 { // Else it comes soon, and must not come before it is quiet.
				s.load(nil)
			}
		}
	}
}

// broken tells whether a file could not be read, so that a change of its mode matters.
func (s *manifestSource) broken(path string) bool {
	f := s.files[s.tree.relative(path)]
	return f == nil || f.err != nil
}

// load reads what changed and applies it.
func (s *manifestSource) load(touched map[string]bool) {
	found, problems := s.tree.walk()
	for path := range s.files {
		// A folder that cannot be read says nothing about its files.
		if _, still := found[path]; !still && !s.tree.uncertain(path) {
			delete(s.files, path)
		}
	}
	for path, st := range found {
		f := s.files[path]
		if f == nil {
			f = &manifestFile{}
			s.files[path] = f
		}
		if f.content == nil && f.err == nil || f.stamp != st || f.err != nil || touched[s.tree.absolute(path)] {
			s.read(path, f, st)
		}
	}
	wanted, more := s.wanted()
	s.apply(wanted)
	s.report(append(problems, more...))
}

// read parses a file. A file that cannot be read, or is empty where it had content (an editor is about to write it),
// keeps what it had.
func (s *manifestSource) read(path string, f *manifestFile, st stamp) {
	f.stamp = st
	content, err := os.ReadFile(s.tree.absolute(path))
	if errors.Is(err, fs.ErrNotExist) {
		delete(s.files, path) // Gone between walk and now: its deletion is noticed next.
		return
	}
	if err == nil && len(content) == 0 && f.content != nil && len(f.content.objects) > 0 {
		err = errors.New("the file is empty: what it had stays until it has content again or is deleted")
	}
	f.err = err
	if err == nil {
		f.content = parseFile(path, content)
	}
}

// wanted works out what should be, from all files.
func (s *manifestSource) wanted() (wanted map[key]parsedObject, problems []string) {
	wanted = map[key]parsedObject{}
	bad := map[key]bool{}
	opaque := map[string]bool{} // files of which some part can't be read
	for _, path := range s.paths() {
		f := s.files[path]
		if f.err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", path, f.err))
			opaque[path] = true
		}
		if f.content == nil {
			continue
		}
		problems = append(problems, f.content.errors...)
		opaque[path] = opaque[path] || f.content.opaque
		for _, k := range f.content.bad {
			bad[k] = true
		}
		for _, o := range f.content.objects {
			other, twice := wanted[o.key]
			if !twice {
				wanted[o.key] = o
				continue
			}
			winner, loser := other, o
			if s.incumbent(o) && !s.incumbent(other) {
				winner, loser = o, other
			}
			wanted[o.key] = winner
			problems = append(problems, fmt.Sprintf("%s: %s: Duplicate: it is in %s as well, which counts", loser.place, loser.key, winner.place))
		}
	}
	for k, o := range s.applied {
		if _, have := wanted[k]; !have && (bad[k] || opaque[o.place.file]) {
			wanted[k] = o // The last good version stays.
		}
	}
	return wanted, problems
}

// paths are all files in order, so that of duplicates at the start the first counts.
func (s *manifestSource) paths() []string {
	paths := make([]string, 0, len(s.files))
	for path := range s.files {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths
}

// incumbent tells whether an object is now described by the file that o stands in.
func (s *manifestSource) incumbent(o parsedObject) bool {
	now, ok := s.applied[o.key]
	return ok && now.place.file == o.place.file
}

// apply brings the table from what is to what should be: first what comes or changes, then what goes.
func (s *manifestSource) apply(wanted map[key]parsedObject) {
	for k, o := range wanted {
		was, had := s.applied[k]
		switch {
		case s.here(o.value):
			s.set(o.value)
		case had && s.here(was.value):
			s.unset(was.value)
		}
	}
	for k, was := range s.applied {
		if _, still := wanted[k]; !still && s.here(was.value) {
			s.unset(was.value)
		}
	}
	s.applied = wanted
}

// here tells whether an object concerns this node.
func (s *manifestSource) here(value any) bool {
	switch v := value.(type) {
	case nil:
		return false
	case *Pod:
		return v.NodeName == "" || v.NodeName == s.cfg.NodeName
	case *Node:
		return v.Name == s.cfg.NodeName
	}
	return true
}

// report logs problems and warnings that are new, and keeps the problems for Status.
func (s *manifestSource) report(problems []string) {
	slices.Sort(problems)
	problems = slices.Compact(problems)
	var warnings, ignored []string
	for _, path := range s.paths() {
		if c := s.files[path].content; c != nil {
			warnings = append(warnings, c.warnings...)
			ignored = append(ignored, c.ignored...)
		}
	}
	for _, p := range problems {
		if !slices.Contains(s.problems, p) {
			s.log.Error("bad manifest, the last good version stays: " + p)
		}
	}
	for _, p := range s.problems {
		if !slices.Contains(problems, p) {
			s.log.Info("no longer wrong in manifests: " + p)
		}
	}
	for _, w := range warnings {
		if !slices.Contains(s.warnings, w) {
			s.log.Warn(w)
		}
	}
	for _, i := range ignored {
		s.log.Debug("ignored: " + i)
	}
	s.mu.Lock()
	s.problems, s.warnings = problems, warnings
	s.mu.Unlock()
}
