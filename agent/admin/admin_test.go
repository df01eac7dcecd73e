package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/agent/admin"
	"github.com/sockmesh/sockmesh/agent/admin/admintest"
	"github.com/sockmesh/sockmesh/agent/api"
)

// serve starts the API on a socket of its own.
func serve(t *testing.T, src admin.Source) (path string, server *admin.Server) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "a.sock")
	server, err := admin.Listen(path, admin.Handler(src), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close(context.Background()) })
	return path, server
}

func client(t *testing.T, path string) *api.Client {
	t.Helper()
	c, err := api.NewClient("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestEveryListIsAListEvenIfEmpty(t *testing.T) {
	path, _ := serve(t, &admintest.Source{})
	c := client(t, path)
	for _, p := range []string{"/pods", "/services", "/listeners", "/routes", "/clusters", "/endpoints", "/sockets", "/maps"} {
		b, err := c.Get(t.Context(), p)
		if err != nil || strings.TrimSpace(string(b)) != "[]" {
			t.Errorf("%s: %q, %v", p, b, err)
		}
	}
}

func TestStatusHasTheKeysOfTheInterface(t *testing.T) {
	path, _ := serve(t, &admintest.Source{})
	b, err := client(t, path).Get(t.Context(), "/status")
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	for key, inner := range map[string]string{
		"node": "", "version": "", "ready": "", "not_ready_reasons": "",
		"acceleration": "mode active reason pairs redirected_bytes passed_bytes probes",
		"datapath":     "programs maps", "kubernetes": "source synced services endpoints pods",
		"xds": "servers resources rejected ignored", "pods": "local enrolled",
		"connections": "proxied offloaded service passed refused",
	} {
		v, ok := got[key]
		if !ok {
			t.Errorf("no key %q", key)
			continue
		}
		for _, k := range strings.Fields(inner) {
			if _, ok := v.(map[string]any)[k]; !ok {
				t.Errorf("no key %s.%s", key, k)
			}
		}
	}
}

func TestErrorsHaveTheirStatus(t *testing.T) {
	src := &admintest.Source{Level: "info", MapDumps: map[string]api.MapDump{"sm_netns": {Map: api.Map{Name: "sm_netns"}}},
		ServiceList: []api.Service{{Namespace: "a", Name: "x"}, {Namespace: "b", Name: "x"}},
		ExplainFunc: func(r api.ExplainRequest) (api.Explanation, error) {
			return api.Explanation{}, fmt.Errorf("from: %w", admin.ErrBadRequest)
		}}
	path, _ := serve(t, src)
	hc := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	defer hc.CloseIdleConnections()
	for _, tt := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/", "", 200, "/explain"},
		{"GET", "/nothing", "", 404, "GET / lists the paths"},
		{"DELETE", "/status", "", 404, ""},
		{"GET", "/maps/sm_netns", "", 200, "sm_netns"},
		{"GET", "/maps/other", "", 404, "other"},
		{"GET", "/services?name=x", "", 200, `"namespace":"b"`},
		{"GET", "/services?name=a/x", "", 200, `"namespace":"a"`},
		{"GET", "/services?name=c/x", "", 404, "c/x"},
		{"POST", "/explain", `{"from":"a/b"}`, 400, "from"},
		{"POST", "/explain", `{"form":"a/b"}`, 400, "form"},
		{"POST", "/explain", `nonsense`, 400, "JSON"},
		{"POST", "/logging", `{"level":"loud"}`, 400, "debug, info, warn or error"},
		{"POST", "/logging", `{"level":"debug"}`, 200, "debug"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://agent"+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		_, _ = fmt.Fprint(&b, readAll(t, resp))
		if resp.StatusCode != tt.status || !strings.Contains(b.String(), tt.want) {
			t.Errorf("%s %s %s: %d %s, expected %d and %q", tt.method, tt.path, tt.body, resp.StatusCode, b.String(), tt.status, tt.want)
		}
	}
	if src.Level != "debug" {
		t.Error("the log level was not changed")
	}
}

func readAll(t *testing.T, r *http.Response) string {
	t.Helper()
	defer r.Body.Close()
	var b strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := r.Body.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			return b.String()
		}
	}
}

func TestSocketIsPrivateFromItsFirstMoment(t *testing.T) {
	path, _ := serve(t, &admintest.Source{})
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestANewAgentTakesTheNameOverAndTheOldOneLeavesItAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	start := func(node string) *admin.Server {
		s, err := admin.Listen(path, admin.Handler(&admintest.Source{StatusValue: api.Status{Node: node}}), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	who := func() string {
		c, err := api.NewClient("unix://" + path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		b, err := c.Get(t.Context(), "/status")
		if err != nil {
			t.Fatal(err)
		}
		var s api.Status
		if err := json.Unmarshal(b, &s); err != nil {
			t.Fatal(err)
		}
		return s.Node
	}
	old := start("old")
	if who() != "old" {
		t.Fatal("the first agent does not answer")
	}
	next := start("new")
	if who() != "new" {
		t.Error("the second agent must take the name over")
	}
	if err := old.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if who() != "new" {
		t.Error("the first agent's end must not take the second one's socket away")
	}
	if err := next.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left over: %v", err)
	}
}

func TestStuckClientsDelayNobody(t *testing.T) {
	path, _ := serve(t, &admintest.Source{StatusValue: api.Status{Node: "n"}})
	for range 16 { // connected, half a request, then silence
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = c.Write([]byte("GET /status HTTP/1.1\r\nHos"))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := client(t, path).Get(ctx, "/status"); err != nil {
		t.Error(err)
	}
}

// A successor that dies leaves a socket behind that leads to nobody: the agent that it had taken the name from can have it
// back, and keeps no second socket.
func TestAnAbandonedNameIsTakenBack(t *testing.T) {
	path, server := serve(t, &admintest.Source{})
	if server.Replaced() || server.Abandoned() {
		t.Fatal("the name is its own")
	}
	for range 3 {
		next, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + ".next", Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		next.SetUnlinkOnClose(false)
		if err := os.Rename(path+".next", path); err != nil {
			t.Fatal(err)
		}
		if !server.Replaced() || server.Abandoned() {
			t.Error("the name is another agent's, which lives")
		}
		next.Close()
		if !server.Abandoned() {
			t.Error("nobody is there")
		}
		if err := server.TakeName(); err != nil {
			t.Fatal(err)
		}
		if server.Replaced() || server.Abandoned() {
			t.Error("the name has not been taken back")
		}
		if _, err := client(t, path).Get(t.Context(), "/status"); err != nil {
			t.Error(err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if !server.Abandoned() || server.TakeName() != nil || server.Abandoned() {
		t.Error("a name that was removed is not taken back")
	}
}

func TestClientSaysWhatIsWrongWithTheSocket(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(dir, "left.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for path, want := range map[string]string{filepath.Join(dir, "none.sock"): "start sockmesh-agent", left: "left over", file: "--admin"} {
		c, err := api.NewClient("unix://" + path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Get(t.Context(), "/status"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, expected %q", path, err, want)
		}
	}
	if _, err := api.NewClient("localhost:80"); err == nil {
		t.Error("TCP must be refused")
	}
}
