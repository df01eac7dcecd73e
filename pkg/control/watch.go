package control

import (
	"context"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settle is how long the folder must rest before it is read: a change of several files should become one set.
const settle = 100 * time.Millisecond

// watch reloads the folder after changes. Where it cannot be watched (too many inotify watches) it is looked at
// every few seconds.
func (s *Server) watch(ctx context.Context) {
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer watcher.Close()
		err = watcher.Add(s.cfg.Dir)
	}
	if err != nil {
		s.log.Warn("the folder cannot be watched; it is read every 5 s", "dir", s.cfg.Dir, "error", err)
		ticker := time.NewTicker(5 * time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				s.Reload()
			}
		}
	}
	timer := time.NewTimer(0) // once: the folder may have changed between New and here
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-watcher.Events:
			if event.Op != fsnotify.Chmod {
				timer.Reset(settle)
			}
		case err := <-watcher.Errors:
			s.log.Warn("watching the folder", "dir", s.cfg.Dir, "error", err)
			timer.Reset(settle)
		case <-timer.C:
			s.Reload()
		}
	}
}
