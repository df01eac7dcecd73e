package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/sockmesh/sockmesh/agent/admin"
	"github.com/sockmesh/sockmesh/agent/admin/admintest"
	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

var update = flag.Bool("update", false, "rewrite testdata/*.txt from what is printed now")

// node is an agent with a bit of everything.
func node() *admintest.Source {
	return &admintest.Source{
		Level: "info", ConfigDumpJSON: `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.ListenersConfigDump"}]}`,
		StatusValue: api.Status{
			Node: "node-1", Version: "v0.1.0", NotReadyReasons: []string{"canary: connection refused"}, UptimeSeconds: 93,
			Acceleration: api.Acceleration{Mode: "auto", Active: true, Pairs: 2, RedirectedBytes: 3 << 20, PassedBytes: 100,
				Probes: []api.Probe{{Name: "sk_msg", OK: true}, {Name: "fionread", Detail: "misreports plain data on this kernel"}}},
			Datapath: api.Datapath{Programs: []api.Program{{Name: "sm_connect4", Attach: "cgroup/connect4", ID: 7}},
				Maps:    []api.Map{{Name: "sm_backends", Entries: 95, MaxEntries: 100}, {Name: "sm_netns", Entries: 1, MaxEntries: 4096}},
				Waiting: []string{"claims"}, TimedOut: true, DriftRepaired: 2,
				Warnings: []string{"sm_backends is 95% full (95 of 100 entries): entries that don't fit are refused, what is there keeps working: raise --map-backends"}},
			Kubernetes: api.Kubernetes{Source: "/manifests", Synced: true, Services: 2, Endpoints: 3, Pods: 4, Errors: []string{"web.yaml: document 2: spec.ports: none"}},
			XDS: api.XDS{Servers: []api.XDSServer{{Name: "127.0.0.1:18000", Stream: "ads", Delta: true, LastError: "connection refused"}}, Resources: api.XDSResources{Listener: 2, Route: 1, Cluster: 3, Endpoint: 3},
				Rejected: []api.RejectedItem{{Type: "listener", Name: "bad", Error: "filter_chains[0]: no filters", InForce: true}},
				Ignored:  []api.IgnoredItem{{Type: "cluster", Name: "v1", Field: "outlier_detection"}}, Warming: map[string]string{"cluster v2": "endpoints"}},
			Pods: api.PodCounts{Local: 4, Enrolled: 2}, Connections: api.Connections{Proxied: 10, Offloaded: 5, Service: 7, Passed: 3, Refused: 1, FailedOpen: 2},
			Proxy: api.Proxy{Loops: 2, Connections: 3, Accepted: 1234, Refused: 1, Generation: 9, Listeners: []api.NodeListener{{Name: "edge", Address: "0.0.0.0:80", Error: "address already in use"}}}, Canary: api.Canary{Error: "connection refused"},
			Outside: api.Outside{Active: true, Devices: []api.Device{{Name: "eth0", Mode: "tcx", Clients: true}, {Name: "veth1", Mode: "tcx"}}, Connections: 4, Accepted: 90, Refused: 1, Denied: 2, NoPort: 3},
		},
		PodList: []api.Pod{
			{Namespace: "shop", Name: "client", IPs: []string{"10.0.0.1", "fd00::1"}, Enrolled: true, State: "ready", Netns: "cni-1", Rule: "namespace label sockmesh.io/enroll=true"},
			{Namespace: "shop", Name: "late", State: "waiting", Reason: "no network namespace has its address", Rule: "--enroll=labelled, and no label"},
		},
		ServiceList: []api.Service{{Namespace: "shop", Name: "web", InternalTrafficPolicy: "Cluster", ExternalTrafficPolicy: "Local",
			Problems: []string{"spec.ports[1].protocol: SCTP is not supported"},
			Frontends: []api.Frontend{{Address: "10.96.0.10:80", Protocol: "TCP", Kind: "ClusterIP", Port: "http", Listener: "web", AffinitySeconds: 60, Backends: []api.Backend{
				{Address: "10.0.1.1:8080", Pod: "shop/v1", Node: "node-1", Local: true}, {Address: "10.0.9.1:8080", Node: "node-2", Zone: "b"}}},
				{Address: "203.0.113.1:80", Protocol: "TCP", Kind: "LoadBalancer", Port: "http", Backends: []api.Backend{{Address: "10.0.1.1:8080"}, {Address: "10.0.9.1:8080"}},
					External: &api.External{Policy: "Local", Backends: []string{"10.0.1.1:8080"}, Without: "no answer", Sources: []string{"198.18.0.0/15"}}},
				{Address: "127.0.0.1:30080", Protocol: "TCP", Kind: "NodePort", Port: "http", Loopback: true, Backends: []api.Backend{{Address: "10.0.1.1:8080"}}},
				{Address: "[fd00::10]:80", Protocol: "TCP", Kind: "ClusterIP", Port: "http"}},
			Endpoints: []api.ServiceEndpoint{
				{Address: "10.0.1.1:8080", State: "ready", Used: true, Local: true, Pod: "shop/v1", Node: "node-1"},
				{Address: "10.0.1.2:8080", State: "draining", Reason: "terminating, and there are ready ones", Local: true, Pod: "shop/v0", Node: "node-1"},
				{Address: "10.0.9.1:8080", State: "ready", Used: true, Node: "node-2", Zone: "b"}},
			HealthCheck: &api.HealthCheck{Port: 31000, LocalReady4: 1, Addresses: []string{"192.0.2.1:31000"}},
			Excluded:    []api.Excluded{{Address: "10.0.1.2:8080", Reason: "terminating, and there are ready ones"}}}},
		ListenerList: []api.Listener{
			{Name: "db", Addresses: []string{"10.96.0.20:5432"}, Mode: "kernel", Chains: []api.FilterChain{{Kind: "tcp", Targets: "75% db1, 25% db2"}}},
			{Name: "web", Addresses: []string{"10.96.0.10:80", "[fd00::10]:80"}, Mode: "proxy", Reason: "filter_chains: http", Chains: []api.FilterChain{{Kind: "http", Routes: "web"}}},
		},
		RouteList:    []api.Route{{Config: "web", Host: "web", Domains: []string{"*"}, Index: 0, Match: `prefix "/"`, Action: "90% v1, 10% v2"}},
		ClusterList:  []api.Cluster{{Name: "v1", Discovery: "EDS", Policy: "ROUND_ROBIN", Endpoints: 3, Usable: 2, TimeoutMS: 5000, Version: "4"}},
		EndpointList: []api.Endpoint{{Cluster: "v1", Address: "10.0.1.1:8080", Health: "HEALTHY", Weight: 1, Pod: "shop/v1"}},
		SocketList: []api.Socket{{Cookie: 5, Pod: "shop/client", Role: "client", Local: "127.0.0.1:40000", Remote: "127.0.0.1:15001", Origin: "10.96.0.10:80",
			Redirects: true, State: "enrolled", Redirected: 2048}, {Pod: "shop/old", Role: "client", Local: "127.0.0.1:40001", Remote: "127.0.0.1:15001", State: "plain", Reason: "blocking socket", Passed: 10}},
		MapList: []api.Map{{Name: "sm_netns", ID: 4, Type: "hash", Entries: 2, MaxEntries: 4096}},
		MapDumps: map[string]api.MapDump{"sm_netns": {Map: api.Map{Name: "sm_netns"}, Dump: []api.MapEntry{
			{Key: json.RawMessage(`{"cookie":77}`), Value: json.RawMessage(`{"flags":1,"name":"x"}`)}}}},
		ExplainFunc: func(r api.ExplainRequest) (api.Explanation, error) {
			return api.Explanation{From: r.From, Target: r.URL, Outcome: "proxied", Verdict: r.Method + " is forwarded", Steps: []api.Step{
				{Stage: "pod", Result: r.From, Rule: "its addresses: 10.0.0.1"},
				{Stage: "route", Result: "route 1", Rule: `prefix "/"`, Rejected: []string{`route 0: header x-canary exact "always": it is "` + r.Headers[0][1] + `"`}},
			}, Destinations: []api.Destination{{Cluster: "v1", Address: "10.0.1.1:8080", Percent: 66.66667, Health: "HEALTHY", Pod: "shop/v1"}}}, nil
		},
	}
}

