package kube

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// key is what an object is: no two manifests may describe the same one.
type key struct {
	kind            kind
	namespace, name string
}

// String is "Service default/web".
func (k key) String() string {
	if k.namespace == "" {
		return fmt.Sprintf("%s %s", k.kind, k.name)
	}
	return fmt.Sprintf("%s %s/%s", k.kind, k.namespace, k.name)
}

// place is where an object stands: in which file and which document of it, counted from 1, and for an item of a List
// which one.
type place struct {
	file     string
	document int
	item     string
}

// String is "web.yaml, document 2, items[3]".
func (p place) String() string {
	s := fmt.Sprintf("%s, document %d", p.file, p.document)
	if p.item != "" {
		s += ", " + p.item
	}
	return s
}

// parsed is the content of one file.
type parsed struct {
	objects []parsedObject
	// bad are objects whose name could be read but not the rest.
	bad []key
	// opaque: some document could not even be told by name, so any object that the file had may be meant.
	opaque   bool
	errors   []string
	warnings []string
	ignored  []string
}

// parsedObject is a good object; value is nil if it is none of this node's.
type parsedObject struct {
	key   key
	place place
	value any
}

// parseFile reads the documents of a file.
func parseFile(name string, content []byte) *parsed {
	p := &parsed{}
	for _, d := range split(name, content) {
		if d.err == nil {
			d.json, d.err = toJSON(d)
		}
		if d.err != nil {
			p.opaque = true
			p.errors = append(p.errors, fmt.Sprintf("%s: %v", d.place, d.err))
			continue
		}
		p.document(d.place, d.json, "", "")
	}
	return p
}

// rawDocument is a document as it stands in a file.
type rawDocument struct {
	place place
	line  int // that it begins on, from 0
	text  []byte
	json  []byte
	err   error
}

// split cuts a file into documents: at lines of "---", or, if it is JSON, after each value.
func split(name string, content []byte) []rawDocument {
	if text := bytes.TrimSpace(content); len(text) > 0 && text[0] == '{' {
		if documents, ok := splitJSON(name, content); ok {
			return documents
		}
	}
	var documents []rawDocument
	line, first, start := 0, 0, 0
	add := func(end int) {
		documents = append(documents, rawDocument{place: place{name, len(documents) + 1, ""}, line: first, text: content[start:end]})
	}
	for at := 0; at < len(content); line++ {
		next := len(content)
		if i := bytes.IndexByte(content[at:], '\n'); i >= 0 {
			next = at + i + 1
		}
		if isSeparator(content[at:next]) {
			// A separator before any content opens the first document and doesn't end one.
			if len(documents) > 0 || !blank(content[start:at]) {
				add(at)
			}
			start, first = next, line+1
		}
		at = next
	}
	add(len(content))
	return documents
}

func isSeparator(line []byte) bool {
	rest, found := bytes.CutPrefix(line, []byte("---"))
	return found && (len(rest) == 0 || rest[0] == '\n' || rest[0] == '\r' || rest[0] == ' ' && blank(rest))
}

// blank tells whether text is only white space and comments.
func blank(text []byte) bool {
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return false
		}
	}
	return true
}

// splitJSON cuts a stream of JSON values; not ok: it is none (YAML in flow style begins with a brace too).
func splitJSON(name string, content []byte) (documents []rawDocument, ok bool) {
	decoder := json.NewDecoder(bytes.NewReader(content))
	for {
		var value json.RawMessage
		err := decoder.Decode(&value)
		if errors.Is(err, io.EOF) {
			return documents, true
		}
		if err != nil && !strings.HasSuffix(name, ".json") {
			return nil, false
		}
		d := rawDocument{place: place{name, len(documents) + 1, ""}, json: value}
		if err != nil {
			line := 1 + bytes.Count(content[:min(int(decoder.InputOffset()), len(content))], []byte("\n"))
			d.err = fmt.Errorf("line %d or later: not JSON: %w", line, err)
			return append(documents, d), true
		}
		documents = append(documents, d)
	}
}

// yamlLine is how the YAML parser names lines.
var yamlLine = regexp.MustCompile(`line (\d+)`)

// toJSON turns a document's YAML into JSON. Errors name lines of the file, not of the document.
func toJSON(d rawDocument) ([]byte, error) {
	if d.json != nil {
		return d.json, nil
	}
	if blank(d.text) {
		return nil, nil
	}
	converted, err := yaml.YAMLToJSONStrict(d.text)
	if err != nil {
		said := yamlLine.ReplaceAllStringFunc(err.Error(), func(line string) string {
			n, _ := strconv.Atoi(strings.TrimPrefix(line, "line "))
			return fmt.Sprintf("line %d", d.line+n)
		})
		return nil, fmt.Errorf("not YAML: %s", strings.TrimPrefix(said, "yaml: "))
	}
	return converted, nil
}

