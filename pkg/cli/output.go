// Package cli is what the project's commands have in common: how results are printed (-o table, json, yaml), how
// errors and exit codes are made, and how help is grouped.
//
// It must never know what it prints: commands turn their data into a Table, or hand over the JSON as it came.
package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"
)

// Format is the value of -o.
type Format string

// Formats.
const (
	TableFormat Format = "table"
	JSONFormat  Format = "json"
	YAMLFormat  Format = "yaml"
)

var _ pflag.Value = (*Format)(nil)

// String implements pflag.Value.
func (f *Format) String() string { return string(*f) }

// Type implements pflag.Value.
func (f *Format) Type() string { return "table|json|yaml" }

// Set implements pflag.Value.
func (f *Format) Set(s string) error {
	switch v := Format(s); v {
	case TableFormat, JSONFormat, YAMLFormat:
		*f = v
		return nil
	}
	return fmt.Errorf("expected table, json or yaml")
}

// Print writes raw JSON in the wanted format; table makes the human form and is called only for that.
func Print(w io.Writer, f Format, raw []byte, table func(io.Writer) error) error {
	switch f {
	case JSONFormat:
		var b bytes.Buffer
		if err := json.Indent(&b, bytes.TrimSpace(raw), "", "  "); err != nil {
			return fmt.Errorf("the answer is not JSON: %w", err)
		}
		b.WriteByte('\n')
		_, err := b.WriteTo(w)
		return err
	case YAMLFormat:
		y, err := yaml.JSONToYAML(raw)
		if err != nil {
			return fmt.Errorf("the answer is not JSON: %w", err)
		}
		_, err = w.Write(y)
		return err
	}
	return table(w)
}

// PrintValue is Print for a Go value.
func PrintValue(w io.Writer, f Format, v any, table func(io.Writer) error) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return Print(w, f, raw, table)
}

// Table prints columns as kubectl does: upper-case headings, three spaces between, nothing after the last.
type Table struct {
	head []string
	rows [][]string
}

// NewTable starts a table.
func NewTable(head ...string) *Table { return &Table{head: head} }

// Row adds a row; an empty cell is shown as "-", so that columns stay countable for awk.
func (t *Table) Row(cells ...string) {
	for i, c := range cells {
		if c == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// Write prints it. Without rows it says so instead of printing a lonely heading.
func (t *Table) Write(w io.Writer, none string) error {
	if len(t.rows) == 0 {
		_, err := fmt.Fprintln(w, none)
		return err
	}
	width := make([]int, len(t.head))
	all := append([][]string{t.head}, t.rows...)
	for _, row := range all {
		for i, c := range row {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	var b strings.Builder
	for _, row := range all {
		for i, c := range row {
			b.WriteString(c)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-len([]rune(c))+3))
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Bytes writes a number of bytes for people: 1.5 MiB.
func Bytes(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/unit, 0
	for ; v >= unit && i < 5; i++ {
		v /= unit
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTPE"[i])
}

// YesNo writes a boolean.
func YesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