// run executes the command against src and returns what it printed.
func run(t *testing.T, src admin.Source, args ...string) (code int, out, errOut string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.sock")
	if src != nil {
		s, err := admin.Listen(path, admin.Handler(src), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close(context.Background())
	}
	var o, e bytes.Buffer
	code = cli.Run(t.Context(), newRootCommand(), append(args, "--admin", "unix://"+path), &o, &e)
	return code, o.String(), e.String()
}

func TestTables(t *testing.T) {
	for name, args := range map[string][]string{
		"status": {"status"}, "pods": {"pods"}, "services": {"services"}, "service": {"services", "shop/web"}, "listeners": {"listeners"},
		"routes": {"routes"}, "clusters": {"clusters"}, "endpoints": {"endpoints"}, "sockets": {"sockets"}, "maps": {"maps"},
		"maps-dump": {"maps", "dump", "sm_netns"}, "config-dump": {"config", "dump"}, "logging": {"logging"},
		"explain": {"explain", "--from", "shop/client", "http://web/", "-H", "X-Canary: no", "-X", "POST"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := run(t, node(), args...)
			if code != 0 || errOut != "" {
				t.Fatalf("exit code %d, %s", code, errOut)
			}
			golden := filepath.Join("testdata", name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(out), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if out != string(want) {
				t.Errorf("got:\n%s\nwant (%s, -update rewrites it):\n%s", out, golden, want)
			}
		})
	}
}

func TestJSONAndYAMLAreTheAgentsAnswer(t *testing.T) {
	for _, args := range [][]string{{"status"}, {"pods"}, {"services"}, {"listeners"}, {"routes"}, {"clusters"}, {"endpoints"}, {"sockets"}, {"maps"}, {"maps", "dump", "sm_netns"}, {"config", "dump"}} {
		_, j, _ := run(t, node(), append(args, "-o", "json")...)
		_, y, _ := run(t, node(), append(args, "-o", "yaml")...)
		var fromJSON, fromYAML any
		if err := json.Unmarshal([]byte(j), &fromJSON); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, j)
		}
		if err := yaml.Unmarshal([]byte(y), &fromYAML); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, y)
		}
		a, _ := json.Marshal(fromJSON)
		b, _ := json.Marshal(fromYAML)
		if !bytes.Equal(a, b) {
			t.Errorf("%v: json and yaml differ:\n%s\n%s", args, a, b)
		}
	}
}

