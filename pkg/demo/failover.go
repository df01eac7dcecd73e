package demo

import (
	"context"
	"fmt"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// killed ends the agent with -9 while two generators run, one that keeps its connections and one that makes a new one
// for every request. What the dead process held breaks once; every request after that is answered, by the kernel's
// choice among the Service's endpoints.
func (w *world) killed(ctx context.Context) (string, error) {
	var loads [2]*lab.Load
	for i := range loads {
		var err error
		loads[i], err = w.client.StartTraffic(traffic.Config{
			Addr: w.shop.VIP(0).String(), Host: "shop", Connections: 8, Pause: 4 * time.Millisecond, NewConnection: i == 1,
		})
		if err != nil {
			return "", err
		}
		if err := loads[i].WaitRequests(ctx, 200); err != nil {
			return "", err
		}
	}
	killed := w.agent.KillTimed()
	for _, l := range loads {
		if err := l.WaitRequests(ctx, 500); err != nil {
			return "", fmt.Errorf("after the kill: %w", err)
		}
	}
	total := map[string]uint64{}
	var failed, requests uint64
	var unexplained []traffic.Failure
	for _, l := range loads {
		r, err := l.Stop()
		if err != nil {
			return "", err
		}
		requests, failed = requests+r.Requests, failed+r.Failed
		unexplained = append(unexplained, killed.OutsideOf(r.Failures)...)
		for k, n := range r.Answers {
			total[k] += n
		}
	}
	direct := total["v1/direct"] + total["v2/direct"]
	seen := fmt.Sprintf("%d requests: %s; %d broke with the process, %d afterwards", requests, sorted(total), failed-uint64(len(unexplained)), len(unexplained))
	if len(unexplained) > 0 {
		f := unexplained[0]
		return "", fmt.Errorf("%s; the first %d ms after the kill: %s", seen, f.At.Sub(killed.From).Milliseconds(), f.Error)
	}
	if direct < 1000 {
		return "", fmt.Errorf("%s; too few without the proxy", seen)
	}
	return seen, nil
}

// back starts the agent again under traffic: it adopts what is pinned, and the canary rules apply again.
func (w *world) back(ctx context.Context) (string, error) {
	load, err := w.client.StartTraffic(traffic.Config{
		Addr: w.shop.VIP(0).String(), Host: "shop", Connections: 8, Pause: 2 * time.Millisecond, NewConnection: true,
	})
	if err != nil {
		return "", err
	}
	if err := load.WaitRequests(ctx, 100); err != nil {
		return "", err
	}
	start := time.Now()
	if err := w.startAgent(ctx); err != nil {
		return "", err
	}
	ready := time.Since(start)
	answers, err := w.curl(ctx, w.shop, 0, 100)
	if err != nil {
		return "", err
	}
	r, err := load.Stop()
	if err != nil {
		return "", err
	}
	seen := fmt.Sprintf("ready in %d ms; %d requests meanwhile, %d failed; then by weight 0/100: v2 %d of 100", ready.Milliseconds(), r.Requests, r.Failed, answers["v2/proxied"])
	if r.Failed > 0 {
		return "", fmt.Errorf("%s; the first: %s", seen, r.Failures[0].Error)
	}
	if answers["v2/proxied"] != 100 {
		return "", fmt.Errorf("%s; all answers: %v", seen, answers)
	}
	return seen, nil
}
