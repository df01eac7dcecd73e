package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// What the agent keeps while it runs: docs/security.md and deploy/daemonset.yaml name the same five.
const keptCapabilities = 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_BIND_SERVICE

// checkThreads reads every thread of the agent: exactly these capabilities in every set, and no way to others.
func checkThreads(t *testing.T, agent *lab.Process, when string) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", agent.PID()))
	if err != nil || len(threads) < 4 {
		t.Fatalf("threads of the agent: %v, %v", threads, err)
	}
	set := fmt.Sprintf("%016x", uint64(keptCapabilities))
	want := map[string]string{"CapPrm": set, "CapEff": set, "CapBnd": set, "CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1"}
	for _, file := range threads {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(text)) {
			field, value, _ := strings.Cut(line, ":")
			if w, ok := want[field]; ok && strings.TrimSpace(value) != w {
				t.Errorf("%s: %s: %s is %s, want %s", when, file, field, strings.TrimSpace(value), w)
			}
		}
	}
}

// proxied asks the shop from the pod, on every address, and fails unless the proxy answered.
func (w *world) proxied(from *lab.Pod) error {
	for i := range w.shop.ClusterIPs {
		c, err := w.tryCurl(from, w.shop.VIP(i), 10)
		if err != nil {
			return err
		}
		me := from.Addr4().String()
		if c["v1/proxied "+me]+c["v2/proxied "+me] != 10 {
			return fmt.Errorf("%s: answers %v", w.shop.VIP(i), c)
		}
	}
	return nil
}

// Started as root with everything, the agent keeps five capabilities on every thread, and with them does all of its
// work: the main job, a pod that appears later, a repair of its maps, a listener of the node on port 80, an upgrade.
func TestPrivilegesAreDroppedAndEverythingWorks(t *testing.T) {
	w := newWorld(t, anywhere)
	checkThreads(t, w.agent, "after the start")
	w.must(w.proxied(w.client))

	late := w.pod(anywhere, "late", 50, enrolled)
	w.eventually("a pod that appears later goes through the proxy", func() error { return w.proxied(late) })

	w.must(w.WriteText("xds", "ingress.yaml", ingressOnPort80))
	w.eventually("a listener of the node on port 80", func() error {
		c, err := w.Node.Dial(w.ctx, "tcp", "127.0.0.1:80")
		if err == nil {
			c.Close()
		}
		return err
	})

	dir := filepath.Join(w.BPFFS(), "v*", "maps", "sm_backends")
	pins, err := filepath.Glob(dir)
	if err != nil || len(pins) != 1 {
		t.Fatalf("%s: %v, %v", dir, pins, err)
	}
	backends, err := ebpf.LoadPinnedMap(pins[0], nil)
	w.must(err)
	defer backends.Close()
	var key uint32
	w.must(backends.NextKey(nil, &key))
	w.must(backends.Delete(key))
	w.eventually("the deleted backend is written again", func() error {
		value := make([]byte, backends.ValueSize())
		return backends.Lookup(key, &value)
	})

	next, err := w.StartAgentNoWait()
	w.must(err)
	w.eventually("the next agent takes over", func() error {
		if !strings.Contains(w.agent.Output(), "another agent has taken over") {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	w.must(w.agent.Stop(40 * time.Second))
	w.agent = next
	w.must(w.WaitReady(w.ctx, next))
	w.eventually("the next agent serves both pods", func() error {
		if err := w.proxied(w.client); err != nil {
			return err
		}
		return w.proxied(late)
	})
	checkThreads(t, next, "after an upgrade and all its work")
}

// As deploy/daemonset.yaml starts it: five capabilities, without CAP_SETPCAP, no_new_privs set by the runtime.
func TestTheAgentWorksInTheDaemonSetsSecurityContext(t *testing.T) {
	w := newBareWorld(t, anywhere)
	var err error
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
	w.agent, err = w.Node.Start("sockmesh-agent", append([]string{"setpriv", "--no-new-privs", "--inh-caps", "-all",
		"--bounding-set", "-all,+bpf,+perfmon,+net_admin,+sys_admin,+net_bind_service"}, w.AgentCommand()...)...)
	w.must(err)
	w.must(w.WaitReady(w.ctx, w.agent))
	w.eventually("the pod goes through the proxy", func() error { return w.proxied(w.client) })
	late := w.pod(anywhere, "late", 50, enrolled)
	w.eventually("so does one that comes later", func() error { return w.proxied(late) })
	checkThreads(t, w.agent, "in the DaemonSet's context")
}

// More than it needs, and no way to give it up: that is an error with its cause and its cure, before anything is attached.
func TestPrivilegesThatCannotBeDroppedAreAnError(t *testing.T) {
	w := newBareWorld(t, anywhere)
	start := func(flags ...string) *lab.Process {
		agent, err := w.Node.Start("sockmesh-agent", append([]string{"setpriv", "--inh-caps", "-all", "--bounding-set", "-setpcap"}, w.AgentCommand(flags...)...)...)
		w.must(err)
		return agent
	}
	agent := start()
	select {
	case <-agent.Done():
	case <-w.ctx.Done():
		t.Fatal("the agent runs with privileges that it could not drop")
	}
	for _, word := range []string{"bounding set", "CAP_SETPCAP", "--drop-privileges=off"} {
		if !strings.Contains(agent.Output(), word) {
			t.Errorf("the message does not say %q: %s", word, agent.Output())
		}
	}
	var err error
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
	w.agent = start("--drop-privileges=off")
	w.must(w.WaitReady(w.ctx, w.agent))
	w.eventually("switched off, the agent works with everything", func() error { return w.proxied(w.client) })
}

const ingressOnPort80 = `
"@type": type.googleapis.com/envoy.config.listener.v3.Listener
name: ingress
address: {socket_address: {address: 127.0.0.1, port_value: 80}}
filter_chains:
- filters:
  - name: tcp
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
      stat_prefix: ingress
      cluster: v1
`
