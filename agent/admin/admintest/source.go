// Package admintest is an admin API whose answers a test chooses.
package admintest

import (
	"encoding/json"
	"fmt"

	"github.com/sockmesh/sockmesh/agent/admin"
	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/config"
)

// Source answers with its fields.
type Source struct {
	StatusValue    api.Status
	PodList        []api.Pod
	ServiceList    []api.Service
	ListenerList   []api.Listener
	RouteList      []api.Route
	ClusterList    []api.Cluster
	EndpointList   []api.Endpoint
	SocketList     []api.Socket
	MapList        []api.Map
	MapDumps       map[string]api.MapDump
	ExplainFunc    func(api.ExplainRequest) (api.Explanation, error)
	ConfigDumpJSON string
	Level          string
}

var _ admin.Source = (*Source)(nil)

// Status implements admin.Source.
func (s *Source) Status() api.Status { return s.StatusValue }

// Pods implements admin.Source.
func (s *Source) Pods() []api.Pod { return s.PodList }

// Services implements admin.Source.
func (s *Source) Services() []api.Service { return s.ServiceList }

// Listeners implements admin.Source.
func (s *Source) Listeners() []api.Listener { return s.ListenerList }

// Routes implements admin.Source.
func (s *Source) Routes() []api.Route { return s.RouteList }

// Clusters implements admin.Source.
func (s *Source) Clusters() []api.Cluster { return s.ClusterList }

// Endpoints implements admin.Source.
func (s *Source) Endpoints() []api.Endpoint { return s.EndpointList }

// Sockets implements admin.Source.
func (s *Source) Sockets() ([]api.Socket, error) { return s.SocketList, nil }

// Maps implements admin.Source.
func (s *Source) Maps() ([]api.Map, error) { return s.MapList, nil }

// Dump implements admin.Source.
func (s *Source) Dump(name string) (api.MapDump, error) {
	d, ok := s.MapDumps[name]
	if !ok {
		return d, fmt.Errorf("map %q: %w", name, admin.ErrNotFound)
	}
	return d, nil
}

// Explain implements admin.Source.
func (s *Source) Explain(r api.ExplainRequest) (api.Explanation, error) { return s.ExplainFunc(r) }

// ConfigDump implements admin.Source.
func (s *Source) ConfigDump() (json.RawMessage, error) { return json.RawMessage(s.ConfigDumpJSON), nil }

// LogLevel implements admin.Source.
func (s *Source) LogLevel() string { return s.Level }

// SetLogLevel implements admin.Source.
func (s *Source) SetLogLevel(l string) error {
	if _, err := config.ParseLevel(l); err != nil {
		return err
	}
	s.Level = l
	return nil
}
