package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/xds"
)

// newControl makes the xDS client; nil: neither --bootstrap nor --xds.
func newControl(cfg config.Config, publish func(*mesh.Snapshot), log *slog.Logger) (*xds.Client, error) {
	var b *xds.Bootstrap
	var err error
	switch {
	case cfg.Bootstrap != "":
		b, err = xds.LoadBootstrap(cfg.Bootstrap)
	case cfg.XDS != "":
		b, err = xds.BootstrapForServer(cfg.XDS)
	default:
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return xds.New(xds.Config{
		Bootstrap: b, NodeID: cfg.NodeName, Version: version.String(), StateDir: cfg.StateDir, OnSnapshot: publish,
		Logger: log.With("component", "xds"),
	})
}

// runControl runs the client; that it ends because it was told to is no error.
func (a *Agent) runControl(ctx context.Context) error {
	if err := a.xds.Run(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// emptySnapshot is the configuration of an agent without xDS.
func emptySnapshot() *mesh.Snapshot { return mesh.NewSnapshot(1, nil, map[string]*mesh.Cluster{}) }

// xdsStatus is never nil inside: JSON readers expect lists.
func (a *Agent) xdsStatus() api.XDS {
	out := api.XDS{Servers: []api.XDSServer{}, Rejected: []api.RejectedItem{}, Ignored: []api.IgnoredItem{}}
	if a.xds == nil {
		return out
	}
	s := a.xds.Status()
	for _, v := range s.Servers {
		out.Servers = append(out.Servers, api.XDSServer{Name: v.Name, Stream: v.Stream, Delta: v.Delta, Connected: v.Connected, LastError: v.LastError})
	}
	for _, v := range s.Rejected {
		out.Rejected = append(out.Rejected, api.RejectedItem{Type: v.Type, Name: v.Name, Error: v.Error, InForce: v.InForce})
	}
	for _, v := range s.Ignored {
		out.Ignored = append(out.Ignored, api.IgnoredItem{Type: v.Type, Name: v.Name, Field: v.Field})
	}
	out.Warming = s.Warming
	r := s.Resources
	out.Resources = api.XDSResources{Listener: r["listener"], Route: r["route"], Cluster: r["cluster"], Endpoint: r["endpoint"], Secret: r["secret"]}
	return out
}

// xdsTrouble is what stands between the agent and its control plane.
func (a *Agent) xdsTrouble() string {
	for _, s := range a.xdsStatus().Servers {
		if !s.Connected && s.LastError != "" {
			return fmt.Sprintf(": %s: %s", s.Name, s.LastError)
		}
	}
	return ""
}
