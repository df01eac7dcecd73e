package agent

import (
	"context"
	"encoding/json"
	"log/slog"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// control is the xDS client as the agent uses it.
type control interface {
	Run(context.Context) error
	Status() api.XDS
	// ConfigDump is Envoy's ConfigDump as JSON, secrets redacted.
	ConfigDump() (json.RawMessage, error)
}

// newControl makes the xDS client; nil: neither --bootstrap nor --xds.
func newControl(cfg config.Config, publish func(*mesh.Snapshot), log *slog.Logger) (control, error) {
	return nil, nil
}

// emptySnapshot is the configuration of an agent without xDS.
func emptySnapshot() *mesh.Snapshot { return mesh.NewSnapshot(1, nil, map[string]*mesh.Cluster{}) }

func (a *Agent) xdsStatus() api.XDS {
	x := api.XDS{}
	if a.xds != nil {
		x = a.xds.Status()
	}
	if x.Servers == nil {
		x.Servers = []api.XDSServer{}
	}
	if x.Rejected == nil {
		x.Rejected = []api.RejectedItem{}
	}
	if x.Ignored == nil {
		x.Ignored = []api.IgnoredItem{}
	}
	return x
}

// ConfigDump implements admin.Source.
func (a *Agent) ConfigDump() (json.RawMessage, error) {
	if a.xds == nil {
		return json.RawMessage(`{"configs":[]}`), nil
	}
	return a.xds.ConfigDump()
}
