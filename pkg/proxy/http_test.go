package proxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// httpBackend answers every request with its name.
func httpBackend(t testing.TB, name string) string {
	ln := listenIn(t, nil, "127.0.0.1:0")
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, name)
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// httpChain routes everything to one cluster.
func httpChain(t testing.TB, cluster string) *mesh.FilterChain {
	rc := &mesh.RouteConfig{Name: "r", Hosts: []*mesh.VirtualHost{{Name: "all", Domains: []string{"*"}, Routes: []*mesh.Route{{
		Match:  mesh.RouteMatch{Kind: mesh.PathPrefix, Path: "/"},
		Action: &mesh.RouteAction{Clusters: []mesh.WeightedCluster{{Name: cluster, Weight: 1}}, TotalWeight: 1, ClusterNotFoundCode: 503},
	}}}}}
	for _, h := range rc.Hosts {
		for _, r := range h.Routes {
			r.Host, r.Config = h, rc
		}
	}
	if err := rc.Init(); err != nil {
		t.Fatal(err)
	}
	return &mesh.FilterChain{HTTP: &mesh.HTTPConnectionManager{
		StatPrefix: "t", Routes: rc, GenerateRequestID: true, AllowAbsoluteURL: true, MaxRequestHeadersBytes: 60 << 10, MaxHeadersCount: 100,
	}}
}

// TestNoRequestFailsWhileRoutesAndClustersChange keeps connections alive over snapshots in which route, cluster
// and listener are all new each time.
func TestNoRequestFailsWhileRoutesAndClustersChange(t *testing.T) {
	backends := []string{httpBackend(t, "one"), httpBackend(t, "two")}
	e := startEngine(t, Config{})
	addr := freePort(t)
	publish := func(g uint64) {
		name := fmt.Sprintf("c%d", g%3)
		e.SetSnapshot(snapshot(g, []*mesh.Listener{listener(t, "l", addr, true, httpChain(t, name))}, clusterOf(name, backends[g%2])))
	}
	publish(1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var served, dialled atomic.Int64
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			tr := &http.Transport{MaxIdleConnsPerHost: 1}
			dialer := net.Dialer{Timeout: patience}
			tr.DialContext = func(ctx context.Context, network, a string) (net.Conn, error) {
				dialled.Add(1)
				return dialer.DialContext(ctx, network, a)
			}
			defer tr.CloseIdleConnections()
			client := &http.Client{Transport: tr, Timeout: patience}
			for {
				select {
				case <-stop:
					return
				default:
				}
				res, err := client.Get("http://" + addr + "/x")
				if err != nil {
					t.Error(err)
					return
				}
				body, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if res.StatusCode != 200 {
					t.Errorf("%d %s", res.StatusCode, body)
					return
				}
				served.Add(1)
			}
		}()
	}
	for g := uint64(2); g < 200; g++ {
		publish(g)
		before := served.Load()
		eventually(t, "traffic", func() bool { return served.Load() > before+8 || t.Failed() })
		if t.Failed() {
			break
		}
	}
	// The last change is in force for connections that were open before it.
	publish(1000)
	res, err := http.Get("http://" + addr + "/")
	if err == nil {
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if string(body) != "one" {
			t.Errorf("after the last change %q answers", body)
		}
	} else {
		t.Error(err)
	}
	close(stop)
	wg.Wait()
	// On a busy machine Go's client gives a connection up by itself now and then (maxWriteWaitBeforeConnReuse, 50 ms); 200
	// changes that cost connections would cost hundreds.
	if n := dialled.Load(); n < 8 || n > 16 {
		t.Errorf("%d connections for 8 clients: changes must not cost connections", n)
	}
	http.DefaultClient.CloseIdleConnections()
	time.Sleep(time.Millisecond)
	t.Logf("%d requests", served.Load())
}
