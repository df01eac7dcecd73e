package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	kjson "sigs.k8s.io/json"
)

// describe says of JSON that does not fit a Go type at which field, what was found and what was expected. The decoder's
// own error leaves out list indexes, and for types that decode themselves the whole path.
func describe(text []byte, t reflect.Type, err error) string {
	path, value, wanted := locate(text, t)
	if wanted == nil {
		return err.Error()
	}
	path = strings.TrimPrefix(path, ".")
	if path == "" {
		path = "document"
	}
	return fmt.Sprintf("%s: Invalid value: %s: expected %s", path, shorten(value), expected(wanted, err))
}

// locate goes down to the deepest field that does not decode.
func locate(text []byte, t reflect.Type) (path string, value []byte, wanted reflect.Type) {
	if kjson.UnmarshalCaseSensitivePreserveInts(text, reflect.New(t).Interface()) == nil {
		return "", nil, nil
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) {
		return "", text, t
	}
	switch t.Kind() {
	case reflect.Struct:
		var members map[string]json.RawMessage
		if json.Unmarshal(text, &members) == nil {
			for _, name := range slices.Sorted(maps.Keys(members)) {
				member := members[name]
				if f, ok := memberType(t, name); ok {
					if path, value, wanted := locate(member, f); wanted != nil {
						return "." + name + path, value, wanted
					}
				}
			}
		}
	case reflect.Map:
		var members map[string]json.RawMessage
		if json.Unmarshal(text, &members) == nil {
			for _, name := range slices.Sorted(maps.Keys(members)) {
				member := members[name]
				if path, value, wanted := locate(member, t.Elem()); wanted != nil {
					return "[" + name + "]" + path, value, wanted
				}
			}
		}
	case reflect.Slice:
		var items []json.RawMessage
		if json.Unmarshal(text, &items) == nil {
			for i, item := range items {
				if path, value, wanted := locate(item, t.Elem()); wanted != nil {
					return fmt.Sprintf("[%d]", i) + path, value, wanted
				}
			}
		}
	}
	return "", text, t
}

// memberType is the type of a struct's field by its JSON name.
func memberType(t reflect.Type, name string) (reflect.Type, bool) {
	for i := range t.NumField() {
		f := t.Field(i)
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if tag == name {
			return f.Type, true
		}
		if f.Anonymous && tag == "" && f.Type.Kind() == reflect.Struct {
			if inner, ok := memberType(f.Type, name); ok {
				return inner, true
			}
		}
	}
	return nil, false
}

// expected says in words what a type holds.
func expected(t reflect.Type, err error) string {
	switch t {
	case reflect.TypeFor[intstr.IntOrString]():
		return "a number or a string"
	case reflect.TypeFor[metav1.Time](), reflect.TypeFor[metav1.MicroTime]():
		return "a time such as 2026-01-02T15:04:05Z"
	case reflect.TypeFor[resource.Quantity]():
		return "a quantity such as 100m or 64Mi"
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return fmt.Sprintf("a whole number (%s)", t.Kind())
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Struct, reflect.Map:
		return "a mapping"
	}
	var mismatch *json.UnmarshalTypeError
	if errors.As(err, &mismatch) {
		return mismatch.Type.String()
	}
	return err.Error()
}

func shorten(value []byte) string {
	const most = 60
	if len(value) > most {
		return string(value[:most]) + "…"
	}
	return string(value)
}
