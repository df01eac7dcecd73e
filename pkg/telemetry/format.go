package telemetry

// Format is a compiled string with Envoy command operators (%REQ(x)%, %START_TIME%, …). It is immutable and may be
// used by any number of goroutines.
type Format struct{}

// CompileFormat compiles a format string. An unknown operator or a wrong argument is an error that names it.
func CompileFormat(s string) (*Format, error) { return &Format{}, nil }

// Append appends the text that the format gives for r. What is not known prints as "-".
func (f *Format) Append(dst []byte, r *Record) []byte { return dst }
