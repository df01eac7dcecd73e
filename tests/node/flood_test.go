package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
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

// One pod opens connections as fast as it can and holds all that it gets. Every new connection and every request of another
// pod is served meanwhile.
func TestAPodThatOpensAndHoldsConnectionsLeavesTheOthersTheirShare(t *testing.T) {
	w := newWorld(t, anywhere, "--max-connections-per-pod", "300")
	other := w.pod(anywhere, "other", 30, enrolled)
	w.eventually("both pods are served", func() error { return errors.Join(w.proxied(w.client), w.proxied(other)) })
	flood := w.hostile(w.client, "hold", w.shop.VIP(0).String(), w.shop.VIP(1).String())
	refused := func() float64 { return w.metric(`sockmesh_proxy_refused_connections_total{reason="pod_limit"}`) }
	w.eventually("the pod is at its limit", func() error {
		if refused() < 100 {
			return errors.New("not yet")
		}
		return nil
	})
	before, me := refused(), other.Addr4().String()
	for range 3 {
		for i := range w.shop.ClusterIPs {
			c := w.curl(other, w.shop.VIP(i), 100, "-H", "Connection: close")
			if n := c["v1/proxied "+me] + c["v2/proxied "+me]; n != 100 {
				t.Errorf("during the flood %d of 100 requests of another pod were served: %v", n, c)
			}
		}
	}
	if n := refused() - before; n == 0 {
		t.Error("the flood had ended")
	} else {
		t.Logf("%v connections of the flooding pod were refused meanwhile", n)
	}
	flood.Kill()
	w.eventually("the pod is served again after its flood", func() error { return w.proxied(w.client) })
}

// Clients of one pod send many requests at once and never read an answer. What the agent holds for them is bounded as
// docs/security.md says, and others are served.
func TestClientsThatPipelineAndNeverReadAreBounded(t *testing.T) {
	const clients, loops = 200, 2
	w := newBareWorld(t, anywhere)
	dir := filepath.Join(w.Dir, "files")
	w.must(os.MkdirAll(dir, 0o755))
	w.must(os.WriteFile(filepath.Join(dir, "big"), make([]byte, 256<<10), 0o644))
	big := w.pod(anywhere, "big", 40, nil)
	_, err := big.StartNginx(w.ctx, 8080, fmt.Sprintf("location / { root %s; try_files /big =404; }", dir))
	w.must(err)
	w.endpoints("v1", big)
	w.weights(1, 0)
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
	w.startAgent("--concurrency", strconv.Itoa(loops))
	other := w.pod(anywhere, "other", 30, enrolled)
	w.eventually("both pods are served", func() error {
		_, err1 := w.tryCurl(w.client, w.shop.VIP(0), 1, "-o", "/dev/null")
		_, err2 := w.tryCurl(other, w.shop.VIP(0), 1, "-o", "/dev/null")
		return errors.Join(err1, err2)
	})
	w.must(os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", w.agent.PID()), []byte("5"), 0)) // the peak of the start is forgotten
	start := w.peak()
	hostile := w.hostile(w.client, "pipeline", fmt.Sprint(clients), w.shop.VIP(0).String(), w.shop.VIP(1).String())
	w.eventually("nobody takes any more requests", func() error {
		if !strings.Contains(hostile.Output(), "all sent") {
			return errors.New(hostile.Output())
		}
		return nil
	})
	held := w.peak() - start
	// Per loop 32 MiB of buffers and what io_uring is lent, then per connection the watermark with the pieces that end it, on
	// both sides of the proxy; twice all that, because Go collects when the heap has doubled.
	bound := 2 * (loops*(32<<20+4<<20) + clients*2*(64<<10+64<<10))
	t.Logf("%d clients that never read cost the agent %d MiB at most beside the %d before; the bound is %d", clients, held>>20, start>>20, bound>>20)
	if n := w.status().Connections.Proxied; n < clients {
		t.Errorf("only %d connections went through the proxy", n)
	}
	if held > bound {
		t.Errorf("%d bytes, the bound is %d", held, bound)
	}
	if _, err := w.tryCurl(other, w.shop.VIP(0), 20, "-o", "/dev/null", "-H", "Connection: close"); err != nil {
		t.Errorf("another pod is not served meanwhile: %v", err)
	}
}

// hostile starts this test's executable in the pod, as what hostileIfAsked makes of it.
func (w *world) hostile(pod *lab.Pod, args ...string) *lab.Process {
	w.t.Helper()
	exe, err := os.Executable()
	w.must(err)
	p, err := pod.Start("hostile", append([]string{exe, "hostile"}, args...)...)
	w.must(err)
	return p
}

// hostileIfAsked is a hostile client in a pod, run as `EXE hostile hold ADDR...`, which opens connections as fast as it can and
// holds them, or as `EXE hostile pipeline N ADDR...`, which sends requests on N connections until nobody takes any more, and
// never reads.
func hostileIfAsked() {
	if len(os.Args) < 4 || os.Args[1] != "hostile" {
		return
	}
	args := os.Args[3:]
	if os.Args[2] == "hold" {
		for i := range 4 {
			go func() {
				var held []net.Conn
				for {
					c, err := net.Dial("tcp", args[i%len(args)])
					if err != nil {
						continue // reset at the limit before it was looked at
					}
					if held = append(held, c); len(held) > 500 { // most of them were reset long ago
						held[0].Close()
						held = held[1:]
					}
				}
			}()
		}
		select {}
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	requests := []byte(strings.Repeat("GET / HTTP/1.1\r\nHost: shop\r\n\r\n", 500))
	var all sync.WaitGroup
	for i := range n {
		c, err := net.Dial("tcp", args[1+i%(len(args)-1)])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		all.Go(func() {
			_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
			_, _ = c.Write(requests)
		})
	}
	all.Wait()
	time.Sleep(2 * time.Second) // what was taken is worked off
	fmt.Println("all sent")
	select {}
}

// peak is the most memory that the agent has had resident so far.
func (w *world) peak() int {
	w.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.agent.PID()))
	w.must(err)
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); f[0] == "VmHWM:" {
			kib, err := strconv.Atoi(f[1])
			w.must(err)
			return kib << 10
		}
	}
	w.t.Fatal("the kernel doesn't say")
	return 0
}
