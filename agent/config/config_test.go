package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// load parses args, env and the file's text as the agent would.
func load(t *testing.T, args, env []string, file string) (Config, *Flags, error) {
	t.Helper()
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f := NewFlags(fs)
	if file != "" {
		path := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config="+path)
	}
	if err := fs.Parse(args); err != nil {
		return Config{}, f, err
	}
	c, err := f.Load(env)
	return c, f, err
}

func TestDefaultsAreThoseOfTheInterface(t *testing.T) {
	c, _, err := load(t, nil, []string{"NODE_NAME=n1"}, "")
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.NodeName = "n1"
	if c != want {
		t.Errorf("got %+v\nwant %+v", c, want)
	}
	if c.Enroll != "labelled" || c.FailMode != "open" || c.Acceleration != "auto" || !c.Services || c.AcceleratePods ||
		c.OriginalDstSockopt || c.BPFFS != "/sys/fs/bpf/sockmesh" || c.NetnsDir != "/var/run/netns" ||
		c.StateDir != "/var/lib/sockmesh" || c.Admin != "unix:///run/sockmesh/admin.sock" ||
		c.Metrics != "127.0.0.1:15090" || c.DrainTime != 30*time.Second {
		t.Errorf("a default differs from interfaces.md: %+v", c)
	}
}

func TestFlagWinsOverEnvironmentWinsOverFile(t *testing.T) {
	const file = "drain-time: 1s\nmanifests: /file\nxds: file:1\nacceleration: off\nservices: off\nlog-level: error\nconcurrency: 3\n"
	env := []string{"SOCKMESH_DRAIN_TIME=2s", "SOCKMESH_MANIFESTS=/env"}
	c, _, err := load(t, []string{"--drain-time=3s"}, env, file)
	if err != nil {
		t.Fatal(err)
	}
	if c.DrainTime != 3*time.Second {
		t.Errorf("drain-time %s: the flag must win", c.DrainTime)
	}
	if c.Manifests != "/env" {
		t.Errorf("manifests %q: the environment must win over the file", c.Manifests)
	}
	if c.XDS != "file:1" || c.Concurrency != 3 || c.LogLevel != slog.LevelError {
		t.Errorf("the file's values are missing: %+v", c)
	}
	if c.Acceleration != "off" || c.Services {
		t.Errorf("`off` in YAML must be the word, not a boolean: acceleration %q, services %v", c.Acceleration, c.Services)
	}
}

func TestConfigFileMayComeFromTheEnvironment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte("node-name: from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, _, err := load(t, nil, []string{"SOCKMESH_CONFIG=" + path, "NODE_NAME=fallback"}, "")
	if err != nil || c.NodeName != "from-file" {
		t.Errorf("node name %q, error %v", c.NodeName, err)
	}
}

func TestFlagGivenWithItsDefaultStillWins(t *testing.T) {
	c, _, err := load(t, []string{"--drain-time=30s"}, []string{"SOCKMESH_DRAIN_TIME=5s"}, "")
	if err != nil || c.DrainTime != 30*time.Second {
		t.Errorf("drain time %s, error %v", c.DrainTime, err)
	}
}

