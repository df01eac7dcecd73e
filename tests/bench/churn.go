package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Churn is what a rollout does to a proxy: four times a second the cluster under load gets a second endpoint or loses it, and
// its route table of fifty rules changes. sockmesh gets the changes from its control plane by delta ADS, Envoy from files that
// it watches; HAProxy and nginx would have to be reloaded. Each proxy must say how many changes came into force.

const (
	churnPeriod = 250 * time.Millisecond
	churnRoutes = 50
)

// churnCases are the two proxies that take changes while they run, each quiet and under churn.
func churnCases(all []testCase) []testCase {
	var cases []testCase
	for _, c := range only("sockmesh/sockmap", "envoy/iptables")(all) {
		cases = append(cases,
			c.as(quiet, func(s *scenario) { s.dynamic = true }),
			c.as(churning, func(s *scenario) { s.dynamic, s.churn = true, true }))
	}
	return cases
}

// underChurn is a load while configuration changes.
func (w *world) underChurn(ctx context.Context, s scenario, set setup, load func() (sample, error)) func() (sample, error) {
	return func() (sample, error) {
		if set.version == nil {
			return sample{}, errors.New("this proxy does not say which configuration is in force")
		}
		before, err := set.version(ctx)
		if err != nil {
			return sample{}, err
		}
		stop := make(chan struct{})
		done := make(chan error, 1)
		go func() { done <- w.churn(s, stop) }()
		result, err := load()
		close(stop)
		if churnErr := <-done; err == nil {
			err = churnErr
		}
		if err != nil {
			return sample{}, err
		}
		after, err := set.version(ctx)
		result.changes = after - before
		if err == nil && result.changes < 1 {
			err = errors.New("no change came into force")
		}
		return result, err
	}
}

// churn changes the configuration until it is told to stop.
func (w *world) churn(s scenario, stop <-chan struct{}) error {
	ticker := time.NewTicker(churnPeriod)
	defer ticker.Stop()
	for n := 1; ; n++ {
		select {
		case <-stop:
			return nil
		case <-ticker.C:
			if err := w.writeVersion(s, n); err != nil {
				return err
			}
		}
	}
}

// writeVersion writes both forms; the proxy under test watches one of them.
func (w *world) writeVersion(s scenario, n int) error {
	endpoints := []netip.AddrPort{w.backend(s)}
	if n%2 == 1 {
		endpoints = append(endpoints, netip.AddrPortFrom(w.backend(s).Addr(), otherPort))
	}
	routes := make([]lab.Route, 0, churnRoutes)
	for i := range churnRoutes - 1 {
		routes = append(routes, lab.Route{Header: "x-rule", Value: fmt.Sprintf("%d-%d", n, i), Clusters: []lab.Weight{{Cluster: "server", Weight: 1}}})
	}
	routes = append(routes, lab.Route{Clusters: []lab.Weight{{Cluster: "server", Weight: 1}}})
	eds, rds := lab.Endpoints("server", endpoints...), lab.Routes("bench", routes...)
	return errors.Join(w.lab.WriteXDS("churn", eds, rds), w.writeDiscovery("eds.json", n, eds), w.writeDiscovery("rds.json", n, rds))
}

// resetChurn leaves the control plane with the first version, or with none where nothing changes.
func (w *world) resetChurn(s scenario) error {
	if s.dynamic {
		return w.writeVersion(s, 0)
	}
	if err := w.lab.RemoveXDS("churn"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// writeDiscovery moves a DiscoveryResponse into the place that Envoy watches.
func (w *world) writeDiscovery(name string, version int, r lab.Resource) error {
	text, err := json.Marshal(map[string]any{"version_info": fmt.Sprint(version), "resources": []any{r}})
	if err != nil {
		return err
	}
	file := filepath.Join(w.lab.Dir, "tmp", name)
	if err := os.WriteFile(file+".new", text, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// envoyVersion is the version of the routes that Envoy uses.
func (w *world) envoyVersion(ctx context.Context) (float64, error) {
	out, err := w.client.Run(ctx, "curl", "-sSf", "--unix-socket", w.envoyAdmin(), "http://admin/config_dump?resource=dynamic_route_configs")
	if err != nil {
		return 0, err
	}
	var dump struct {
		Configs []struct {
			Version string `json:"version_info"`
		}
	}
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&dump); err != nil || len(dump.Configs) == 0 {
		return 0, fmt.Errorf("Envoy's dynamic routes: %w: %.200s", err, out)
	}
	var version float64
	_, err = fmt.Sscan(dump.Configs[0].Version, &version)
	return version, err
}
