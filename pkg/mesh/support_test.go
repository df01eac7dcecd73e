package mesh

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/sockmesh/sockmesh/pkg/xds/envoyapi"
)

// TestEveryFieldHasAVerdict makes an update of Envoy's API a decision instead of a surprise: each field of each
// message in support.txt has to be in it, each name in it has to exist, and every message that a supported field
// leads to has to be there too.
func TestEveryFieldHasAVerdict(t *testing.T) {
	for name, fields := range supportTable() {
		descriptor, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		message := descriptor.(protoreflect.MessageDescriptor)
		if fields == nil {
			continue
		}
		for i := range message.Fields().Len() {
			fd := message.Fields().Get(i)
			support, listed := fields[fd.Name()]
			if !listed {
				t.Errorf("%s.%s has no verdict", name, fd.Name())
				continue
			}
			if support.verdict == verdictRefused && support.reason == "" {
				t.Errorf("%s.%s is refused without a reason", name, fd.Name())
			}
			inner := fd.Message()
			if fd.IsMap() {
				inner = fd.MapValue().Message()
			}
			if support.verdict != verdictSupported || inner == nil || inner.FullName().Parent() == "google.protobuf" {
				continue
			}
			if _, known := supportTable()[inner.FullName()]; !known {
				t.Errorf("%s.%s leads to %s, which is not in the table", name, fd.Name(), inner.FullName())
			}
		}
		for field := range fields {
			if message.Fields().ByName(field) == nil {
				t.Errorf("%s has no field %s", name, field)
			}
		}
	}
}

func TestSupportTableRefusesWhatItCannotRead(t *testing.T) {
	for _, text := range []string{"a.B\na.B", "a.B\n  ? x", "a.B\n  + x x", "  + x"} {
		if _, err := parseSupport(text); err == nil || !strings.HasPrefix(err.Error(), "support.txt:") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