func TestWrongValuesNameThePlaceAndWhatWasExpected(t *testing.T) {
	for _, tt := range []struct {
		name      string
		args, env []string
		file      string
		want      []string
	}{
		{name: "flag", args: []string{"--enroll=some"}, want: []string{"--enroll", "all or labelled"}},
		{name: "number flag", args: []string{"--concurrency=x"}, want: []string{"--concurrency", `"x"`, "expected a whole number"}},
		{name: "duration flag", args: []string{"--drain-time=5"}, want: []string{"--drain-time", `"5"`, "expected a duration like 30s"}},
		{name: "ports flag", args: []string{"--nat-ports=1000"}, want: []string{"--nat-ports", `"1000"`, "expected a range of ports like 10000-29999"}},
		{name: "ports flag beyond", args: []string{"--nat-ports=1000-70000"}, want: []string{"--nat-ports", "expected a range of ports"}},
		{name: "external IPs flag", args: []string{"--external-ips="}, want: []string{"--external-ips", "expected all, own or none"}},
		{name: "environment", env: []string{"SOCKMESH_FAIL_MODE=ajar"}, want: []string{"SOCKMESH_FAIL_MODE", `"ajar"`, "open or closed"}},
		{name: "file choice", file: "services: on\nacceleration: fast\n", want: []string{":2: acceleration", `"fast"`, "auto or off"}},
		{name: "file unknown key", file: "drain-tme: 3s\n", want: []string{":1: drain-tme", "no setting has this name", "did you mean drain-time?"}},
		{name: "file duration", file: "drain-time: 5\n", want: []string{"drain-time", `"5"`, "duration like 30s"}},
		{name: "file number", file: "concurrency: many\n", want: []string{"concurrency", "whole number"}},
		{name: "file list", file: "manifests: [a, b]\n", want: []string{"manifests", "expected one value, found a list"}},
		{name: "file null", file: "manifests:\n", want: []string{"manifests", "remove the key"}},
		{name: "file twice", file: "manifests: a\nmanifests: b\n", want: []string{":2: manifests: set twice"}},
		{name: "file nested config", file: "config: /other\n", want: []string{"can't name another"}},
		{name: "file not a mapping", file: "- a\n", want: []string{":1: expected a mapping"}},
		{name: "file not YAML", file: "a: [\n", want: []string{"not YAML"}},
		{name: "file two documents", file: "xds: a:1\n---\nxds: b:2\n", want: []string{"one YAML document"}},
		{name: "two mistakes are both told", file: "foo: 1\nenroll: nobody\n", want: []string{"foo", "enroll"}},
		{name: "map size", args: []string{"--map-slots=-1"}, want: []string{"--map-slots", "whole number of entries"}},
		{name: "external IPs", args: []string{"--external-ips=mine"}, want: []string{"--external-ips", "all, own or none"}},
		{name: "missing file", args: []string{"--config=/nonexistent/x.yaml"}, want: []string{"--config", "/nonexistent/x.yaml"}},
		{name: "log level", args: []string{"--log-level=loud"}, want: []string{"debug, info, warn or error"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := load(t, tt.args, tt.env, tt.file)
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error does not say %q:\n%v", w, err)
				}
			}
		})
	}
}

func TestUnknownEnvironmentIsAWarning(t *testing.T) {
	_, f, err := load(t, nil, []string{"SOCKMESH_DRAIN_TIM=2s", "SOCKMESH_PORT_80_TCP=tcp://10.0.0.1:80", "SOCKMESH_SERVICE_HOST=10.0.0.1"}, "")
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Warnings) != 1 || !strings.Contains(f.Warnings[0], "did you mean SOCKMESH_DRAIN_TIME?") {
		t.Errorf("warnings %q", f.Warnings)
	}
}

