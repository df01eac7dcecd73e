package agent

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/kube"
	"github.com/sockmesh/sockmesh/pkg/service"
)

// Reasons of Events beside those that pkg/service gives for what it finds in the object itself.
const (
	reasonMapFull     = "MapFull"
	reasonNotInForce  = "NotInForce"
	reasonPortInUse   = "NodePortInUse"
	reasonHealthCheck = "FailedToStartServiceHealthcheck" // kube-proxy's word
)

// notice is something about a Service that this node found out: the object is fine, but it can't be served in full.
type notice struct{ reason, message string }

// notices keeps what is wrong with Services on this node, by who found it, and tells the Services' owners: an Event once
// for each problem, not for each retry. A problem that went away and came back is told again.
type notices struct {
	warn func(on kube.Ref, reason, message string)
	uid  func(service.Name) string
	log  *slog.Logger

	mu  sync.Mutex
	now map[string]map[service.Name][]notice // guarded by mu, by topic
}

// set replaces what one topic has to say.
func (n *notices) set(topic string, all map[service.Name][]notice) {
	n.mu.Lock()
	before := n.now[topic]
	if n.now == nil {
		n.now = map[string]map[service.Name][]notice{}
	}
	n.now[topic] = all
	n.mu.Unlock()
	for _, name := range slices.SortedFunc(maps.Keys(all), compareNames) {
		for _, x := range all[name] {
			if !slices.Contains(before[name], x) {
				n.warn(kube.Ref{APIVersion: "v1", Kind: "Service", Namespace: name.Namespace, Name: name.Name, UID: n.uid(name)}, x.reason, x.message)
			}
		}
	}
	for name, list := range before {
		for _, x := range list {
			if !slices.Contains(all[name], x) {
				n.log.Info("no longer wrong with a Service: "+x.message, "service", name, "reason", x.reason)
			}
		}
	}
}

func compareNames(a, b service.Name) int { return strings.Compare(a.String(), b.String()) }

// of lists what is wrong with a Service now.
func (n *notices) of(name service.Name) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, topic := range slices.Sorted(maps.Keys(n.now)) {
		for _, x := range n.now[topic][name] {
			out = append(out, x.message)
		}
	}
	return out
}

// failuresPoll is how often it is asked what the maps refused.
const failuresPoll = 500 * time.Millisecond

// watchFailures turns entries that could not be written into notices.
func (a *Agent) watchFailures(ctx context.Context) error {
	tick := time.NewTicker(failuresPoll)
	defer tick.Stop()
	var seen uint64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		failed, now := a.datapath.Reconciler().Failures(seen)
		if now == seen {
			continue
		}
		seen = now
		a.notices.set("maps", mapNotices(failed))
	}
}

// mapNotices joins the addresses of a Service that failed for one reason: it is one problem, however many there are.
func mapNotices(failed []datapath.EntryError) map[service.Name][]notice {
	out := map[service.Name][]notice{}
	for _, e := range failed {
		namespace, name, ok := strings.Cut(e.Name, "/")
		if !ok || e.Kind != "frontend" && e.Kind != "outside" {
			continue
		}
		x := notice{reasonNotInForce, e.Addr + " is not in force: " + e.Error}
		if e.Map != "" {
			x = notice{reasonMapFull, "what is new or has changed is not in force on this node: " + e.Error}
		}
		key := service.Name{Namespace: namespace, Name: name}
		if !slices.Contains(out[key], x) {
			out[key] = append(out[key], x)
		}
	}
	for _, list := range out {
		slices.SortFunc(list, func(a, b notice) int { return strings.Compare(a.message, b.message) })
	}
	return out
}
