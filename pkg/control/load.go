// Package control is a small reference control plane: it serves the xDS resources of a folder of YAML or JSON
// files to any number of data planes. The protocol is go-control-plane's; this package reads the folder, watches
// it, and never lets a broken file take down what was good.
package control

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"google.golang.org/protobuf/proto"

	"github.com/sockmesh/sockmesh/pkg/xds"
)

// Set is the resources of a folder.
type Set struct {
	snapshot *cache.Snapshot
	// Counts are the resources of each type, by type URL.
	Counts map[string]int
	// Version changes with the content.
	Version string
}

// LoadDir reads every .yaml, .yml and .json file of the folder; hidden ones are left out. It returns a set only
// if nothing at all is wrong; the errors name file, document and field.
func LoadDir(dir string) (*Set, []error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, []error{err}
	}
	var errs []error
	var all []located
	for _, entry := range entries {
		name := entry.Name()
		if entry.IsDir() || strings.HasPrefix(name, ".") || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
			continue
		}
		file := filepath.Join(dir, name)
		data, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue // gone since the folder was listed; the watcher will come again
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		resources, failed := xds.ParseResources(file, data)
		errs = append(errs, failed...)
		for _, r := range resources {
			all = append(all, located{r, file})
		}
	}
	set, failed := newSet(all)
	errs = append(errs, failed...)
	if len(errs) > 0 {
		return nil, errs
	}
	return set, nil
}

type located struct {
	xds.FileResource
	file string
}

func (l *located) place() string {
	if l.Where == "" {
		return l.file
	}
	return l.file + ", " + l.Where
}

// newSet indexes the resources. Each type has its own version, so that a change of one does not send the others
// again.
func newSet(all []located) (*Set, []error) {
	var errs []error
	byType := map[string][]types.Resource{}
	first := map[string]*located{}
	for i := range all {
		r := &all[i]
		typeURL := r.Any.GetTypeUrl()
		if cache.GetResponseType(typeURL) == types.UnknownType {
			errs = append(errs, &xds.FileError{File: r.file, Where: r.Where, Err: fmt.Errorf("@type: %s is not a type of xDS resource", typeURL)})
			continue
		}
		name := cache.GetResourceName(r.Message)
		if name == "" {
			errs = append(errs, &xds.FileError{File: r.file, Where: r.Where, Err: errors.New("name: must not be empty")})
			continue
		}
		if other := first[typeURL+"\x00"+name]; other != nil {
			errs = append(errs, &xds.FileError{File: r.file, Where: r.Where, Err: fmt.Errorf("name: %q is there already (%s)", name, other.place())})
			continue
		}
		first[typeURL+"\x00"+name] = r
		byType[typeURL] = append(byType[typeURL], r.Message)
	}
	if len(errs) > 0 {
		return nil, errs
	}
	set := &Set{snapshot: &cache.Snapshot{}, Counts: map[string]int{}}
	whole := sha256.New()
	for kind := types.ResponseType(0); kind < types.UnknownType; kind++ {
		typeURL, err := cache.GetResponseTypeURL(kind)
		if err != nil {
			continue
		}
		version, err := contentVersion(byType[typeURL])
		if err != nil {
			return nil, []error{err}
		}
		set.snapshot.Resources[kind] = cache.NewResources(version, byType[typeURL])
		if n := len(byType[typeURL]); n > 0 {
			set.Counts[typeURL] = n
		}
		fmt.Fprintf(whole, "%s %s\n", typeURL, version)
	}
	set.Version = hex.EncodeToString(whole.Sum(nil)[:6])
	return set, nil
}

// contentVersion depends on nothing but the content, so that a restart of the control plane sends nothing again.
func contentVersion(resources []types.Resource) (string, error) {
	sums := make([]string, 0, len(resources))
	for _, r := range resources {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(data)
		sums = append(sums, string(sum[:]))
	}
	slices.Sort(sums)
	sum := sha256.Sum256([]byte(strings.Join(sums, "")))
	return hex.EncodeToString(sum[:6]), nil
}
