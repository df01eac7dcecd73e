package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// Load reads the environment (os.Environ()) and the file for whatever no flag set. Call it once, after the
// flags were parsed.
func (f *Flags) Load(environ []string) (Config, error) {
	env := map[string]string{}
	for _, kv := range environ {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	lookupEnv := func(name string) (string, bool) { v, ok := env[name]; return v, ok }

	fromFlag := map[string]bool{}
	f.all.Visit(func(fl *pflag.Flag) { fromFlag[fl.Name] = true })

	var errs []error
	f.warnUnknownEnv(env)
	if v, ok := lookupEnv(EnvName("config")); ok && !fromFlag["config"] {
		f.File = v
	}
	file, err := f.readFile()
	if err != nil {
		errs = append(errs, err)
	}
	f.each(func(fl *pflag.Flag) {
		if fromFlag[fl.Name] || fl.Name == "config" {
			return
		}
		if v, ok := lookupEnv(EnvName(fl.Name)); ok {
			if err := fl.Value.Set(v); err != nil {
				errs = append(errs, fmt.Errorf("environment: %s=%q: %w", EnvName(fl.Name), v, err))
			}
			return
		}
		if v, ok := file[fl.Name]; ok {
			if err := fl.Value.Set(v.text); err != nil {
				errs = append(errs, fmt.Errorf("%s:%d: %s: %q: %w", f.File, v.line, fl.Name, v.text, err))
			}
		}
	})
	if err := f.config.complete(lookupEnv); err != nil {
		errs = append(errs, err)
	}
	return f.config, errors.Join(errs...)
}

// each visits the agent's own settings, not --help and its like.
func (f *Flags) each(do func(*pflag.Flag)) {
	for _, g := range f.Groups {
		g.Flags.VisitAll(do)
	}
}

func (f *Flags) lookup(name string) *pflag.Flag {
	for _, g := range f.Groups {
		if fl := g.Flags.Lookup(name); fl != nil {
			return fl
		}
	}
	return nil
}

// warnUnknownEnv notes SOCKMESH_ variables that set nothing: a misspelt one would otherwise go unnoticed. It is
// no error, because others may use the prefix too: Kubernetes does, for a Service that is named sockmesh.
func (f *Flags) warnUnknownEnv(env map[string]string) {
	known := map[string]bool{}
	f.each(func(fl *pflag.Flag) { known[EnvName(fl.Name)] = true })
	for name := range env {
		if strings.HasPrefix(name, EnvPrefix) && !known[name] && !fromServiceLinks(name) {
			f.Warnings = append(f.Warnings, fmt.Sprintf("environment: %s sets nothing%s", name, didYouMean(name, keys(known))))
		}
	}
	sort.Strings(f.Warnings)
}

// fromServiceLinks recognises the variables that the kubelet adds for Services (docker links' format).
func fromServiceLinks(name string) bool {
	return strings.HasSuffix(name, "_SERVICE_HOST") || strings.Contains(name, "_SERVICE_PORT") ||
		strings.Contains(name, "_PORT_") || strings.HasSuffix(name, "_PORT")
}

// value is a scalar of the file and where it stands.
type value struct {
	text string
	line int
}

// readFile reads the settings file by its YAML nodes rather than into a struct: the node keeps the word that
// was written, where decoding would turn `acceleration: off` into the boolean false, and it knows its line.
func (f *Flags) readFile() (map[string]value, error) {
	if f.File == "" {
		return nil, nil
	}
	b, err := os.ReadFile(f.File)
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, nil // an empty file sets nothing
	} else if err != nil {
		return nil, fmt.Errorf("%s: not YAML: %w", f.File, err)
	}
	var more yaml.Node
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: expected one YAML document, found another after it", f.File)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, nil
	}
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%s:%d: expected a mapping of settings, like `drain-time: 30s`", f.File, root.Line)
	}
	return f.settings(root)
}

// settings takes the mapping apart, collecting every mistake rather than the first.
func (f *Flags) settings(root *yaml.Node) (map[string]value, error) {
	out := map[string]value{}
	var errs []error
	bad := func(line int, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s:%d: %s", f.File, line, fmt.Sprintf(format, args...)))
	}
	for i := 0; i+1 < len(root.Content); i += 2 {
		k, v := root.Content[i], root.Content[i+1]
		fl := f.lookup(k.Value)
		switch {
		case k.Value == "config":
			bad(k.Line, "config: a settings file can't name another")
		case fl == nil:
			var names []string
			f.each(func(fl *pflag.Flag) { names = append(names, fl.Name) })
			bad(k.Line, "%s: no setting has this name%s", k.Value, didYouMean(k.Value, names))
		case v.Kind != yaml.ScalarNode:
			bad(v.Line, "%s: expected one value, found a %s", k.Value, kindName(v.Kind))
		case v.Tag == "!!null":
			bad(v.Line, "%s: no value: remove the key to keep the default", k.Value)
		default:
			if _, twice := out[k.Value]; twice {
				bad(k.Line, "%s: set twice", k.Value)
			}
			out[k.Value] = value{v.Value, v.Line}
		}
	}
	return out, errors.Join(errs...)
}

func kindName(k yaml.Kind) string {
	switch k {
	case yaml.SequenceNode:
		return "list"
	case yaml.MappingNode:
		return "mapping"
	}
	return "YAML alias"
}

func keys(m map[string]bool) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	return out
}

// didYouMean proposes the nearest name, if one is near.
func didYouMean(name string, known []string) string {
	best, at := "", 4
	for _, k := range known {
		if d := distance(name, k); d < at || d == at && k < best {
			best, at = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %s?)", best)
}

// distance is the number of single-character edits between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
