package node

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// One pod opens more connections than a pod may have and sends on all of them. Those above its limit are reset and
// counted, the log says so once, and every request of another pod is served meanwhile.
func TestAFloodOfOnePodLeavesTheOthersTheirShare(t *testing.T) {
	w := newWorld(t, anywhere, "--max-connections-per-pod", "50")
	other := w.pod(anywhere, "other", 30, enrolled)
	w.eventually("both pods are served", func() error { return errors.Join(w.proxied(w.client), w.proxied(other)) })
	flood, err := w.client.StartTraffic(traffic.Config{Addr: w.shop.VIP(0).String(), Host: "shop", Connections: 200, Pause: 20 * time.Millisecond})
	w.must(err)
	w.eventually("connections above the limit are reset", func() error {
		if w.metric(`sockmesh_proxy_refused_connections_total{reason="pod_limit"}`) < 150 {
			return errors.New("not yet")
		}
		return nil
	})
	me := other.Addr4().String()
	for i := range w.shop.ClusterIPs {
		c := w.curl(other, w.shop.VIP(i), 100, "-H", "Connection: close")
		if n := c["v1/proxied "+me] + c["v2/proxied "+me]; n != 100 {
			t.Errorf("during the flood %d of 100 requests of another pod were served: %v", n, c)
		}
	}
	r, err := flood.Stop()
	w.must(err)
	if r.OK == 0 {
		t.Error("the flooding pod's connections within its limit were not served")
	}
	const said = "a pod has more connections than it may"
	if n := strings.Count(w.agent.Output(), said); n != 1 {
		t.Errorf("the log says %d times that %s, want once", n, said)
	}
	w.eventually("the pod is served again after its flood", func() error { return w.proxied(w.client) })
}
