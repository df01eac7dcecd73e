package mesh

import (
	_ "embed"
	"fmt"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// A field that is silently ignored is a promise broken: the operator sees it accepted and believes in it. So
// before a resource is compiled, one walk over its populated fields consults support.txt, which says of every
// field whether we act upon it, may leave it out, or must refuse. The compile functions then read only what
// the table lets through and decide about values.

//go:embed support.txt
var supportText string

// verdict is what support.txt says of a field.
type verdict uint8

const (
	verdictRefused verdict = iota
	verdictSupported
	verdictIgnored
	verdictHandled
)

type fieldSupport struct {
	verdict verdict
	reason  string
}

// messageSupport is nil for a leaf.
type messageSupport map[protoreflect.Name]fieldSupport

var supportTable = sync.OnceValue(func() map[protoreflect.FullName]messageSupport {
	table, err := parseSupport(supportText)
	if err != nil {
		panic(err) // the file is compiled in, and a test reads it
	}
	return table
})

func parseSupport(text string) (map[protoreflect.FullName]messageSupport, error) {
	table := map[protoreflect.FullName]messageSupport{}
	var message messageSupport
	verdicts := map[string]verdict{"+": verdictSupported, "~": verdictIgnored, "-": verdictRefused, "*": verdictHandled}
	for n, line := range strings.Split(text, "\n") {
		indented := strings.HasPrefix(line, " ")
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#':
		case !indented:
			name, leaf := strings.CutSuffix(line, " = leaf")
			if _, twice := table[protoreflect.FullName(name)]; twice {
				return nil, fmt.Errorf("support.txt:%d: %s is there twice", n+1, name)
			}
			message = nil
			if !leaf {
				message = messageSupport{}
			}
			table[protoreflect.FullName(name)] = message
		default:
			mark, rest, _ := strings.Cut(line, " ")
			v, ok := verdicts[mark]
			if !ok || message == nil {
				return nil, fmt.Errorf("support.txt:%d: cannot read %q", n+1, line)
			}
			fields, reason := rest, ""
			if v == verdictRefused {
				fields, reason, _ = strings.Cut(rest, ": ")
			}
			for field := range strings.FieldsSeq(fields) {
				if _, twice := message[protoreflect.Name(field)]; twice {
					return nil, fmt.Errorf("support.txt:%d: %s is there twice", n+1, field)
				}
				message[protoreflect.Name(field)] = fieldSupport{v, reason}
			}
		}
	}
	return table, nil
}

// walk reports every populated field below m that is not acted upon.
func (c *compiler) walk(at *path, m proto.Message) { c.walkMessage(at, m.ProtoReflect()) }

func (c *compiler) walkMessage(at *path, m protoreflect.Message) {
	name := m.Descriptor().FullName()
	fields, known := supportTable()[name]
	if !known {
		if name.Parent() != "google.protobuf" {
			c.refuse(at, "%s is not supported", name)
		}
		return
	}
	if fields == nil {
		return
	}
	m.Range(func(fd protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		here := at.field(string(fd.Name()))
		support, listed := fields[fd.Name()]
		if !listed {
			support.reason = "not supported"
		}
		switch support.verdict {
		case verdictSupported:
			c.walkValue(here, fd, value)
		case verdictIgnored:
			if !isFalse(fd, value) {
				c.warn(here)
			}
		case verdictRefused:
			if !isFalse(fd, value) {
				c.refuse(here, "%s", support.reason)
			}
		}
		return true
	})
}

func (c *compiler) walkValue(at *path, fd protoreflect.FieldDescriptor, value protoreflect.Value) {
	if fd.Message() == nil {
		return
	}
	switch {
	case fd.IsMap():
		if fd.MapValue().Message() == nil {
			return
		}
		value.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			c.walkMessage(at.key(k.String()), v.Message())
			return true
		})
	case fd.IsList():
		list := value.List()
		for i := range list.Len() {
			c.walkMessage(at.at(i), list.Get(i).Message())
		}
	default:
		c.walkMessage(at, value.Message())
	}
}

// isFalse says that a field is populated with what it would be without: a BoolValue of false.
func isFalse(fd protoreflect.FieldDescriptor, value protoreflect.Value) bool {
	if fd.Message() == nil || fd.Message().FullName() != "google.protobuf.BoolValue" || fd.IsList() {
		return false
	}
	return !value.Message().Get(fd.Message().Fields().ByName("value")).Bool()
}
