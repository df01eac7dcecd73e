package xds

import (
	"encoding/json"
	"maps"
	"slices"

	udpaannotations "github.com/cncf/xds/go/udpa/annotations"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// DumpedResource is one resource of a configuration dump.
type DumpedResource struct {
	Type     string          `json:"type"`
	Name     string          `json:"name"`
	Version  string          `json:"version,omitempty"`
	Source   string          `json:"source"`
	Rejected string          `json:"rejected,omitempty"`
	Resource json.RawMessage `json:"resource,omitempty"` // protojson of what is in force, secrets redacted
}

// Dump returns every resource that is in force or was refused, in the order of kinds and names.
func (c *Client) Dump() []DumpedResource {
	c.mu.Lock()
	defer c.mu.Unlock()
	dump := []DumpedResource{}
	for kind := range kinds {
		for _, name := range slices.Sorted(maps.Keys(c.resources[kind])) {
			r := c.resources[kind][name]
			d := DumpedResource{Type: kind.String(), Name: name, Version: r.version, Source: c.sourceName(r.source), Rejected: r.rejected}
			if r.any != nil {
				if m, err := kind.decode(r.any); err == nil {
					d.Resource = Redacted(m)
				}
			}
			dump = append(dump, d)
		}
	}
	return dump
}

func (c *Client) sourceName(key string) string {
	if s := c.streams[key]; s != nil && s.source.server != nil {
		return s.source.server.name + " (" + s.title() + ")"
	}
	return key
}

// Redacted is a message as JSON without the fields that Envoy's API marks as sensitive (private keys,
// passwords, tokens), also inside Any.
func Redacted(m proto.Message) json.RawMessage {
	m = proto.Clone(m)
	redact(m.ProtoReflect())
	data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		data, _ = json.Marshal(map[string]string{"error": err.Error()})
	}
	return data
}

func redact(m protoreflect.Message) {
	if a, ok := m.Interface().(*anypb.Any); ok {
		if inner, err := a.UnmarshalNew(); err == nil {
			redact(inner.ProtoReflect())
			if data, err := proto.Marshal(inner); err == nil {
				a.Value = data
			}
		}
		return
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if sensitive, _ := proto.GetExtension(fd.Options(), udpaannotations.E_Sensitive).(bool); sensitive {
			redactField(m, fd)
			return true
		}
		switch {
		case fd.Message() == nil:
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { redact(v.Message()); return true })
			}
		case fd.IsList():
			for i := range v.List().Len() {
				redact(v.List().Get(i).Message())
			}
		default:
			redact(v.Message())
		}
		return true
	})
}

const redacted = "[redacted]"

// redactField leaves a mark where text can stand, and nothing elsewhere.
func redactField(m protoreflect.Message, fd protoreflect.FieldDescriptor) {
	switch {
	case fd.IsList() || fd.IsMap():
		m.Clear(fd)
	case fd.Kind() == protoreflect.StringKind:
		m.Set(fd, protoreflect.ValueOfString(redacted))
	case fd.Kind() == protoreflect.BytesKind:
		m.Set(fd, protoreflect.ValueOfBytes([]byte(redacted)))
	case fd.Message() != nil && fd.Message().FullName() == "envoy.config.core.v3.DataSource":
		source := m.NewField(fd)
		source.Message().Set(fd.Message().Fields().ByName("inline_string"), protoreflect.ValueOfString(redacted))
		m.Set(fd, source)
	default:
		m.Clear(fd)
	}
}
