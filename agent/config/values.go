package config

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// choice is a flag that takes one of a few words.
type choice struct {
	to      *string
	choices []string
}

var _ pflag.Value = (*choice)(nil)

func (c *choice) String() string { return *c.to }
func (c *choice) Type() string   { return strings.Join(c.choices, "|") }
func (c *choice) Set(s string) error {
	for _, w := range c.choices {
		if s == w {
			*c.to = s
			return nil
		}
	}
	return fmt.Errorf("expected %s", oneOf(c.choices))
}

// onOff is a boolean that is written on or off. true and false are understood too, because in YAML 1.1 `on`
// and `true` are the same word and people will write either.
type onOff struct{ to *bool }

func (o onOff) Type() string { return "on|off" }
func (o onOff) String() string {
	if *o.to {
		return "on"
	}
	return "off"
}

func (o onOff) Set(s string) error {
	switch s {
	case "on", "true":
		*o.to = true
	case "off", "false":
		*o.to = false
	default:
		return fmt.Errorf("expected on or off")
	}
	return nil
}

// number and duration are pflag's own but for their errors, which say what was expected.
type number struct{ to *int }

func (n number) Type() string   { return "number" }
func (n number) String() string { return strconv.Itoa(*n.to) }
func (n number) Set(s string) error {
	v, err := strconv.Atoi(s)
	if err != nil {
		return errors.New("expected a whole number")
	}
	*n.to = v
	return nil
}

// size is a number of entries; bounds are checked with everything else.
type size struct{ to *uint32 }

func (n size) Type() string   { return "number" }
func (n size) String() string { return strconv.FormatUint(uint64(*n.to), 10) }
func (n size) Set(s string) error {
	v, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return errors.New("expected a whole number of entries")
	}
	*n.to = uint32(v)
	return nil
}

// ports is a range of ports, first-last.
type ports struct{ to *[2]uint16 }

func (p ports) Type() string   { return "first-last" }
func (p ports) String() string { return fmt.Sprintf("%d-%d", p.to[0], p.to[1]) }
func (p ports) Set(s string) error {
	var v [2]uint16
	words := strings.Split(s, "-")
	if len(words) != len(v) {
		return errors.New("expected a range of ports like 10000-29999")
	}
	for i, w := range words {
		n, err := strconv.ParseUint(w, 10, 16)
		if err != nil {
			return errors.New("expected a range of ports like 10000-29999")
		}
		v[i] = uint16(n)
	}
	*p.to = v
	return nil
}

type duration struct{ to *time.Duration }

func (d duration) Type() string   { return "duration" }
func (d duration) String() string { return d.to.String() }
func (d duration) Set(s string) error {
	v, err := time.ParseDuration(s)
	if err != nil {
		return errors.New("expected a duration like 30s or 2m")
	}
	*d.to = v
	return nil
}

// level is a log/slog level.
type level struct{ to *slog.Level }

// LogLevels are the names of --log-level, most talkative first.
var LogLevels = []string{"debug", "info", "warn", "error"}

func (l level) Type() string   { return strings.Join(LogLevels, "|") }
func (l level) String() string { return strings.ToLower(l.to.String()) }
func (l level) Set(s string) error {
	v, err := ParseLevel(s)
	if err != nil {
		return err
	}
	*l.to = v
	return nil
}

// ParseLevel reads a log level by its name.
func ParseLevel(s string) (slog.Level, error) {
	switch s {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("expected %s", oneOf(LogLevels))
}

// oneOf writes "a, b or c".
func oneOf(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}
