package xds

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	yamlv3 "go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"sigs.k8s.io/yaml"

	_ "github.com/sockmesh/sockmesh/pkg/xds/envoyapi" // every Any decodes and can be named
)

// FileResource is one resource of a YAML or JSON file.
type FileResource struct {
	Name    string
	Message proto.Message
	Any     *anypb.Any
	// Where is "document 2, resource 3", for errors; empty if there is only one.
	Where string
}

// FileError is what is wrong with one resource of a file.
type FileError struct {
	File, Where string
	Err         error
}

// Error names file, document and field.
func (e *FileError) Error() string {
	if e.Where == "" {
		return fmt.Sprintf("%s: %v", e.File, e.Err)
	}
	return fmt.Sprintf("%s: %s: %v", e.File, e.Where, e.Err)
}

// Unwrap returns the cause.
func (e *FileError) Unwrap() error { return e.Err }

// ParseResources reads a file of resources: documents, each a resource, a list of resources, or a
// DiscoveryResponse-like object with "resources". A resource names its type by "@type"; one that does not is of
// the type that the file's name tells (x.listeners.yaml). It returns what could be read and an error for each
// that could not.
func ParseResources(file string, data []byte) ([]FileResource, []error) {
	var out []FileResource
	var errs []error
	fallback := typeByFileName(file)
	documents, err := splitDocuments(data)
	if err != nil {
		return nil, []error{&FileError{File: file, Err: err}}
	}
	for i, document := range documents {
		where := ""
		if len(documents) > 1 {
			where = fmt.Sprintf("document %d", i+1)
		}
		items, isList, err := listItems(document.json)
		if err != nil {
			errs = append(errs, &FileError{file, where, err})
			continue
		}
		for j, item := range items {
			here := where
			if isList {
				here = strings.TrimPrefix(fmt.Sprintf("%s, resource %d", where, j+1), ", ")
			}
			r, err := parseResource(item, fallback)
			if err != nil {
				errs = append(errs, &FileError{file, here, withLine(err, document.node)})
				continue
			}
			r.Where = here
			out = append(out, *r)
		}
	}
	return out, errs
}

// suffixTypes are the types that a file's name can tell.
var suffixTypes = map[string]string{
	"listeners": "envoy.config.listener.v3.Listener", "listener": "envoy.config.listener.v3.Listener",
	"routes": "envoy.config.route.v3.RouteConfiguration", "route": "envoy.config.route.v3.RouteConfiguration",
	"clusters": "envoy.config.cluster.v3.Cluster", "cluster": "envoy.config.cluster.v3.Cluster",
	"endpoints": "envoy.config.endpoint.v3.ClusterLoadAssignment", "endpoint": "envoy.config.endpoint.v3.ClusterLoadAssignment",
	"secrets": "envoy.extensions.transport_sockets.tls.v3.Secret", "secret": "envoy.extensions.transport_sockets.tls.v3.Secret",
	"bootstrap": "envoy.config.bootstrap.v3.Bootstrap",
}

func typeByFileName(file string) string {
	base := file[strings.LastIndexByte(file, '/')+1:]
	for word := range strings.SplitSeq(base, ".") {
		if t, ok := suffixTypes[word]; ok {
			return t
		}
	}
	return ""
}

// document is one YAML document, as JSON, and as it was written.
type document struct {
	json json.RawMessage
	node *yamlv3.Node
}

var unknownField = regexp.MustCompile(`unknown field "([^"]+)"`)

// withLine adds the line of an unknown field, if the document has that key in only one place.
func withLine(err error, node *yamlv3.Node) error {
	found := unknownField.FindStringSubmatch(err.Error())
	if found == nil {
		return err
	}
	if lines := keyLines(node, found[1], nil, 0); len(lines) == 1 {
		return fmt.Errorf("line %d: %w", lines[0], err)
	}
	return err
}

// maxYAMLDepth is deeper than any resource nests.
const maxYAMLDepth = 200