func TestEmptyListsSaySo(t *testing.T) {
	for _, args := range [][]string{{"pods"}, {"services"}, {"listeners"}, {"routes"}, {"clusters"}, {"endpoints"}, {"sockets"}, {"maps"}} {
		_, out, _ := run(t, &admintest.Source{}, args...)
		if !strings.HasPrefix(out, "No ") {
			t.Errorf("%v: %q", args, out)
		}
	}
}

func TestExitCodesAndMessages(t *testing.T) {
	for _, tt := range []struct {
		name  string
		agent bool
		args  []string
		code  int
		want  string
	}{
		{"no agent", false, []string{"status"}, 1, "start sockmesh-agent"},
		{"unknown command", true, []string{"statsu"}, 2, "did you mean status"},
		{"unknown flag", true, []string{"status", "--nope"}, 2, "--nope"},
		{"unknown format", true, []string{"status", "-o", "xml"}, 2, "table, json or yaml"},
		{"too many arguments", true, []string{"pods", "x"}, 2, `unexpected argument "x"`},
		{"unknown subcommand", true, []string{"maps", "dmp"}, 2, "dmp"},
		{"missing argument", true, []string{"maps", "dump"}, 2, "accepts 1 arg"},
		{"unknown map", true, []string{"maps", "dump", "other"}, 1, "other"},
		{"unknown Service", true, []string{"services", "nope"}, 1, "nope"},
		{"explain without a pod", true, []string{"explain", "tcp://1.2.3.4:5"}, 2, "--from"},
		{"explain with a bad header", true, []string{"explain", "--from", "a/b", "http://x/", "-H", "novalue"}, 2, "name: value"},
		{"explain with a scheme that is not one", true, []string{"explain", "--from", "a/b", "gopher://x:70/"}, 2, "expected tcp, udp or http"},
		{"bad level", true, []string{"logging", "loud"}, 2, "debug, info, warn or error"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var src admin.Source
			if tt.agent {
				src = node()
			}
			code, out, errOut := run(t, src, tt.args...)
			if code != tt.code || !strings.Contains(errOut, tt.want) || out != "" {
				t.Errorf("exit code %d, stdout %q, stderr %q; expected %d and %q", code, out, errOut, tt.code, tt.want)
			}
		})
	}
}

