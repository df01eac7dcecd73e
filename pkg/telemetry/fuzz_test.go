package telemetry

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// FuzzFormat: no format and no value breaks a line of a log, text or JSON.
func FuzzFormat(f *testing.F) {
	for _, s := range []string{
		DefaultFormat, "%START_TIME(%Y/%m/%dT%H:%M:%S%z %9f %s)%", "%REQ(X?Y):3%%%", "%GRPC_STATUS(NUMBER)%", "%PATH(NQ:ORIG)%", "100%",
	} {
		f.Add(s, []byte("a\"b\\\r\n\x00\xff\u00e9"))
	}
	f.Fuzz(func(t *testing.T, format string, value []byte) {
		compiled, err := CompileFormat(format)
		if err != nil {
			return
		}
		r := sampleRecord()
		for _, name := range []string{"x", "user-agent", "grpc-status", "x-request-id"} {
			r.Request.StageField(0, len(name), len(name), len(value))
			r.Request.Import(append([]byte(name), value...), r.Request.Len()-1)
			r.ResponseTrailers.Reset()
			r.ResponseTrailers.StageField(0, len(name), len(name), len(value))
			r.ResponseTrailers.Import(append([]byte(name), value...), 0)
			r.Details, r.StreamID = string(value), string(value)

			compiled.Append(nil, r)
			literal := 0
			for i := range compiled.pieces {
				literal += bytes.Count([]byte(compiled.pieces[i].literal), []byte{'\n'})
			}
			line := compiled.AppendText(nil, r, "-")
			forged := bytes.ContainsAny(line, "\r\x00") && !strings.ContainsAny(format, "\r\x00")
			if bytes.Count(line, []byte{'\n'}) != literal || forged {
				t.Fatalf("%q with %q: %q", format, value, line)
			}
			for _, omit := range []bool{false, true} {
				lg, err := Compile(&mesh.AccessLog{JSON: map[string]any{format: format, "l": []any{format}}, OmitEmpty: omit})
				if err != nil {
					t.Fatal(err)
				}
				line := lg.AppendLine(nil, r)
				if !json.Valid(line) || bytes.IndexByte(line, '\n') != len(line)-1 {
					t.Fatalf("%q with %q: %q", format, value, line)
				}
			}
		}
	})
}
