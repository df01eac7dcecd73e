package mesh

// FormatChecks are the checks of Envoy's command operators (%REQ(x)%…). Who interprets them is pkg/telemetry, which
// stands on this package and so can't be called from here: it registers itself. Without it (a test of this package
// alone) every format is accepted.
type FormatChecks struct {
	Value     func(format string) error // of a header value
	AccessLog func(*AccessLog) error
}

var formatChecks = FormatChecks{
	Value:     func(string) error { return nil },
	AccessLog: func(*AccessLog) error { return nil },
}

// RegisterFormatChecks is called from an init function, before anything is compiled.
func RegisterFormatChecks(checks FormatChecks) { formatChecks = checks }
