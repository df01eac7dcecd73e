package telemetry

import (
	"bytes"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// logBuffer is how much may wait for one file's writer.
	logBuffer = 4 << 20
	// logFlush is how much wakes the writer at once; less waits for logDelay, so that a line is soon to be seen and a
	// busy proxy does not make a system call for each.
	logFlush = 64 << 10
	logDelay = 200 * time.Millisecond
)

// logFile is one file and the goroutine that writes to it. Loops append to a buffer under a lock that is held for a
// memory copy only; the writer swaps the buffer for its other one and writes without the lock.
type logFile struct {
	path  string
	users int // guarded by Logs.mu

	mu      sync.Mutex
	buf     []byte
	lines   uint64
	reopen  bool
	closing bool
	st      LogStats

	wake chan struct{} // one token: look again
	full chan struct{} // one token: do not wait for more
	done chan struct{} // closed when the goroutine is gone

	// The writer's own.
	out   *os.File
	spare []byte
}

// openLogFile opens the file and starts its writer.
func openLogFile(path string) (*logFile, error) {
	out, err := openForAppend(path)
	if err != nil {
		return nil, err
	}
	f := &logFile{
		path: path, out: out, st: LogStats{Path: path},
		wake: make(chan struct{}, 1), full: make(chan struct{}, 1), done: make(chan struct{}),
	}
	go f.run()
	return f, nil
}

func openForAppend(path string) (*os.File, error) {
	switch path {
	case "":
		return nil, fmt.Errorf("no file named")
	case "/dev/stdout":
		return os.Stdout, nil
	case "/dev/stderr":
		return os.Stderr, nil
	}
	// O_NONBLOCK: a FIFO without reader is an error, not a wait without end.
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, 0o644)
}

// write appends a line to the buffer, or drops it if that is full.
func (f *logFile) write(line []byte) {
	f.mu.Lock()
	if f.closing || len(f.buf)+len(line) > logBuffer {
		f.st.Dropped++
		f.mu.Unlock()
		return
	}
	before := len(f.buf)
	f.buf = append(f.buf, line...)
	f.lines++
	after := len(f.buf)
	f.mu.Unlock()
	if before == 0 {
		signal(f.wake)
	}
	if before < logFlush && after >= logFlush {
		signal(f.full)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (f *logFile) requestReopen() {
	f.mu.Lock()
	f.reopen = true
	f.mu.Unlock()
	signal(f.wake)
	signal(f.full)
}

// close writes what is buffered and waits for the writer to end.
func (f *logFile) close() error {
	f.mu.Lock()
	f.closing = true
	f.mu.Unlock()
	signal(f.wake)
	signal(f.full)
	<-f.done
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.st.LastError != "" {
		return fmt.Errorf("%s: %s", f.path, f.st.LastError)
	}
	return nil
}

func (f *logFile) stats() LogStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.st
}

func (f *logFile) run() {
	defer close(f.done)
	timer := time.NewTimer(logDelay)
	defer timer.Stop()
	for range f.wake {
		timer.Reset(logDelay)
		select {
		case <-f.full:
		case <-timer.C:
		}
		if f.flush() {
			return
		}
	}
}

// flush writes the buffer, opens the file again if that was asked for, and says whether it was the last time.
func (f *logFile) flush() (last bool) {
	f.mu.Lock()
	data, lines := f.buf, f.lines
	f.buf, f.lines = f.spare[:0], 0
	reopen := f.reopen
	f.reopen = false
	last = f.closing
	f.mu.Unlock()

	// What was logged before a rotation belongs to the old file.
	if len(data) > 0 {
		n, err := f.out.Write(data)
		f.note(data, lines, n, err)
	}
	// A burst's memory is given back.
	if cap(data) > 8*logFlush {
		data = nil
	}
	f.spare = data
	isStd := f.out == os.Stdout || f.out == os.Stderr
	if reopen && !isStd {
		f.openAgain()
	}
	if last && !isStd {
		if err := f.out.Close(); err != nil {
			f.note(nil, 0, 0, err)
		}
	}
	return last
}

// openAgain keeps the old file if the new one cannot be opened.
func (f *logFile) openAgain() {
	out, err := openForAppend(f.path)
	if err != nil {
		f.note(nil, 0, 0, err)
		return
	}
	_ = f.out.Close() // everything is written, and nobody will look
	f.out = out
}

func (f *logFile) note(data []byte, lines uint64, n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		f.st.Written += lines
		f.st.LastError = ""
		return
	}
	written := min(uint64(bytes.Count(data[:n], []byte{'\n'})), lines)
	f.st.Written += written
	f.st.Failed += lines - written
	f.st.LastError = err.Error()
}
