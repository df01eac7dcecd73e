package demo

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// step is one line of the demo: what it shows, and the figure that was seen.
type step struct {
	title string
	show  func(context.Context) (string, error)
}

func (w *world) steps() []step {
	return []step{
		{"canary 90/10 by weight", func(ctx context.Context) (string, error) { return w.canary(ctx, 0) }},
		{"the same over IPv6", func(ctx context.Context) (string, error) { return w.canary(ctx, 1) }},
		{"header x-canary: always", w.header},
		{"weights changed live to 0/100", w.shiftLive},
		{"TCP canary, offloaded to the kernel", w.tcpCanary},
		{"server-first TCP through the proxy", w.serverFirst},
		{"plain Service, in the kernel", w.plainService},
		{"source address at the servers", w.sourceAddress},
		{"iptables and nftables rules", w.noRules},
		{"bytes from socket to socket", w.redirected},
		{"agent killed with -9: fails open", w.killed},
		{"agent back", w.back},
	}
}

// canary sends requests with curl and counts who answered.
func (w *world) canary(ctx context.Context, family int) (string, error) {
	const n = 1000
	answers, err := w.curl(ctx, w.shop, family, n)
	if err != nil {
		return "", err
	}
	v1, v2 := answers["v1/proxied"], answers["v2/proxied"]
	seen := fmt.Sprintf("%d requests by curl to %s: v1 %d, v2 %d (%.1f %%)", n, w.shop.VIP(family), v1, v2, 100*float64(v2)/n)
	// A fair 10 % of 1000 is outside 60 to 150 once in a hundred thousand runs.
	if v1+v2 != n || v2 < 60 || v2 > 150 {
		return "", fmt.Errorf("%s; all answers: %v", seen, answers)
	}
	return seen, nil
}

func (w *world) header(ctx context.Context) (string, error) {
	const n = 200
	answers, err := w.curl(ctx, w.shop, 0, n, "-H", "x-canary: always")
	if err != nil {
		return "", err
	}
	if answers["v2/proxied"] != n {
		return "", fmt.Errorf("%d requests, answered by %v; all should be v2", n, answers)
	}
	return fmt.Sprintf("%d requests: v2 %d", n, n), nil
}

// shiftLive changes the weights under load and measures how long the old version still answered.
func (w *world) shiftLive(ctx context.Context) (string, error) {
	load, err := w.client.StartTraffic(traffic.Config{Addr: w.shop.VIP(0).String(), Host: "shop", Connections: 16, Pause: time.Millisecond})
	if err != nil {
		return "", err
	}
	if err := load.WaitRequests(ctx, 500); err != nil {
		return "", err
	}
	start := time.Now()
	if err := w.setWeights(0, 100); err != nil {
		return "", err
	}
	// Shifted is when no more v1 has come for 200 answers of v2.
	last, since, at := load.Now().Answers["v1/proxied"], load.Now().Answers["v2/proxied"], start
	if err := lab.Wait(ctx, func() error {
		now := load.Now()
		if v1 := now.Answers["v1/proxied"]; v1 != last {
			last, since, at = v1, now.Answers["v2/proxied"], now.At
		}
		if now.Answers["v2/proxied"] < since+200 {
			return fmt.Errorf("v1 still answers: %v", now.Answers)
		}
		return nil
	}); err != nil {
		return "", err
	}
	r, err := load.Stop()
	if err != nil {
		return "", err
	}
	if r.Failed > 0 {
		return "", fmt.Errorf("%d of %d requests failed, the first: %s", r.Failed, r.Requests, r.Failures[0].Error)
	}
	return fmt.Sprintf("v1's last answer within %d ms; %d requests on %d connections, %d failed",
		at.Sub(start).Milliseconds()+50, r.Requests, r.Connected, r.Failed), nil
}

// tcpCanary: every connection is sent to a version by the kernel, the proxy sees none.
func (w *world) tcpCanary(ctx context.Context) (string, error) {
	const n = 300
	before, err := w.lab.Status(ctx)
	if err != nil {
		return "", err
	}
	out, err := w.client.Run(ctx, "sh", "-c", fmt.Sprintf("for i in $(seq %d); do redis-cli -h %s get version || exit 1; done", n, w.redis.VIP(0).Addr()))
	if err != nil {
		return "", err
	}
	after, err := w.lab.Status(ctx)
	if err != nil {
		return "", err
	}
	counts := count(strings.Fields(out))
	offloaded, proxied := after.Connections.Offloaded-before.Connections.Offloaded, after.Connections.Proxied-before.Connections.Proxied
	seen := fmt.Sprintf("%d connections by redis-cli: v1 %d, v2 %d; %d chosen in the kernel, %d through the proxy", n, counts["v1"], counts["v2"], offloaded, proxied)
	if counts["v1"]+counts["v2"] != n || counts["v2"] < 8 || counts["v2"] > 60 || offloaded < n || proxied != 0 {
		return "", fmt.Errorf("%s", seen)
	}
	return seen, nil
}

