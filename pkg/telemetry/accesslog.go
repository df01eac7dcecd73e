package telemetry

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"weak"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Logs owns the files that access logs are written to: one writer goroutine for each file, however many
// listeners log to it. A file is closed when the last Logger that writes to it is gone: configurations come and go
// with every update, and nobody else knows when requests that began with an old one are over.
type Logs struct {
	mu     sync.Mutex
	closed bool
	files  map[string]*logFile
	// loggers by configuration, all weak.
	loggers map[weak.Pointer[mesh.AccessLog]]weak.Pointer[Logger]
}

// NewLogs returns a set of access-log files.
func NewLogs() *Logs {
	return &Logs{files: map[string]*logFile{}, loggers: map[weak.Pointer[mesh.AccessLog]]weak.Pointer[Logger]{}}
}

// ErrClosed says that Logs was closed.
var ErrClosed = errors.New("access logs are closed")

// Logger returns the compiled log of that configuration, the same one each time for the same pointer as long as
// somebody keeps it. Errors name the field: path, format, json_format, filter.
func (l *Logs) Logger(al *mesh.AccessLog) (*Logger, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	key := weak.Make(al)
	if lg := l.loggers[key].Value(); lg != nil {
		return lg, nil
	}
	lg, err := Compile(al)
	if err != nil {
		return nil, err
	}
	f := l.files[al.Path]
	if f == nil {
		if f, err = openLogFile(al.Path); err != nil {
			return nil, fmt.Errorf("path: %w", err)
		}
		l.files[al.Path] = f
	}
	f.users++
	lg.file = f
	l.loggers[key] = weak.Make(lg)
	runtime.AddCleanup(lg, l.release, released{key, f})
	return lg, nil
}

// released is what a Logger leaves behind.
type released struct {
	key  weak.Pointer[mesh.AccessLog]
	file *logFile
}

// release forgets a Logger that nobody refers to any more, and closes its file if it was the last to use it.
func (l *Logs) release(r released) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// The configuration may have got another Logger in the meantime.
	if l.loggers[r.key].Value() == nil {
		delete(l.loggers, r.key)
	}
	if r.file.users--; r.file.users == 0 && l.files[r.file.path] == r.file {
		delete(l.files, r.file.path)
		// A goroutine of its own: neither this lock nor the clean-up queue must wait for a disk.
		go func() { _ = r.file.close() }() // its failures are in its statistics
	}
}

// Reopen makes every writer open its file again: after rotation.
func (l *Logs) Reopen() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.files {
		f.requestReopen()
	}
}

// Close writes what is buffered and closes the files. Records that come later are dropped and counted.
func (l *Logs) Close() error {
	l.mu.Lock()
	l.closed = true
	files := l.files
	l.files = map[string]*logFile{}
	l.mu.Unlock()
	var errs []error
	for _, f := range files {
		errs = append(errs, f.close())
	}
	return errors.Join(errs...)
}

// LogStats counts what became of the lines of one file.
type LogStats struct {
	Path    string
	Written uint64 // lines
	Dropped uint64 // lines that found the buffer full, or came after Close
	Failed  uint64 // lines that the file would not take
	// LastError is the last failure to write or open, empty if the last one succeeded.
	LastError string
}

// Stats says how the files do, in no particular order.
func (l *Logs) Stats() []LogStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []LogStats
	for _, f := range l.files {
		out = append(out, f.stats())
	}
	return out
}

// Logger is one compiled access log: filter, format and file.
type Logger struct {
	config *mesh.AccessLog // kept, so that the same configuration finds this again
	filter filter
	format *Format // text
	json   *jsonNode
	omit   bool
	file   *logFile
}

// Compile compiles an access log without opening its file: for validation. Use Logs.Logger to log.
func Compile(al *mesh.AccessLog) (*Logger, error) {
	lg := &Logger{config: al, omit: al.OmitEmpty}
	var err error
	if lg.filter, err = compileFilter(al.Filter); err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	if al.JSON != nil {
		n, err := compileJSON(al.JSON, "json_format")
		lg.json = &n
		return lg, err
	}
	text := al.Format
	if text == "" {
		text = DefaultFormat
	}
	if lg.format, err = CompileFormat(text); err != nil {
		return nil, fmt.Errorf("format: %w", err)
	}
	return lg, nil
}

// scratch lends the buffers that lines are made in.
var scratch = sync.Pool{New: func() any { b := make([]byte, 0, 1024); return &b }}

// Log writes the record's line if the filter lets it pass. It never blocks: if the writer is too far behind,
// the line is dropped and counted. random is the request's draw, for runtime filters.
func (l *Logger) Log(r *Record, random uint64) {
	if l.filter != nil && !l.filter(r, random) {
		return
	}
	buf := scratch.Get().(*[]byte)
	*buf = l.AppendLine((*buf)[:0], r)
	l.file.write(*buf)
	if cap(*buf) <= 64<<10 {
		scratch.Put(buf)
	}
}

// AppendLine appends the line that Log would write, whatever the filter says.
func (l *Logger) AppendLine(dst []byte, r *Record) []byte {
	if l.json != nil {
		return append(l.json.append(dst, r, l.omit), '\n')
	}
	missing := "-"
	if l.omit {
		missing = ""
	}
	return l.format.AppendText(dst, r, missing)
}
