package mesh

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Refusal is one reason why a resource was not accepted.
type Refusal struct {
	Field  string `json:"field"` // protobuf path within the resource
	Reason string `json:"reason"`
}

// Error is why a resource was not accepted: everything that was found, not only the first thing.
type Error struct {
	Type    string // "listener", "route", "cluster", "endpoint"
	Name    string
	Refused []Refusal
}

// maxRefusalsShown keeps an error that travels in a NACK readable.
const maxRefusalsShown = 8

// Error names resource, fields and reasons.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %q: ", e.Type, e.Name)
	for i, r := range e.Refused {
		if i == maxRefusalsShown {
			fmt.Fprintf(&b, "; and %d more", len(e.Refused)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		if r.Field != "" {
			b.WriteString(r.Field + ": ")
		}
		b.WriteString(r.Reason)
	}
	return b.String()
}

// compiler gathers what one resource's compilation finds.
type compiler struct {
	kind, name string
	warnings   []Warning
	refused    []Refusal
}

func newCompiler(kind, name string) *compiler { return &compiler{kind: kind, name: name} }

func (c *compiler) refuse(at *path, format string, args ...any) {
	c.refused = append(c.refused, Refusal{at.String(), fmt.Sprintf(format, args...)})
}

// warn reports a field as ignored. Warnings leave indices out and come once each: a thousand routes with
// metadata are one fact.
func (c *compiler) warn(at *path) {
	w := Warning{Type: c.kind, Name: c.name, Field: at.general()}
	if !slices.Contains(c.warnings, w) {
		c.warnings = append(c.warnings, w)
	}
}

// err ends the compilation.
func (c *compiler) err() error {
	slices.SortFunc(c.warnings, func(a, b Warning) int { return strings.Compare(a.Field, b.Field) })
	if len(c.refused) == 0 {
		return nil
	}
	slices.SortStableFunc(c.refused, func(a, b Refusal) int { return strings.Compare(a.Field, b.Field) })
	return &Error{Type: c.kind, Name: c.name, Refused: slices.Compact(c.refused)}
}

// begin runs the checks that every resource gets: the constraints that Envoy's API states about itself, and the
// support table.
func (c *compiler) begin(m proto.Message) {
	c.validate(nil, m)
	c.walk(nil, m)
}

// validate applies the generated protoc-gen-validate rules. They stop at Any, so each unpacked message passes
// through here again.
func (c *compiler) validate(at *path, m proto.Message) {
	v, ok := m.(interface{ Validate() error })
	if !ok {
		return
	}
	err := v.Validate()
	if err == nil {
		return
	}
	field, reason := at.String(), err.Error()
	for {
		var fe interface {
			Field() string
			Reason() string
			Cause() error
		}
		if !errors.As(err, &fe) {
			break
		}
		field, reason = joinPath(field, snakePath(fe.Field())), fe.Reason()
		if err = fe.Cause(); err == nil {
			break
		}
		reason = err.Error()
	}
	c.refused = append(c.refused, Refusal{field, reason})
}

func joinPath(a, b string) string {
	if a == "" {
		return b
	}
	return a + "." + b
}

// snakePath turns a Go field path (FilterChains[0]) into protobuf's (filter_chains[0]).
func snakePath(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; 'A' <= c && c <= 'Z' {
			if i > 0 && s[i-1] != '.' {
				b.WriteByte('_')
			}
			b.WriteByte(lower(c))
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// fieldError is a refusal by a function that knows only its own part of the resource.
type fieldError struct{ field, reason string }

func (e *fieldError) Error() string { return e.field + ": " + e.reason }

// refuseError takes in an error of a function that may know the field.
func (c *compiler) refuseError(at *path, err error) {
	var fe *fieldError
	if errors.As(err, &fe) {
		at, err = at.field(fe.field), errors.New(fe.reason)
	}
	c.refuse(at, "%v", err)
}

// unpack decodes an Any into m's type, checks it and walks it. It reports false after refusing.
func (c *compiler) unpack(at *path, a *anypb.Any, m proto.Message) bool {
	if err := a.UnmarshalTo(m); err != nil {
		c.refuse(at, "%v", err)
		return false
	}
	c.validate(at, m)
	c.walk(at, m)
	return true
}

// typeName is an Any's message name.
func typeName(a *anypb.Any) string {
	if a == nil {
		return ""
	}
	return string(a.MessageName())
}

// duration is d, or the default where it is not set.
func (c *compiler) duration(at *path, d *durationpb.Duration, unset time.Duration) time.Duration {
	if d == nil {
		return unset
	}
	if err := d.CheckValid(); err != nil {
		c.refuse(at, "%v", err)
		return unset
	}
	if v := d.AsDuration(); v >= 0 {
		return v
	}
	c.refuse(at, "must not be negative")
	return unset
}

func (c *compiler) optionalDuration(at *path, d *durationpb.Duration) *time.Duration {
	if d == nil {
		return nil
	}
	v := c.duration(at, d, 0)
	return &v
}

func uint32Or(v *wrapperspb.UInt32Value, unset uint32) uint32 {
	if v == nil {
		return unset
	}
	return v.Value
}

func boolOr(v *wrapperspb.BoolValue, unset bool) bool {
	if v == nil {
		return unset
	}
	return v.Value
}

// path is where in a resource we are. It is put together only when somebody wants to read it.
type path struct {
	parent *path
	name   string // field
	index  int    // of a list, if name is empty
	isKey  bool   // name is a map key
}

func (p *path) field(name string) *path { return &path{parent: p, name: name} }
func (p *path) at(i int) *path          { return &path{parent: p, index: i} }
func (p *path) key(k string) *path      { return &path{parent: p, name: k, isKey: true} }

// String is the protobuf path: filter_chains[0].filters[1].name.
func (p *path) String() string { return p.render(true) }

// general is the path without list indices.
func (p *path) general() string { return p.render(false) }

func (p *path) render(indices bool) string {
	if p == nil {
		return ""
	}
	parent := p.parent.render(indices)
	switch {
	case p.isKey:
		return parent + "[" + p.name + "]"
	case p.name == "":
		if !indices {
			return parent
		}
		return parent + "[" + strconv.Itoa(p.index) + "]"
	case parent == "":
		return p.name
	}
	return parent + "." + p.name
}
