package xds

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
)

// The last good configuration is kept on disk, so that an agent that restarts while the control plane is away
// serves what it served before. The file is a DeltaDiscoveryResponse (its resources carry name, version and, in
// aliases, where they came from) behind a checksum, replaced by rename: it is whole or it is the one before.

const stateFile = "xds.state"

// loadState takes in what was kept, as far as it is from a source that still is configured.
func (c *Client) loadState() {
	if c.cfg.StateDir == "" {
		return
	}
	file := filepath.Join(c.cfg.StateDir, stateFile)
	state, err := readState(file)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		c.log.Warn("the configuration kept on disk cannot be read and is not used", "file", file, "error", err)
		return
	}
	loaded := 0
	// Clusters and listeners come first in the file: what they need says which endpoints and routes are wanted.
	for _, r := range state.GetResources() {
		kind, known := kindOf(r.GetResource().GetTypeUrl())
		if !known || len(r.GetAliases()) != 1 {
			continue
		}
		c.refreshSubscriptions()
		s := c.streams[r.GetAliases()[0]]
		if s == nil || !s.asked(kind, r.GetName()) {
			continue
		}
		message, err := kind.decode(r.GetResource())
		if err == nil {
			err = c.accept(s.source, s.key, kind, incoming{name: r.GetName(), version: r.GetVersion(), any: r.GetResource()}, message)
		}
		if err == nil {
			loaded++
			delete(c.awaited, awaitKey{s.key, kind})
		}
	}
	c.dirty = false
	if loaded > 0 {
		clear(c.awaited)
		c.log.Info("serving the configuration kept on disk until the control plane answers", "file", file, "resources", loaded)
	}
}

func readState(file string) (*discoveryv3.DeltaDiscoveryResponse, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if len(data) < sha256.Size {
		return nil, errors.New("truncated")
	}
	if sum := sha256.Sum256(data[sha256.Size:]); string(sum[:]) != string(data[:sha256.Size]) {
		return nil, errors.New("checksum mismatch")
	}
	state := &discoveryv3.DeltaDiscoveryResponse{}
	return state, proto.Unmarshal(data[sha256.Size:], state)
}

// saveState writes what is in force. c.mu is held.
func (c *Client) saveState() {
	if !c.dirty {
		return
	}
	c.dirty = false
	if c.cfg.StateDir == "" {
		return
	}
	state := &discoveryv3.DeltaDiscoveryResponse{}
	for _, kind := range []Kind{Clusters, Listeners, Endpoints, Routes} {
		for name, r := range c.resources[kind] {
			if r.any == nil || r.source == staticSource {
				continue
			}
			state.Resources = append(state.Resources, &discoveryv3.Resource{Name: name, Version: r.version, Resource: r.any, Aliases: []string{r.source}})
		}
	}
	if err := writeState(filepath.Join(c.cfg.StateDir, stateFile), state); err != nil {
		c.log.Error("the configuration cannot be kept on disk: a restart without the control plane would begin empty", "error", err)
	}
}

func writeState(file string, state proto.Message) error {
	data, err := proto.Marshal(state)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(file), stateFile+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	sum := sha256.Sum256(data)
	_, err = temp.Write(append(sum[:], data...))
	if err == nil {
		err = temp.Sync()
	}
	if e := temp.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("%s: %w", temp.Name(), err)
	}
	return os.Rename(temp.Name(), file)
}
