package xds

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

func TestLastGoodConfigurationStaysWhileTheServerIsAway(t *testing.T) {
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false)})
	stream := s.stream()
	stream.send(Listeners, "1")
	stream.send(Clusters, "7", staticClusterYAML("a", 80))
	h.until("a", hasCluster("a"))
	s.grpc.Stop()
	h.eventually("the loss of the connection", func() bool {
		st := h.client.Status().Servers
		return len(st) == 1 && !st[0].Connected && st[0].LastError != ""
	})
	if !hasCluster("a")(h.client.Snapshot()) {
		t.Error("a is gone")
	}
	again := newScripted(t, s.address)
	stream = again.stream()
	if r := stream.request(Clusters); r.GetVersionInfo() != "7" || r.GetResponseNonce() != "" || r.GetNode() == nil {
		t.Errorf("the first request of the new stream: %v", r)
	}
	h.eventually("the connection", func() bool { return h.client.Status().Servers[0].Connected })
}

func TestBackoffDoublesAndStartsOverAfterAnAnswer(t *testing.T) {
	s := newScripted(t, "")
	run(t, Config{Bootstrap: bootstrapFor(t, s.address, false), BackoffBase: 20 * time.Millisecond, BackoffMax: 80 * time.Millisecond})
	gap := func(answer bool) time.Duration {
		stream := s.stream()
		if answer {
			stream.send(Clusters, "1")
			stream.request(Clusters)
			stream.request(Clusters)
		}
		start := time.Now()
		stream.close <- status.Error(codes.Unavailable, "no")
		next := s.stream()
		s.streams <- next // for the next round
		return time.Since(start)
	}
	for _, least := range []time.Duration{16, 32, 64, 64} { // 20 % of jitter
		if got := gap(false); got < least*time.Millisecond {
			t.Errorf("reopened after %v, at least %v ms expected", got, least)
		}
	}
	gap(true)
}

func TestStateSurvivesARestartWithoutTheServer(t *testing.T) {
	dir := t.TempDir()
	s := newScripted(t, "")
	first := run(t, Config{Bootstrap: bootstrapFor(t, s.address, true), StateDir: dir})
	stream := s.stream()
	stream.sendDelta(Clusters, "c1", nil, clusterYAML("a"))
	stream.sendDelta(Listeners, "l1", nil, listenerYAML("l", "r"))
	stream.deltaRequest(Endpoints)
	stream.sendDelta(Endpoints, "e1", nil, endpointsYAML("a", "192.0.2.1"))
	stream.deltaRequest(Routes)
	stream.sendDelta(Routes, "r1", nil, routeYAML("r", "a"))
	first.until("the route", routed("a"))
	first.stop()
	s.grpc.Stop()
	if info, err := os.Stat(filepath.Join(dir, stateFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", info, err)
	}

	second := run(t, Config{Bootstrap: bootstrapFor(t, s.address, true), StateDir: dir})
	snapshot := second.until("the route from disk", routed("a"))
	if snapshot.Clusters["a"].Endpoints[0].Addr.Addr().String() != "192.0.2.1" {
		t.Errorf("%+v", snapshot.Clusters["a"])
	}
	again := newScripted(t, s.address)
	stream = again.stream()
	if r := stream.deltaRequest(Clusters); r.GetInitialResourceVersions()["a"] != "c1" {
		t.Errorf("%v", r)
	}
	stream.sendDelta(Listeners, "l2", []string{"l"})
	second.until("the listener to go", func(s *mesh.Snapshot) bool { return len(s.Listeners) == 0 })
}

func TestADamagedStateFileIsNotUsed(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, stateFile), []byte(strings.Repeat("x", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newScripted(t, "")
	h := run(t, Config{Bootstrap: bootstrapFor(t, s.address, false), StateDir: dir})
	stream := s.stream()
	stream.send(Listeners, "1")
	stream.send(Clusters, "1", staticClusterYAML("a", 80))
	h.until("a", hasCluster("a"))
}
