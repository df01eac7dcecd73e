package agent

import (
	"context"
	"time"

	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/pkg/healthcheck"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// What load balancers are told of this node: pkg/healthcheck has the servers, here is what they answer from.

// newHealth makes the servers; they open nothing before startHealth.
func (a *Agent) newHealth() {
	log := a.log.With("component", "healthcheck")
	a.checks = healthcheck.NewServices(healthcheck.ServicesConfig{
		Healthy: func() bool { ok, _ := a.servesServices(); return ok },
		Failed: func(failed map[service.Name]string) {
			all := make(map[service.Name][]notice, len(failed))
			for name, why := range failed {
				all[name] = []notice{{reasonHealthCheck, why}}
			}
			a.notices.set("health", all)
		},
		Logger: log,
	})
	if a.cfg.KubeProxyHealthz != config.Off {
		a.nodeHealth = healthcheck.NewNode(healthcheck.NodeConfig{
			Address: a.cfg.KubeProxyHealthz, Healthy: a.servesServices, Eligible: a.nodeEligible, Logger: log,
		})
	}
}

func (a *Agent) startHealth(ctx context.Context) {
	a.healthOpen.Store(true)
	a.part("health checks", ctx, a.checks.Run)
	if a.nodeHealth != nil {
		a.part("node health", ctx, a.nodeHealth.Run)
	}
}

// closeHealth lets go of the ports: load balancers look elsewhere, or ask the agent that has taken over.
func (a *Agent) closeHealth() {
	if a.checks != nil {
		a.checks.Close()
	}
	if a.nodeHealth != nil {
		a.nodeHealth.Close()
	}
}

// servesServices tells whether Services work on this node by this agent's programs and maps, and when those were written
// last. An API server that is away changes nothing: the last state is served.
func (a *Agent) servesServices() (bool, time.Time) {
	rec := a.datapath.Reconciler().Status()
	return a.cfg.Services && a.source != nil && a.source.Status().Synced && a.datapath.Live() && !rec.Superseded, rec.LastApplied
}

// unhealthy is what only a restart can mend.
func (a *Agent) unhealthy() []string {
	var reasons []string
	for _, l := range a.engine.Stuck() {
		reasons = append(reasons, l.String())
	}
	return reasons
}

// nodeEligible tells whether load balancers may send this node new connections.
func (a *Agent) nodeEligible() bool {
	n := a.objects.nodeNow()
	return n != nil && !n.Leaving
}
