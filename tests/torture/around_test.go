package torture

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// The control plane goes and comes back: what it said last stays in force, what it says then is followed.
func TestControlPlaneGoneAndBackUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	connected := func(want bool) {
		t.Helper()
		w.must(w.WaitStatus(w.ctx, "the control plane's state", func(s lab.Status) bool {
			return len(s.XDS.Servers) == 1 && s.XDS.Servers[0].Connected == want
		}))
	}
	for i := range times(2, 10) {
		w.control.Kill()
		connected(false)
		load.flow(10)
		before := w.status().Proxy.Generation
		w.routes(2 + i) // nobody hears it yet
		w.startControl()
		connected(true)
		w.must(w.WaitStatus(w.ctx, "the new routes", func(s lab.Status) bool { return s.Proxy.Generation > before }))
		load.flow(10)
	}
	w.judge("control plane gone and back", load.stop(nothing), 0)
	w.nothingLeaked("control plane gone and back")
}

// The folder of manifests goes and comes back, as an API server would: what it said last stays in force. (A real API
// server that is killed and comes back: tests/kube.)
func TestManifestsGoneAndBackUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 50*time.Millisecond)
	here, away := filepath.Join(w.Dir, "manifests"), filepath.Join(w.Dir, "manifests.away")
	for range times(1, 10) {
		w.must(os.Rename(here, away))
		load.flow(40)
		w.must(os.Rename(away, here))
		load.flow(20)
		if s := w.status(); s.Kubernetes.Services != 5 || s.Pods.Enrolled != 1 {
			t.Errorf("Kubernetes %+v, pods %+v", s.Kubernetes, s.Pods)
		}
	}
	late := service{"late", 99, tcpPort, echoPort}.spec(w.servers)
	w.must(w.SetService(late))
	w.must(w.WaitStatus(w.ctx, "what comes after is seen", func(s lab.Status) bool { return s.Kubernetes.Services == 6 }))
	w.must(w.DeleteService(late))
	w.judge("manifests gone and back", load.stop(nothing), 0)
	w.nothingLeaked("manifests gone and back")
}

// Every pod is deleted and made anew, servers as Kubernetes does it, clients in the middle of their traffic: who is left
// notices nothing, and nothing of those who went is left.
func TestEveryPodReplacedUnderMixedLoad(t *testing.T) {
	w := newTown(t, 10*time.Minute)
	load := w.load(w.client, 20*time.Millisecond)
	for range times(1, 10) {
		for i := range w.servers {
			w.replaceServer(i, load)
			load.flow(10)
		}
		next := w.pod("client", true)
		w.must(w.WaitStatus(w.ctx, "the new client is enrolled", func(s lab.Status) bool { return s.Pods.Enrolled == 2 }))
		nextLoad := w.load(next, load.pause)
		w.judge("servers deleted and made anew", load.soFar(nothing), 0)
		w.remove(w.client) // and its processes with it
		nextLoad.flow(20)
		w.client, load = next, nextLoad
	}
	w.judge("clients deleted beside it", load.stop(nothing), 0)
	w.nothingLeaked("every pod deleted and made anew")
}
