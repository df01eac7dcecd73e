package xds

import (
	"errors"
	"log/slog"
	"os"
	"strings"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	_ "github.com/sockmesh/sockmesh/pkg/telemetry" // registers the checks of command operators
)

// Validation is what would become of one resource.
type Validation struct {
	File string `json:"file"`
	// Where is "document 2, resource 3" if the file has several.
	Where string `json:"where,omitempty"`
	Type  string `json:"type,omitempty"` // "listener", "route", "cluster", "endpoint", "bootstrap", or the message's name
	Name  string `json:"name,omitempty"`
	// Refused is why it would be refused, by field; empty if it would be accepted. A file that cannot be read
	// has one entry with no field.
	Refused []mesh.Refusal `json:"refused,omitempty"`
	// Ignored are the fields that would be accepted and not acted upon.
	Ignored []string `json:"ignored,omitempty"`
}

// OK says that the resource would be accepted.
func (v *Validation) OK() bool { return len(v.Refused) == 0 }

// ValidateFiles says of every resource in the files what a data plane would refuse and what it would ignore.
// Bootstraps are checked with their static resources. Nothing is connected.
func ValidateFiles(paths []string) []Validation {
	var out []Validation
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			out = append(out, Validation{File: path, Refused: []mesh.Refusal{{Reason: err.Error()}}})
			continue
		}
		out = append(out, Validate(path, data)...)
	}
	return out
}

// Validate is ValidateFiles for one file that was read already; its name may tell the type of its resources.
func Validate(path string, data []byte) []Validation {
	if looksLikeBootstrap(path, data) {
		return validateBootstrap(path, data)
	}
	var out []Validation
	resources, errs := ParseResources(path, data)
	for _, err := range errs {
		v := Validation{File: path}
		var fe *FileError
		if errors.As(err, &fe) {
			v.Where, err = fe.Where, fe.Err
		}
		v.Refused = []mesh.Refusal{{Reason: err.Error()}}
		out = append(out, v)
	}
	seen := map[string]bool{}
	for _, r := range resources {
		if b, ok := r.Message.(*bootstrapv3.Bootstrap); ok {
			out = append(out, validateStatic(path, &Bootstrap{name: path, proto: b})...)
			continue
		}
		v := validateMessage(path, r.Where, r.Message)
		if key := v.Type + "/" + v.Name; seen[key] {
			v.Refused = append(v.Refused, mesh.Refusal{Field: "name", Reason: "is in the file more than once"})
		} else {
			seen[key] = true
		}
		out = append(out, v)
	}
	return out
}

func validateMessage(path, where string, m proto.Message) Validation {
	v := Validation{File: path, Where: where, Type: string(m.ProtoReflect().Descriptor().Name()), Name: resourceName(m)}
	if kind, known := kindOf(typePrefix + string(m.ProtoReflect().Descriptor().FullName())); known {
		v.Type = kind.String()
	}
	if _, isSecret := m.(*tlsv3.Secret); isSecret {
		v.Type, v.Refused = "secret", []mesh.Refusal{{Field: "@type", Reason: "secrets (SDS) are not supported yet"}}
		return v
	}
	_, warnings, err := compile(m, "")
	for _, w := range warnings {
		v.Ignored = append(v.Ignored, w.Field)
	}
	var refused *mesh.Error
	switch {
	case errors.As(err, &refused):
		v.Refused = refused.Refused
	case err != nil:
		v.Refused = []mesh.Refusal{{Field: "@type", Reason: err.Error()}}
	}
	return v
}

// looksLikeBootstrap says that a file without @type has a bootstrap's top-level fields.
func looksLikeBootstrap(path string, data []byte) bool {
	if typeByFileName(path) == suffixTypes["bootstrap"] {
		return true
	}
	documents, err := splitDocuments(data)
	if err != nil || len(documents) != 1 {
		return false
	}
	text := string(documents[0].json)
	if strings.Contains(text, `"@type":"type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap"`) {
		return false // an Any says it itself
	}
	items, isList, err := listItems(documents[0].json)
	if err != nil || isList || len(items) != 1 {
		return false
	}
	for _, field := range []string{"static_resources", "staticResources", "dynamic_resources", "dynamicResources"} {
		if hasKey(items[0], field) {
			return true
		}
	}
	return false
}

func validateBootstrap(path string, data []byte) []Validation {
	b, err := ParseBootstrap(path, data)
	if err != nil {
		return []Validation{{File: path, Type: "bootstrap", Refused: []mesh.Refusal{{Reason: strings.TrimPrefix(err.Error(), path+": ")}}}}
	}
	return validateStatic(path, b)
}

func validateStatic(path string, b *Bootstrap) []Validation {
	id, _ := b.Node()
	v := Validation{File: path, Type: "bootstrap", Name: id}
	for _, w := range b.Ignored {
		v.Ignored = append(v.Ignored, w.Field)
	}
	if client, err := New(Config{Bootstrap: b, Logger: slog.New(slog.DiscardHandler)}); err != nil {
		v.Refused = append(v.Refused, mesh.Refusal{Reason: strings.TrimPrefix(err.Error(), path+": ")})
	} else {
		client.discard()
	}
	out := []Validation{v}
	servers := b.serverClusters()
	for _, m := range b.proto.GetStaticResources().GetClusters() {
		if !servers[m.GetName()] {
			out = append(out, validateMessage(path, "static_resources", m))
		}
	}
	for _, m := range b.proto.GetStaticResources().GetListeners() {
		out = append(out, validateMessage(path, "static_resources", m))
	}
	return out
}
