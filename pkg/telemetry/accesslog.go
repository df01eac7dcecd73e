package telemetry

import "github.com/sockmesh/sockmesh/pkg/mesh"

// Logs owns the files that access logs are written to: one writer goroutine for each file, however many
// listeners log to it.
type Logs struct{}

// NewLogs returns a set of access-log files.
func NewLogs() *Logs { return &Logs{} }

// Logger returns the compiled log of that configuration, the same one each time for the same pointer.
func (l *Logs) Logger(al *mesh.AccessLog) (*Logger, error) { return &Logger{}, nil }

// Reopen makes every writer open its file again: after rotation.
func (l *Logs) Reopen() {}

// Close writes what is buffered and closes the files.
func (l *Logs) Close() error { return nil }

// Logger is one compiled access log: filter, format and file.
type Logger struct{}

// Log writes the record's line if the filter lets it pass. It never blocks: if the writer is too far behind,
// the line is dropped and counted. random is the request's draw, for runtime filters.
func (l *Logger) Log(r *Record, random uint64) {}
