package header

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// model is a block as one would write it without thinking of memory.
type model [][2]string

func (m model) String() string {
	var s []string
	for _, f := range m {
		s = append(s, f[0]+": "+f[1])
	}
	return strings.Join(s, "\n")
}

func (m model) index(name string) int {
	return slices.IndexFunc(m, func(f [2]string) bool { return f[0] == name })
}

func (m model) remove(name string) model {
	return slices.DeleteFunc(m, func(f [2]string) bool { return f[0] == name })
}

func (m model) set(name, value string) model {
	i := m.index(name)
	if i < 0 {
		return append(m, [2]string{name, value})
	}
	m[i][1] = value
	return append(m[:i+1:i+1], model(slices.Clone(m[i+1:])).remove(name)...)
}

// lines are the fields as HTTP/1 writes them.
func (m model) lines(without *Set) string {
	var s strings.Builder
	for _, f := range m {
		if !without.Has(Lookup(f[0])) {
			s.WriteString(f[0] + ": " + f[1] + "\r\n")
		}
	}
	return s.String()
}

// inLines is the same by way of Lines, where it has any.
func inLines(b *Block, without *Set) string {
	var s strings.Builder
	for i := 0; i < b.Len(); {
		if lines, n := b.Lines(i, without); n > 0 {
			s.Write(lines)
			i += n
			continue
		}
		if !without.Has(b.ID(i)) {
			s.WriteString(string(b.Name(i)) + ": " + string(b.Value(i)) + "\r\n")
		}
		i++
	}
	return s.String()
}

// importRandom fills the block as a codec does, with white space here and there.
func importRandom(b *Block, r *rand.Rand, names []string) (m model) {
	var raw []byte
	first := 0
	for range r.IntN(6) {
		name, value := names[r.IntN(len(names))], strings.Repeat("w", r.IntN(3))
		before := []string{"", " ", " ", " ", "\t", "  "}[r.IntN(6)]
		after := []string{"", "", "", " ", "\t"}[r.IntN(5)]
		at := len(raw)
		raw = append(raw, name+":"+before+value+after+"\r\n"...)
		b.StageField(at, len(name), at+len(name)+1+len(before), len(value))
		m = append(m, [2]string{strings.ToLower(name), value})
		if r.IntN(2) == 0 { // the rest comes later
			b.Import(raw, first)
			raw, first = raw[:0], len(m)
		}
	}
	b.Import(raw, first)
	return m
}

// TestABlockIsAListOfFields plays random edits on a block and on the model.
func TestABlockIsAListOfFields(t *testing.T) {
	known := []ID{Accept, XForwardedFor, Cookie, Connection, XRequestID}
	own := []string{"x-own", "y", "x-forwarded-fox"}
	var b Block
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 7))
		b.Reset()
		m := importRandom(&b, r, append([]string{"Accept", "X-Request-ID", "cookie"}, own...))
		var log []string
		for step := range 60 {
			value := fmt.Sprint("v", step)
			id := known[r.IntN(len(known))]
			name := id.String()
			byName := r.IntN(2) == 0
			if r.IntN(3) == 0 {
				id, name, byName = None, own[r.IntN(len(own))], true
			}
			op := r.IntN(8)
			log = append(log, fmt.Sprint(op, " ", name, " ", byName))
			switch {
			case op == 0 && len(m) > 0:
				i := r.IntN(len(m))
				b.RemoveAt(i)
				m = slices.Delete(m, i, i+1)
			case op == 1 && byName:
				b.RemoveName(name)
				m = m.remove(name)
			case op == 1:
				b.Remove(id)
				m = m.remove(name)
			case op == 2 && byName:
				b.SetName(name, value)
				m = m.set(name, value)
			case op == 2:
				b.SetBytes(id, []byte(value))
				m = m.set(name, value)
			case op == 3 && !byName:
				b.Append(id, value)
				if i := m.index(name); i >= 0 {
					m[i][1] += ", " + value
				} else {
					m = append(m, [2]string{name, value})
				}
			case op == 7:
				set := SetOf(id, known[0])
				if id == None {
					set = SetOf(known[0])
				}
				b.RemoveAll(&set)
				m = m.remove(known[0].String())
				if id != None {
					m = m.remove(name)
				}
			case op == 4:
				var c Block
				c.CopyFrom(&b)
				b.CopyFrom(&c)
			case byName:
				b.AddName(strings.ToUpper(name), value)
				m = append(m, [2]string{name, value})
			default:
				b.Add(id, value)
				m = append(m, [2]string{name, value})
			}
			if dump(&b) != m.String() {
				t.Fatalf("seed %d, after %v:\n%s\nwant\n%s", seed, log, dump(&b), m)
			}
			without := SetOf(known[r.IntN(len(known))])
			if got, want := inLines(&b, &without), m.lines(&without); got != want {
				t.Fatalf("seed %d, after %v: without %v\n%q\nwant\n%q", seed, log, without, got, want)
			}
			i := m.index(name)
			if v, ok := b.GetName(name); ok != (i >= 0) || ok && string(v) != m[i][1] {
				t.Fatalf("seed %d, after %v: %s is %q, %v", seed, log, name, v, ok)
			}
			if id != None && b.Has(id) != (i >= 0) {
				t.Fatalf("seed %d, after %v: Has(%s) is %v", seed, log, name, b.Has(id))
			}
		}
	}
}