func keyLines(node *yamlv3.Node, key string, lines []int, depth int) []int {
	if depth > maxYAMLDepth {
		return lines
	}
	for i, child := range node.Content {
		if node.Kind == yamlv3.MappingNode && i%2 == 0 {
			if child.Value == key {
				lines = append(lines, child.Line)
			}
			continue
		}
		lines = keyLines(child, key, lines, depth+1)
	}
	return lines
}

// splitDocuments turns YAML documents (JSON is YAML) into JSON ones. The YAML reader is strict: a key that is
// there twice is an error.
func splitDocuments(data []byte) ([]document, error) {
	var documents []document
	decoder := yamlv3.NewDecoder(bytes.NewReader(data))
	for {
		var node yamlv3.Node
		err := decoder.Decode(&node)
		if errors.Is(err, io.EOF) {
			return documents, nil
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", len(documents)+1, err)
		}
		text, err := yamlv3.Marshal(&node)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", len(documents)+1, err)
		}
		converted, err := yaml.YAMLToJSONStrict(text)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", len(documents)+1, err)
		}
		if string(bytes.TrimSpace(converted)) != "null" {
			documents = append(documents, document{converted, &node})
		}
	}
}

func listItems(document json.RawMessage) (items []json.RawMessage, isList bool, err error) {
	switch trimmed := bytes.TrimSpace(document); {
	case trimmed[0] == '[':
		err = json.Unmarshal(trimmed, &items)
		return items, true, err
	case trimmed[0] != '{':
		return nil, false, errors.New("expected a resource or a list of resources")
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(document, &object); err != nil {
		return nil, false, err
	}
	list, ok := object["resources"]
	if _, typed := object["@type"]; typed || !ok {
		return []json.RawMessage{document}, false, nil
	}
	err = json.Unmarshal(list, &items)
	return items, true, err
}

func parseResource(item json.RawMessage, fallback string) (*FileResource, error) {
	var head struct {
		Type string `json:"@type"`
		Name string `json:"name"`
	}
	if err := json.Unmarshal(item, &head); err != nil || bytes.TrimSpace(item)[0] != '{' {
		return nil, errors.New("expected a resource, which is a mapping whose @type and name are text")
	}
	a := &anypb.Any{}
	if head.Type == "" {
		if fallback == "" {
			return nil, fmt.Errorf("%q: no @type, and the file's name tells none (x.listeners.yaml, .routes., .clusters., .endpoints., .secrets.)", head.Name)
		}
		var fields map[string]json.RawMessage
		_ = json.Unmarshal(item, &fields) // was an object a moment ago
		fields["@type"], _ = json.Marshal(typePrefix + fallback)
		item, _ = json.Marshal(fields)
	}
	if err := protojson.Unmarshal(item, a); err != nil {
		return nil, readable(head.Name, err)
	}
	message, err := a.UnmarshalNew()
	if err != nil {
		return nil, readable(head.Name, err)
	}
	return &FileResource{Name: resourceName(message), Message: message, Any: a}, nil
}

// jsonPosition is where in the JSON, which was made from YAML and which nobody sees, protojson found an error.
var jsonPosition = regexp.MustCompile(`^proto: *(\(line \d+:\d+\): *)?`)

func readable(name string, err error) error {
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ") // protojson varies its spaces on purpose
	text = jsonPosition.ReplaceAllString(text, "")
	if name == "" {
		return errors.New(text)
	}
	return fmt.Errorf("%q: %s", name, text)
}

// unmarshalYAML reads one YAML or JSON document into a message, strictly.
func unmarshalYAML(data []byte, m proto.Message) error {
	document, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return err
	}
	if err := protojson.Unmarshal(document, m); err != nil {
		var node yamlv3.Node
		_ = yamlv3.Unmarshal(data, &node) // was YAML a moment ago
		return withLine(readable("", err), &node)
	}
	return nil
}

func hasKey(object json.RawMessage, key string) bool {
	var fields map[string]json.RawMessage
	_ = json.Unmarshal(object, &fields)
	_, ok := fields[key]
	return ok
}
