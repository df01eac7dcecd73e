package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func invoke(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = cli.Run(t.Context(), newRootCommand(), args, &o, &e)
	return code, o.String(), e.String()
}

func TestHelpIsGroupedAndComplete(t *testing.T) {
	code, out, _ := invoke(t, "--help")
	if code != 0 {
		t.Fatalf("exit code %d", code)
	}
	for _, want := range []string{"Sources:", "Traffic:", "Machine:", "Observing:", "cleanup", "--drain-time", "SOCKMESH_DRAIN_TIME"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the help", want)
		}
	}
	// interfaces.md's flags, all of them.
	for _, flag := range strings.Fields("node-name kubeconfig manifests bootstrap xds enroll fail-mode acceleration original-dst-sockopt " +
		"accelerate-pods services concurrency cgroup-root bpffs netns-dir state-dir admin metrics drain-time log-level log-format config") {
		if !strings.Contains(out, "--"+flag+" ") {
			t.Errorf("no --%s in the help", flag)
		}
	}
}

func TestWrongUsageEndsWithTwo(t *testing.T) {
	if config.InCluster() {
		t.Skip("in a pod")
	}
	for args, want := range map[string]string{
		"":                                     "--manifests DIR",
		"--enroll=some --manifests=/m":         "all or labelled",
		"--manifests=/m --kubeconfig=/k":       "both set",
		"--manifests=/m --admin=tcp://1.2.3.4": "never served over TCP",
		"--manifests=/m extra":                 "extra",
		"cleenup":                              "cleanup",
		"mount-bpffs":                          "accepts 1 arg",
	} {
		code, _, errOut := invoke(t, strings.Fields(args)...)
		if code != cli.ExitUsage || !strings.Contains(errOut, want) {
			t.Errorf("%q: exit code %d, %q; expected 2 and %q", args, code, errOut, want)
		}
	}
}

func TestVersionAndCompletion(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"--version"}} {
		if code, out, _ := invoke(t, args...); code != 0 || !strings.HasPrefix(out, "sockmesh-agent ") {
			t.Errorf("%v: %d %q", args, code, out)
		}
	}
	if code, out, _ := invoke(t, "completion", "zsh"); code != 0 || !strings.Contains(out, "sockmesh-agent") {
		t.Errorf("completion: %d", code)
	}
}
