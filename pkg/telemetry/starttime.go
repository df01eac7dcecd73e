package telemetry

import (
	"fmt"
	"strings"
	"time"
)

// timeFormat is a compiled strftime-like format with Envoy's additions (%3f, %s, …).
type timeFormat struct {
	steps []func(dst []byte, t time.Time) []byte
	local bool
}

// compileTime compiles the argument of START_TIME; empty means ISO 8601 with milliseconds.
func compileTime(arg string, local bool) (*timeFormat, error) {
	if arg == "" {
		arg = "%Y-%m-%dT%H:%M:%S.%3fZ"
	}
	f := &timeFormat{local: local}
	for i := 0; i < len(arg); i++ {
		if n := strings.IndexByte(arg[i:]+"%", '%'); n > 0 {
			text := arg[i : i+n]
			f.add(func(dst []byte, _ time.Time) []byte { return append(dst, text...) })
			i += n - 1
			continue
		}
		i++
		digits := 9
		if i < len(arg) && '1' <= arg[i] && arg[i] <= '9' {
			digits = int(arg[i] - '0')
			i++
			if i == len(arg) || arg[i] != 'f' {
				return nil, fmt.Errorf("time format %q: a digit must be followed by f", arg)
			}
		}
		if i == len(arg) {
			return nil, fmt.Errorf("time format %q ends in %%", arg)
		}
		if err := f.specifier(arg[i], digits, arg); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *timeFormat) add(step func([]byte, time.Time) []byte) { f.steps = append(f.steps, step) }

// layouts are the specifiers that Go's time package knows by another name.
var layouts = map[byte]string{
	'a': "Mon", 'A': "Monday", 'b': "Jan", 'B': "January", 'h': "Jan", 'c': "Mon Jan _2 15:04:05 2006",
	'D': "01/02/06", 'e': "_2", 'F': "2006-01-02", 'I': "03", 'p': "PM", 'r': "03:04:05 PM", 'R': "15:04",
	'T': "15:04:05", 'x': "01/02/06", 'X': "15:04:05", 'y': "06", 'Z': "MST", 'j': "002", 'z': "-0700",
}

func (f *timeFormat) specifier(c byte, digits int, arg string) error {
	number := func(width int, get func(time.Time) int) {
		f.add(func(dst []byte, t time.Time) []byte { return appendPadded(dst, get(t), width) })
	}
	switch c {
	case 'Y':
		number(4, time.Time.Year)
	case 'm':
		number(2, func(t time.Time) int { return int(t.Month()) })
	case 'd':
		number(2, time.Time.Day)
	case 'H':
		number(2, time.Time.Hour)
	case 'M':
		number(2, time.Time.Minute)
	case 'S':
		number(2, time.Time.Second)
	case 's':
		number(1, func(t time.Time) int { return int(t.Unix()) })
	case 'f':
		div := 1
		for range 9 - digits {
			div *= 10
		}
		number(digits, func(t time.Time) int { return t.Nanosecond() / div })
	case '%', 'n', 't':
		lit := map[byte]byte{'%': '%', 'n': '\n', 't': '\t'}[c]
		f.add(func(dst []byte, _ time.Time) []byte { return append(dst, lit) })
	default:
		layout, ok := layouts[c]
		if !ok {
			return fmt.Errorf("time format %q: unknown specifier %%%c", arg, c)
		}
		f.add(func(dst []byte, t time.Time) []byte { return t.AppendFormat(dst, layout) })
	}
	return nil
}

func (f *timeFormat) append(dst []byte, unixNano int64) []byte {
	t := time.Unix(0, unixNano)
	if !f.local {
		t = t.UTC()
	}
	for _, step := range f.steps {
		dst = step(dst, t)
	}
	return dst
}

// appendPadded appends n with zeroes in front up to that width.
func appendPadded(dst []byte, n, width int) []byte {
	var digits [20]byte
	i := len(digits)
	for ; n > 0 || width > 0; width-- {
		i--
		digits[i] = byte('0' + n%10)
		n /= 10
	}
	return append(dst, digits[i:]...)
}
