package xds

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/fsnotify/fsnotify"
)

// fileSettle is how long a file must rest before it is read: editors and atomic moves make several events.
const fileSettle = 50 * time.Millisecond

// watchPath serves a subscription from a file, and again whenever it changes. The directory is watched, because
// files are replaced by renames. A file that cannot be read leaves the last good one in force.
func (s *stream) watchPath(ctx context.Context) {
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer watcher.Close()
		err = watcher.Add(filepath.Dir(s.source.path))
	}
	if err != nil {
		s.setState(false, fmt.Errorf("%s: cannot be watched: %w", s.source.path, err))
		s.client.log.Error("xDS file is read once and not watched", "file", s.source.path, "error", err)
		watcher = nil
	}
	settle := time.NewTimer(0)
	defer settle.Stop()
	generation := 0
	for {
		var events chan fsnotify.Event
		if watcher != nil {
			events = watcher.Events
		}
		select {
		case <-ctx.Done():
			return
		case <-events:
			settle.Reset(fileSettle)
		case <-s.wake:
			settle.Reset(0)
		case <-settle.C:
			generation++
			err := s.readPath(strconv.Itoa(generation))
			s.setState(err == nil, err)
			if err != nil {
				s.client.log.Error("xDS file refused; the last good configuration stays", "file", s.source.path, "error", err)
			}
		}
	}
}

func (s *stream) readPath(version string) error {
	data, err := os.ReadFile(s.source.path)
	if err != nil {
		return err
	}
	resources, errs := ParseResources(s.source.path, data)
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	list := make([]incoming, 0, len(resources))
	for _, r := range resources {
		list = append(list, incoming{version: version, any: r.Any})
	}
	sub := s.existing(s.kind)
	return s.client.apply(s, s.kind, list, sub != nil && sub.wildcard)
}