// head is what tells one kind of object from another.
type head struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"metadata"`
	Items []json.RawMessage `json:"items"`
}

// document takes one document, or one item of a List, which may leave out what the List's kind says.
func (p *parsed) document(at place, text []byte, apiVersion, itemKind string) {
	if len(text) == 0 || string(text) == "null" {
		return
	}
	var h head
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &h); err != nil {
		p.opaque = true
		p.fail(at, "", describe(text, reflect.TypeFor[head](), err))
		return
	}
	if h.Kind == "" && itemKind != "" {
		h.Kind, h.APIVersion = itemKind, apiVersion
	}
	switch {
	case h.Kind == "":
		p.opaque = true
		p.fail(at, "", "kind: Required value: expected the kind of a Kubernetes object, such as Service")
	case h.APIVersion == "":
		p.opaque = true
		p.fail(at, "", fmt.Sprintf("apiVersion: Required value: expected the API version of %s, such as v1", h.Kind))
	case strings.HasSuffix(h.Kind, "List"):
		for i, item := range h.Items {
			p.document(place{at.file, at.document, fmt.Sprintf("%sitems[%d]", at.item, i)}, item, h.APIVersion, strings.TrimSuffix(h.Kind, "List"))
		}
	default:
		p.object(at, h, text)
	}
}

// object takes one object.
func (p *parsed) object(at place, h head, text []byte) {
	if h.Kind == "Endpoints" && h.APIVersion == "v1" {
		p.warn(at, fmt.Sprintf("Endpoints %s/%s is ignored: give an EndpointSlice (discovery.k8s.io/v1)", h.Metadata.Namespace, h.Metadata.Name))
		return
	}
	d, known := decoders[kind(h.Kind)]
	group, _ := schema.ParseGroupVersion(h.APIVersion)
	if !known || group.Group != d.version.Group {
		p.ignored = append(p.ignored, fmt.Sprintf("%s: %s %s is none of the kinds used", at, h.APIVersion, h.Kind))
		return
	}
	k := key{kind(h.Kind), h.Metadata.Namespace, h.Metadata.Name}
	if d.cluster {
		k.namespace = ""
	} else if k.namespace == "" {
		k.namespace = metav1.NamespaceDefault
	}
	if k.name == "" {
		p.opaque = true
		p.fail(at, h.Kind, "metadata.name: Required value")
		return
	}
	if group != d.version {
		p.bad = append(p.bad, k)
		p.fail(at, k.String(), fmt.Sprintf("apiVersion: Unsupported value: %q: expected %s", h.APIVersion, d.version))
		return
	}
	object, unknown, err := d.decode(text)
	if err != nil {
		p.bad = append(p.bad, k)
		p.fail(at, k.String(), describe(text, reflect.TypeOf(object).Elem(), err))
		return
	}
	for _, u := range unknown {
		p.warn(at, fmt.Sprintf("%s: %v (ignored)", k, u))
	}
	value, wrong, notes := d.take(object)
	for _, n := range notes {
		p.warn(at, fmt.Sprintf("%s: %s", k, n))
	}
	if len(wrong) > 0 {
		p.bad = append(p.bad, k)
		p.fail(at, k.String(), joinErrors(wrong))
		return
	}
	p.objects = append(p.objects, parsedObject{k, at, value})
}

func (p *parsed) fail(at place, what, problem string) {
	if what != "" {
		what += ": "
	}
	p.errors = append(p.errors, fmt.Sprintf("%s: %s%s", at, what, problem))
}

func (p *parsed) warn(at place, warning string) {
	p.warnings = append(p.warnings, fmt.Sprintf("%s: %s", at, warning))
}

func joinErrors(list field.ErrorList) string {
	parts := make([]string, len(list))
	for i, e := range list {
		parts[i] = e.Error()
	}
	return strings.Join(parts, "; ")
}

// decoder knows one kind.
type decoder struct {
	version schema.GroupVersion
	cluster bool // not namespaced
	decode  func([]byte) (object any, unknown []error, err error)
	// take validates and converts.
	take func(any) (value any, wrong field.ErrorList, notes []string)
}

var decoders = map[kind]decoder{
	kindService:       {corev1.SchemeGroupVersion, false, strictly[corev1.Service], takeService},
	kindEndpointSlice: {discoveryv1.SchemeGroupVersion, false, strictly[discoveryv1.EndpointSlice], takeSlice},
	kindPod:           {corev1.SchemeGroupVersion, false, strictly[corev1.Pod], takePod},
	kindNamespace:     {corev1.SchemeGroupVersion, true, strictly[corev1.Namespace], takeNamespace},
	kindNode:          {corev1.SchemeGroupVersion, true, strictly[corev1.Node], takeNode},
}

// strictly decodes as an API server does, and gives unknown and repeated fields apart.
func strictly[T any](text []byte) (any, []error, error) {
	object := new(T)
	unknown, err := kjson.UnmarshalStrict(text, object)
	return object, unknown, err
}