// serverFirst: MariaDB speaks first, so a proxy that waits for the client's first bytes would hang.
func (w *world) serverFirst(ctx context.Context) (string, error) {
	before, err := w.lab.Status(ctx)
	if err != nil {
		return "", err
	}
	start := time.Now()
	out, err := w.client.Run(ctx, "mariadb", "--no-defaults", "-h", w.db.VIP(0).Addr().String(), "-u", "demo", "-N", "-B",
		"-e", "select version(), substring_index(user(), '@', -1);"+
			"with recursive n as (select 1 as i union all select i+1 from n where i < 900) select i, repeat('x', 2000) from n")
	if err != nil {
		return "", err
	}
	took := time.Since(start)
	after, err := w.lab.Status(ctx)
	if err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	first := strings.Fields(lines[0])
	proxied := after.Connections.Proxied - before.Connections.Proxied
	if len(lines) != 901 || len(first) != 2 || proxied != 1 {
		return "", fmt.Errorf("%d lines, the first %q; %d connections through the proxy", len(lines), lines[0], proxied)
	}
	w.sources[first[1]]++
	return fmt.Sprintf("MariaDB %s greeted and sent %d rows, %d KB, in %d ms", first[0], len(lines)-1, len(out)/1000, took.Milliseconds()), nil
}

// plainService: nobody claims it, so the kernel picks a backend at connect(); the client still sees the Service.
func (w *world) plainService(ctx context.Context) (string, error) {
	const n = 300
	before, err := w.lab.Status(ctx)
	if err != nil {
		return "", err
	}
	vip := w.plain.VIP(0)
	// curl prints what getpeername says.
	out, err := w.client.Run(ctx, "curl", "-sS", "-H", "Connection: close", "-w", "peer=%{remote_ip}:%{remote_port}\n", fmt.Sprintf("http://%s/[1-%d]", vip, n))
	if err != nil {
		return "", err
	}
	after, err := w.lab.Status(ctx)
	if err != nil {
		return "", err
	}
	counts := count(strings.Fields(out))
	w.sources[w.client.Addr4().String()] += counts[w.client.Addr4().String()]
	one, two, peers := counts["plain-1/direct"], counts["plain-2/direct"], counts["peer="+vip.String()]
	translated := after.Connections.Service - before.Connections.Service
	seen := fmt.Sprintf("%d connections: %d and %d; getpeername says %s %d times", n, one, two, vip, peers)
	if one+two != n || one < n/3 || two < n/3 || peers != n || translated < n {
		return "", fmt.Errorf("%s; %d translated; all that was seen: %v", seen, translated, counts)
	}
	return seen, nil
}

// sourceAddress looks back at what every server reported.
func (w *world) sourceAddress(context.Context) (string, error) {
	own := []string{w.client.Addr4().String(), w.client.Addr6().String()}
	total, ours := 0, 0
	for addr, n := range w.sources {
		total += n
		if addr == own[0] || addr == own[1] {
			ours += n
		}
	}
	if total == 0 || ours != total {
		return "", fmt.Errorf("servers saw %v, the client pod has %v", w.sources, own)
	}
	return fmt.Sprintf("the client pod's own, %s, in %d answers of %d", own[0], ours, total), nil
}

func (w *world) noRules(ctx context.Context) (string, error) {
	rules, err := w.lab.ForeignRules(ctx)
	if err != nil {
		return "", err
	}
	if len(rules) > 0 {
		return "", fmt.Errorf("%d rules: %s", len(rules), strings.Join(rules, "\n"))
	}
	return fmt.Sprintf("0 in %d network namespaces", w.lab.Namespaces()), nil
}

func (w *world) redirected(ctx context.Context) (string, error) {
	s, err := w.lab.Status(ctx)
	if err != nil {
		return "", err
	}
	a := s.Acceleration
	if !a.Active || a.RedirectedBytes == 0 {
		return "", fmt.Errorf("acceleration is %s, active: %v, %d bytes redirected; reason: %s", a.Mode, a.Active, a.RedirectedBytes, a.Reason)
	}
	return fmt.Sprintf("%d KB past the TCP/IP stack, %d KB through it", a.RedirectedBytes/1000, a.PassedBytes/1000), nil
}

// curl sends n requests on one connection and counts the answers by their first word.
func (w *world) curl(ctx context.Context, s lab.ServiceSpec, family, n int, flags ...string) (map[string]int, error) {
	args := append([]string{"curl", "-sS"}, flags...)
	host := s.VIP(family).String()
	if family == 1 { // curl's globbing, which counts the requests, would read the brackets of an IPv6 URL
		host = "shop.example"
		args = append(args, "--resolve", fmt.Sprintf("%s:%d:[%s]", host, s.Port, s.VIP(family).Addr()))
	}
	out, err := w.client.Run(ctx, append(args, fmt.Sprintf("http://%s/[1-%d]", host, n))...)
	if err != nil {
		return nil, err
	}
	answers := map[string]int{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 {
			answers[f[0]]++
			// The v6 Service has v4 endpoints here: the server sees the pod's address of the endpoint's family.
			w.sources[f[1]]++
		}
	}
	return answers, nil
}

func count(words []string) map[string]int {
	counts := map[string]int{}
	for _, word := range words {
		counts[word]++
	}
	return counts
}

// sorted prints a count in a stable order.
func sorted(counts map[string]uint64) string {
	var parts []string
	for k, n := range counts {
		parts = append(parts, fmt.Sprintf("%s %d", k, n))
	}
	sort.Strings(parts)
	return strings.Join(parts, ", ")
}