func TestLogLevelIsChanged(t *testing.T) {
	src := node()
	if code, out, _ := run(t, src, "logging", "debug"); code != 0 || out != "debug\n" || src.Level != "debug" {
		t.Errorf("%d %q %q", code, out, src.Level)
	}
}

func TestVersionNeedsNoAgent(t *testing.T) {
	code, out, _ := run(t, nil, "version")
	if code != 0 || !strings.HasPrefix(out, "sockmesh ") || strings.Contains(out, "agent") {
		t.Errorf("%d %q", code, out)
	}
	if _, out, _ := run(t, node(), "version"); !strings.Contains(out, "agent    v0.1.0") {
		t.Errorf("%q", out)
	}
}

func TestEveryCommandHasHelp(t *testing.T) {
	for _, c := range newRootCommand().Commands() {
		if c.Short == "" {
			t.Errorf("%s has no description", c.Name())
		}
	}
	if code, out, _ := run(t, nil, "--help"); code != 0 || !strings.Contains(out, "What is there:") {
		t.Errorf("%d %s", code, out)
	}
	if code, out, _ := run(t, nil, "completion", "bash"); code != 0 || !strings.Contains(out, "sockmesh") {
		t.Errorf("completion: %d", code)
	}
}

func TestValidateSaysWhatWouldBeRefused(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "web.clusters.yaml"), filepath.Join(dir, "bad.listeners.yaml")
	for path, text := range map[string]string{
		good: "name: web\ntype: STATIC\nload_assignment: {cluster_name: web}\n",
		bad:  "name: l\naddress: {socket_address: {address: 10.0.0.1, port_value: 80}}\nfilter_chains: [{filters: [{name: no.such.filter}]}]\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if code, out, errOut := run(t, nil, "validate", good); code != 0 || !strings.Contains(out, "1 accepted, 0 refused") {
		t.Errorf("%d %q %q", code, out, errOut)
	}
	code, out, _ := run(t, nil, "validate", good, bad)
	if code != 1 || !strings.Contains(out, "no.such.filter") || !strings.Contains(out, "filter_chains[0].filters[0]") || !strings.Contains(out, "1 accepted, 1 refused") {
		t.Errorf("%d %q", code, out)
	}
	if code, out, _ := run(t, nil, "validate", bad, "-o", "json"); code != 1 || !json.Valid([]byte(out)) {
		t.Errorf("%d %q", code, out)
	}
}
