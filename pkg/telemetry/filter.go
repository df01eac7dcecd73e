package telemetry

import (
	"fmt"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// filter decides whether a record is logged.
type filter func(r *Record, random uint64) bool

// compileFilter compiles an access log filter; nil lets everything pass.
func compileFilter(f *mesh.AccessLogFilter) (filter, error) {
	switch {
	case f == nil:
		return nil, nil
	case f.And != nil:
		return compileSet(f.And, false)
	case f.Or != nil:
		return compileSet(f.Or, true)
	case f.StatusCode != nil:
		c := *f.StatusCode
		return func(r *Record, _ uint64) bool { return holds(c, uint64(r.Status)) }, checkComparison(c)
	case f.DurationMS != nil:
		c := *f.DurationMS
		return func(r *Record, _ uint64) bool {
			return holds(c, uint64(max(r.End-r.Begin, 0)/int64(time.Millisecond)))
		}, checkComparison(c)
	case f.ResponseFlags != nil:
		want := Flags(0)
		for _, name := range f.ResponseFlags {
			flag, ok := ParseFlag(name)
			if !ok {
				return nil, fmt.Errorf("response_flag_filter.flags: unknown flag %q", name)
			}
			want |= flag
		}
		if want == 0 {
			want = endOfFlags - 1
		}
		return func(r *Record, _ uint64) bool { return r.Flags&want != 0 }, nil
	case f.Header != nil:
		m := f.Header
		return func(r *Record, _ uint64) bool { return r.Request != nil && m.Matches((*asRequest)(r)) }, nil
	case f.FractionPPM != nil:
		ppm := uint64(*f.FractionPPM)
		return func(_ *Record, random uint64) bool {
			// Other users of the same draw look at it as it is; these are other bits of it.
			return (random*0x9e3779b97f4a7c15)>>32*1_000_000>>32 < ppm
		}, nil
	}
	return nil, nil // NotHealth: there are no health checks to leave out
}

func compileSet(list []*mesh.AccessLogFilter, any bool) (filter, error) {
	var fs []filter
	for _, e := range list {
		f, err := compileFilter(e)
		if err != nil {
			return nil, err
		}
		if f == nil {
			f = func(*Record, uint64) bool { return true }
		}
		fs = append(fs, f)
	}
	return func(r *Record, random uint64) bool {
		for _, f := range fs {
			if f(r, random) == any {
				return any
			}
		}
		return !any
	}, nil
}

func checkComparison(c mesh.Comparison) error {
	switch c.Op {
	case '=', '>', '<', '!':
		return nil
	}
	return fmt.Errorf("comparison.op: %q is not one of !, =, > and <", c.Op)
}

func holds(c mesh.Comparison, v uint64) bool {
	switch c.Op {
	case '=':
		return v == c.Value
	case '>':
		return v >= c.Value
	case '<':
		return v <= c.Value
	}
	return v != c.Value
}

// asRequest shows a record's request to a header matcher.
type asRequest Record

// Authority implements mesh.Request, and so do the others.
func (r *asRequest) Authority() string { return r.Request.AuthorityString() }

// Path implements mesh.Request.
func (r *asRequest) Path() string { return r.Request.PathString() }

// Method implements mesh.Request.
func (r *asRequest) Method() string { return r.Request.MethodString() }

// Scheme implements mesh.Request.
func (r *asRequest) Scheme() string { return r.Request.SchemeString() }

// Header implements mesh.Request.
func (r *asRequest) Header(name string) (string, bool) { return r.Request.Joined(name) }

// NextHeader implements mesh.Request.
func (r *asRequest) NextHeader(name string, from int) (string, int) {
	return r.Request.NextValue(name, from)
}

// Random implements mesh.Request; header matchers do not ask for it.
func (r *asRequest) Random() uint64 { return 0 }