func TestValidate(t *testing.T) {
	ok := Default()
	ok.Manifests = "/m"
	for _, tt := range []struct {
		name      string
		change    func(*Config)
		inCluster bool
		want      string // empty: valid
	}{
		{name: "manifests", change: func(*Config) {}},
		{name: "in cluster", change: func(c *Config) { c.Manifests = "" }, inCluster: true},
		{name: "both sources", change: func(c *Config) { c.Kubeconfig = "/k" }, want: "both set"},
		{name: "no source", change: func(c *Config) { c.Manifests = "" }, want: "--services=off"},
		{name: "static bootstrap only", change: func(c *Config) { c.Manifests, c.Services, c.Bootstrap = "", false, "/b" }},
		{name: "nothing to do", change: func(c *Config) { c.Manifests, c.Services = "", false }, want: "nothing to do"},
		{name: "admin over TCP", change: func(c *Config) { c.Admin = "127.0.0.1:1" }, want: "never served over TCP"},
		{name: "admin relative", change: func(c *Config) { c.Admin = "unix://a.sock" }, want: "absolute path"},
		{name: "admin too long", change: func(c *Config) { c.Admin = "unix:///" + strings.Repeat("a", 100) }, want: "bytes long"},
		{name: "metrics off", change: func(c *Config) { c.Metrics = "off" }},
		{name: "metrics", change: func(c *Config) { c.Metrics = "15090" }, want: "--metrics"},
		{name: "xds unix", change: func(c *Config) { c.XDS = "unix:///run/xds.sock" }},
		{name: "xds v6", change: func(c *Config) { c.XDS = "[::1]:18000" }},
		{name: "xds without port", change: func(c *Config) { c.XDS = "istiod" }, want: "--xds"},
		{name: "xds bad port", change: func(c *Config) { c.XDS = "istiod:99999" }, want: "1 to 65535"},
		{name: "bootstrap and xds", change: func(c *Config) { c.Bootstrap, c.XDS = "/b", "a:1" }, want: "shorthand"},
		{name: "api server", change: func(c *Config) { c.Manifests, c.Kubeconfig, c.APIServer = "", "/k", "https://10.0.0.1:6443" }},
		{name: "api server without scheme", change: func(c *Config) { c.Manifests, c.Kubeconfig, c.APIServer = "", "/k", "10.0.0.1:6443" }, want: "--api-server"},
		{name: "concurrency", change: func(c *Config) { c.Concurrency = 0 }, want: "--concurrency"},
		{name: "relative bpffs", change: func(c *Config) { c.BPFFS = "bpf" }, want: "--bpffs"},
		{name: "map of no entries", change: func(c *Config) { c.Maps.Frontends = 0 }, want: "--map-frontends: 0: expected a number of entries from 1 to"},
		{name: "map beyond measure", change: func(c *Config) { c.Maps.Slots = MaxMapSize + 1 }, want: "--map-slots"},
		{name: "sync time-out", change: func(c *Config) { c.SyncTimeout = 0 }, want: "--sync-timeout"},
		{name: "drift interval", change: func(c *Config) { c.DriftInterval = -1 }, want: "--drift-interval"},
		{name: "node port ranges", change: func(c *Config) { c.NodePortAddresses = "10.0.0.0/8,fd00::/8,loopback" }},
		{name: "node port range", change: func(c *Config) { c.NodePortAddresses = "10.0.0.0" }, want: "--nodeport-addresses"},
		{name: "node ports nowhere", change: func(c *Config) { c.NodePortAddresses = "" }, want: "--nodeport-addresses: \"\": an empty word"},
		{name: "node ports and an empty word", change: func(c *Config) { c.NodePortAddresses = "loopback,,primary" }, want: "or leave the flag out"},
		{name: "node ports by name", change: func(c *Config) { c.NodePortAddresses = "eth0" }, want: "--nodeport-addresses: \"eth0\" is none of"},
		{name: "no external IP policy", change: func(c *Config) { c.ExternalIPs = "" }, want: "--external-ips: expected all, own or none"},
		{name: "external IPs of a range", change: func(c *Config) { c.ExternalIPs = "10.0.0.0/8" }, want: "--external-ips"},
		{name: "devices", change: func(c *Config) { c.Devices = "eth0, bond*,en[po]*" }},
		{name: "no device", change: func(c *Config) { c.Devices = "" }, want: "--devices: an empty name matches no device: name devices"},
		{name: "a device that is empty", change: func(c *Config) { c.Devices = "eth0," }, want: "or leave the flag out (auto)"},
		{name: "a broken pattern", change: func(c *Config) { c.Devices = "eth[" }, want: "patterns like eth*"},
		{name: "a path", change: func(c *Config) { c.Devices = "/dev/eth0" }, want: "--devices: \"/dev/eth0\": expected names"},
		{name: "auto and a device", change: func(c *Config) { c.Devices = "auto,eth0" }, want: "can't stand beside names"},
		{name: "loopback", change: func(c *Config) { c.Devices = "lo" }, want: "--nodeport-addresses primary,loopback"},
		{name: "a name too long", change: func(c *Config) { c.Devices = "averylongdevicename" }, want: "more than 15 bytes"},
		{name: "NAT ports", change: func(c *Config) { c.NATPorts = [2]uint16{1024, 1024} }},
		{name: "NAT ports the wrong way round", change: func(c *Config) { c.NATPorts = [2]uint16{2000, 1000} }, want: "--nat-ports: 2000-1000: expected a range"},
		{name: "NAT port 0", change: func(c *Config) { c.NATPorts = [2]uint16{0, 1000} }, want: "--nat-ports"},
		{name: "silent for a second", change: func(c *Config) { c.NATEstablished = time.Second }, want: "--nat-established: 1s: expected a time from 1m"},
		{name: "silent for ever", change: func(c *Config) { c.NATEstablished = 1 << 62 }, want: "--nat-established"},
		{name: "kube-proxy's healthz", change: func(c *Config) { c.KubeProxyHealthz = "0.0.0.0:10256" }},
		{name: "kube-proxy's healthz without port", change: func(c *Config) { c.KubeProxyHealthz = "10256x" }, want: "--kube-proxy-healthz"},
		{name: "negative drain", change: func(c *Config) { c.DrainTime = -1 }, want: "--drain-time"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := ok
			tt.change(&c)
			err := c.Validate(tt.inCluster)
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("error %v, expected %q", err, tt.want)
			}
		})
	}
}

func TestUsageShowsEveryFlagOnceWithItsGroup(t *testing.T) {
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f := NewFlags(fs)
	var b strings.Builder
	f.WriteUsage(&b, 100)
	fs.VisitAll(func(fl *pflag.Flag) {
		if n := strings.Count(b.String(), "--"+fl.Name+" "); n < 1 {
			t.Errorf("--%s is not in the usage", fl.Name)
		}
	})
	if !strings.Contains(b.String(), "SOCKMESH_DRAIN_TIME") {
		t.Error("the usage does not mention the environment")
	}
}
