package telemetry

import "github.com/sockmesh/sockmesh/pkg/mesh"

// A configuration with a command operator that is not known is refused where it comes in, not found out when the
// first request is logged.
func init() {
	mesh.RegisterFormatChecks(mesh.FormatChecks{
		Value:     func(format string) error { _, err := CompileFormat(format); return err },
		AccessLog: func(al *mesh.AccessLog) error { _, err := Compile(al); return err },
	})
}
