package agent

import (
	"context"
	"time"

	"github.com/sockmesh/sockmesh/agent/host"
	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/datapath/selftest"
)

// What waits for what. Everything here serves one rule: no connection is sent to the proxy before the proxy can do
// right by it, and nothing that an earlier agent left working in the kernel is taken away before it is known again.

// servePods looks for pods once the proxy knows what to do with their connections. As soon as its listeners exist in a
// pod, claims that are pinned from before take effect there; until then they fail open (or closed, as configured).
func (a *Agent) servePods(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-a.publisher.first:
	}
	a.awaitWarm(ctx)
	a.datapath.Reconciler().Synced(datapath.SourceClaims)
	select {
	case <-ctx.Done():
		return nil
	case <-a.live:
	}
	a.serving.Store(true)
	return a.pods.Run(ctx)
}

// How long pods may wait for listeners and clusters that were announced but lack routes or endpoints. It is Envoy's
// initial_fetch_timeout, after which pkg/xds goes on without them anyway.
const warmWait, warmPoll = 15 * time.Second, 10 * time.Millisecond

// awaitWarm waits until the first configuration is whole. Without the one kept on disk it comes in pieces, and a
// listener that an earlier agent's pinned claims send connections to may not be among the first.
func (a *Agent) awaitWarm(ctx context.Context) {
	for end := time.Now().Add(warmWait); a.xds != nil && time.Now().Before(end) && ctx.Err() == nil; time.Sleep(warmPoll) {
		if len(a.xds.Status().Warming) == 0 {
			return
		}
	}
}

// livePoll is how often it is looked whether this build's programs are in charge.
const livePoll = 20 * time.Millisecond

// awaitLive waits until the programs that redirect connections are those whose tables this agent reads. They are at
// once, except at an upgrade that changes a map's layout: there the old programs stay until the new maps are filled,
// and what they redirect meanwhile this agent couldn't tell the destination of. So no pod gets listeners before.
func (a *Agent) awaitLive(ctx context.Context) error {
	for ctx.Err() == nil {
		if a.datapath.Live() {
			if !a.selfTested {
				if err := selftest.Guard(ctx, a.datapath, a.log); err != nil {
					return err
				}
			}
			close(a.live)
			a.endTurn()
			return nil
		}
		time.Sleep(livePoll)
	}
	return nil
}

// flyCanary waits for the first configuration, which the canary's own listener is a part of.
func (a *Agent) flyCanary(ctx context.Context) error {
	for _, ready := range []<-chan struct{}{a.publisher.first, a.live} {
		select {
		case <-ctx.Done():
			return nil
		case <-ready:
		}
	}
	a.canaryLoop.run(ctx, a.succeeded.Load)
	return nil
}

// How long the kernel's list of pods is kept from shrinking after Kubernetes was listed, while the network
// namespaces of those pods are looked for.
const podsWait, podsPoll = 3 * time.Second, 20 * time.Millisecond

// podsKnown waits until every pod that Kubernetes named has been found or given up on for now, and then lets the
// kernel forget the pods of an earlier agent.
func (a *Agent) podsKnown() {
	a.parts.Go(func() {
		// The new maps of a changed layout have no pods to forget, and wait for this to be put in charge.
		for end := time.Now().Add(podsWait); a.datapath.Status().Datapath.Attached && time.Now().Before(end) && !a.podsSettled(); {
			time.Sleep(podsPoll)
		}
		a.datapath.Reconciler().Synced(datapath.SourcePods)
		// The start is over when what was known at it is in the maps; errors of entries are shown by the reconciler.
		_ = a.datapath.Reconciler().Flush(context.Background())
		if err := host.GiveBackMemory(); err != nil {
			a.log.Warn("memory that only the start needed stays resident", "error", err)
		}
	})
}

func (a *Agent) podsSettled() bool {
	if !a.serving.Load() {
		return false
	}
	looked := map[string]bool{}
	for _, s := range a.pods.Status() {
		looked[s.UID] = s.Ready || s.Reason != ""
	}
	for _, p := range a.objects.podList() {
		if !looked[p.UID] && !p.HostNetwork && !p.Terminal {
			return false
		}
	}
	return true
}
