package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// docs/security.md makes claims about what a pod can't do; these tests prove them on real pods.

// squatIfAsked is a hostile process in a pod, run as `EXE squat ADDR...`: it listens there, with every option that helps to get
// in, and says who connects.
func squatIfAsked() {
	if len(os.Args) < 3 || os.Args[1] != "squat" {
		return
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		e := c.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
		})
		return errors.Join(e, err)
	}}
	lc.SetMultipathTCP(false)
	for _, addr := range os.Args[2:] {
		l, err := lc.Listen(context.Background(), "tcp", addr)
		if err != nil {
			fmt.Println("refused", err)
			os.Exit(3)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Println("got", c.RemoteAddr())
				c.Close()
			}
		}()
	}
	fmt.Println("listening")
	select {}
}

// squat starts the hostile process in the pod as that user, on both families, and waits until it listens or has failed.
func (w *world) squat(pod *lab.Pod, uid int) *lab.Process {
	w.t.Helper()
	exe, err := os.Executable()
	w.must(err)
	copied := filepath.Join(w.Dir, "squat") // where every user can execute it
	if _, err := os.Stat(copied); err != nil {
		text, err := os.ReadFile(exe)
		w.must(err)
		w.must(os.WriteFile(copied, text, 0o755))
		w.must(os.Chmod(w.Dir, 0o755))
	}
	p, err := pod.Start("squat", "setpriv", fmt.Sprintf("--reuid=%d", uid), "--clear-groups", copied, "squat", "127.0.0.1:15001", "[::1]:15001")
	w.must(err)
	w.eventually("the hostile process listens or has failed", func() error {
		if !strings.Contains(p.Output(), "listening") && !strings.Contains(p.Output(), "refused") {
			return fmt.Errorf("it said %q", p.Output())
		}
		return nil
	})
	return p
}

// unreachable asks an address by curl from the pod and fails the test if anybody answers.
func (w *world) unreachable(from *lab.Pod, url string, status ...int) {
	w.t.Helper()
	_, err := from.Run(w.ctx, "curl", "-sS", "-g", "-m", "10", url)
	for _, s := range status {
		if err != nil && strings.Contains(err.Error(), fmt.Sprintf("exit status %d", s)) {
			return
		}
	}
	w.t.Errorf("%s from %s: %v; want curl's exit status %v", url, from.Place.Name, err, status)
}

// listeners are the local addresses of the agent's listening TCP sockets in the network namespace of a place.
func (w *world) listeners(place *lab.Place) []string {
	w.t.Helper()
	own := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", w.agent.PID()))
	w.must(err)
	socket := regexp.MustCompile(`^socket:\[(\d+)\]$`)
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil {
			if m := socket.FindStringSubmatch(to); m != nil {
				own[m[1]] = true
			}
		}
	}
	var found []string
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		text, err := place.Run(w.ctx, "cat", file)
		w.must(err)
		for line := range strings.Lines(text) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" && own[f[9]] {
				found = append(found, parseProcAddr(f[1]))
			}
		}
	}
	return found
}

// parseProcAddr reads the kernel's 0100007F:3A99.
func parseProcAddr(s string) string {
	hex, port, _ := strings.Cut(s, ":")
	var b []byte
	for i := 0; i+8 <= len(hex); i += 8 {
		word, _ := strconv.ParseUint(hex[i:i+8], 16, 32)
		b = append(b, byte(word), byte(word>>8), byte(word>>16), byte(word>>24))
	}
	addr, _ := netip.AddrFromSlice(b)
	n, _ := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(addr, uint16(n)).String()
}

// A pod can't reach the admin API, which is on no address at all, nor the metrics, which are on the node's loopback. In a
// pod the agent listens on the pod's loopback alone. A user other than root can't open the admin socket, not even when its
// mode was widened.
func TestAPodCannotReachTheAgent(t *testing.T) {
	w := newWorld(t, anywhere)
	if got := w.listeners(w.Node); len(got) != 1 || got[0] != "127.0.0.1:15090" {
		t.Errorf("on the node the agent listens on %v; want the metrics on loopback and nothing else", got)
	}
	if got := w.listeners(&w.client.Place); len(got) != 2 || got[0] != "127.0.0.1:15001" || got[1] != "[::1]:15001" {
		t.Errorf("in an enrolled pod the agent listens on %v", got)
	}
	if got := w.listeners(&w.v1.Place); len(got) != 0 {
		t.Errorf("in a pod that is not enrolled the agent listens on %v", got)
	}
	for _, host := range []string{"127.0.0.1", "[::1]", "10.77.0.1", "[fd77::1]"} {
		w.unreachable(w.client, "http://"+host+":15090/metrics", 7)
	}
	socket := strings.TrimPrefix(w.Admin(), "unix://")
	st, err := os.Stat(socket)
	w.must(err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("the admin socket has the mode %v", st.Mode().Perm())
	}
	w.must(os.Chmod(w.Dir, 0o755))
	ask := func(uid int) error {
		_, err := w.Node.Run(w.ctx, "setpriv", fmt.Sprintf("--reuid=%d", uid), "--clear-groups", "curl", "-sS", "-f", "--unix-socket", socket, "http://agent/status")
		return err
	}
	w.must(ask(0))
	if ask(65534) == nil {
		t.Error("another user has used the admin API")
	}
	w.must(os.Chmod(socket, 0o666))
	if ask(65534) == nil {
		t.Error("another user has used the admin API of a socket whose mode was widened")
	}
}

// Dialling the proxy's port directly leads nowhere: without a destination that the hooks wrote down the connection is
// closed and counted. From another pod the port does not exist.
func TestTheProxysPortIsOfNoUseToWhoeverDialsIt(t *testing.T) {
	w := newWorld(t, anywhere)
	other := w.pod(anywhere, "other", 30, enrolled)
	w.eventually("both pods are served", func() error { return errors.Join(w.proxied(w.client), w.proxied(other)) })
	refused := func() float64 { return w.metric(`sockmesh_proxy_refused_connections_total{reason="no_original_dst"}`) }
	before := refused()
	// Root of the pod, with every capability over its namespace: plainly, by a mapped address, and by a packet filter that
	// sends connections for elsewhere to the port.
	direct := []string{"127.0.0.1:15001", "[::1]:15001", "[::ffff:127.0.0.1]:15001"}
	for _, host := range direct {
		// 7: reset before curl has looked, 52: an empty answer, 56: reset while reading.
		w.unreachable(w.client, "http://"+host+"/", 7, 52, 56)
	}
	if n := refused() - before; n != float64(len(direct)) {
		t.Errorf("%v refusals were counted, want %d", n, len(direct))
	}
	rules := filepath.Join(w.Dir, "redirect.nft")
	w.must(os.WriteFile(rules, []byte("table inet t { chain o { type nat hook output priority -100; tcp dport 7777 redirect to :15001; }; }"), 0o644))
	_, err := w.client.Run(w.ctx, "nft", "-f", rules)
	w.must(err)
	before = refused()
	for _, a := range w.v1.Addrs {
		w.unreachable(w.client, "http://"+netip.AddrPortFrom(a, 7777).String()+"/", 7, 52, 56)
	}
	if n := refused() - before; n != float64(len(w.v1.Addrs)) {
		t.Errorf("%v refusals of redirected connections were counted, want %d", n, len(w.v1.Addrs))
	}
	_, err = w.client.Run(w.ctx, "nft", "flush", "ruleset")
	w.must(err)
	for _, a := range append(w.client.Addrs, netip.AddrFrom16(w.client.Addr4().As16())) {
		w.unreachable(other, "http://"+netip.AddrPortFrom(a, 15001).String()+"/", 7)
		w.unreachable(other, "http://"+netip.AddrPortFrom(a, 15006).String()+"/", 7)
	}
	w.eventually("both pods are served still", func() error { return errors.Join(w.proxied(w.client), w.proxied(other)) })
}

// metric reads one sample; 0 if there is none.
func (w *world) metric(name string) float64 {
	w.t.Helper()
	text, err := w.Metrics(w.ctx, "/metrics")
	w.must(err)
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			w.must(err)
			return v
		}
	}
	return 0
}

// Two pods send many requests at once over kept connections to the same servers: each server sees for each request the
// pod that sent it, so no pod's request has travelled on a connection of the other.
func TestPoolsNeverMixPods(t *testing.T) {
	w := newWorld(t, anywhere)
	other := w.pod(anywhere, "other", 30, enrolled)
	w.eventually("both pods are served", func() error { return errors.Join(w.proxied(w.client), w.proxied(other)) })
	var senders sync.WaitGroup
	for range 3 {
		for _, pod := range []*lab.Pod{w.client, other} {
			for i := range w.shop.ClusterIPs {
				senders.Go(func() {
					counts, err := w.tryCurl(pod, w.shop.VIP(i), 300)
					me := pod.Addr4().String()
					if n := counts["v1/proxied "+me] + counts["v2/proxied "+me]; err != nil || n != 300 {
						t.Errorf("%s: %d of 300 were seen from its own address: %v, %v", pod.Place.Name, n, counts, err)
					}
				})
			}
		}
	}
	senders.Wait()
}

// Whoever holds the proxy's port before the agent comes gets none of the pod's connections, be it another user or the pod's
// root with SO_REUSEPORT: they meet the fail mode, `sockmesh pods` says why, and all is well once the port is free.
func TestAPortThatThePodHoldsMeetsTheFailMode(t *testing.T) {
	for uid, mode := range map[int]string{0: "open", 65534: "closed"} {
		t.Run(fmt.Sprintf("user %d, fail %s", uid, mode), func(t *testing.T) {
			w := newBareWorld(t, anywhere)
			squatter := w.squat(w.client, uid)
			var err error
			w.control, err = w.StartControl(w.ctx)
			w.must(err)
			w.agent, err = w.StartAgent(w.ctx, "--fail-mode", mode)
			w.must(err)
			w.eventually("sockmesh pods says why", func() error {
				out, err := w.CLI(w.ctx, "pods")
				if err == nil && !strings.Contains(out, "a process of the pod") {
					err = fmt.Errorf("it says: %s", out)
				}
				return err
			})
			for i := range w.shop.ClusterIPs {
				c, err := w.tryCurl(w.client, w.shop.VIP(i), 20, "-H", "Connection: close")
				direct := c["v1/direct "+w.client.Addrs[i].String()] + c["v2/direct "+w.client.Addrs[i].String()]
				if mode == "open" && (err != nil || direct != 20) {
					t.Errorf("%s: %v, %v; want the kernel's Service", w.shop.VIP(i), c, err)
				}
				if mode == "closed" && (err == nil || !strings.Contains(err.Error(), "exit status 7")) {
					t.Errorf("%s: %v, %v; want curl's exit status 7, could not connect", w.shop.VIP(i), c, err)
				}
			}
			if out := squatter.Output(); strings.Contains(out, "got") {
				t.Errorf("the hostile process has got connections: %s", out)
			}
			squatter.Kill()
			w.eventually("the pod is served once the port is free", func() error { return w.proxied(w.client) })
		})
	}
}

// With --original-dst-sockopt=on such a process is the pod's proxy: it gets the pod's connections, and `sockmesh pods` says
// that. When it has gone the agent's own proxy serves the pod.
func TestAForeignProxyServesThePod(t *testing.T) {
	w := newBareWorld(t, anywhere)
	foreign := w.squat(w.client, 65534)
	var err error
	w.control, err = w.StartControl(w.ctx)
	w.must(err)
	w.agent, err = w.StartAgent(w.ctx, "--original-dst-sockopt=on")
	w.must(err)
	w.eventually("sockmesh pods says who serves the pod", func() error {
		out, err := w.CLI(w.ctx, "pods")
		if err == nil && !strings.Contains(out, "gets its connections") {
			err = fmt.Errorf("it says: %s", out)
		}
		return err
	})
	w.eventually("the foreign proxy gets a connection", func() error {
		_, err := w.tryCurl(w.client, w.shop.VIP(0), 1, "-H", "Connection: close")
		if out := foreign.Output(); !strings.Contains(out, "got") {
			return fmt.Errorf("it says %q; curl: %v", out, err)
		}
		return nil
	})
	foreign.Kill()
	w.eventually("the agent's proxy serves the pod once the port is free", func() error { return w.proxied(w.client) })
}

// Once the agent is there, nobody gets in beside it: not another user, whom the kernel refuses, nor the pod's root, whom the
// bind hook refuses.
func TestNobodyListensBesideTheAgent(t *testing.T) {
	w := newWorld(t, anywhere)
	w.must(w.proxied(w.client))
	for _, uid := range []int{0, 65534} {
		squatter := w.squat(w.client, uid)
		select {
		case <-squatter.Done():
		case <-time.After(30 * time.Second):
		}
		if out := squatter.Output(); !strings.Contains(out, "refused") || !strings.Contains(out, "address already in use") {
			t.Errorf("user %d: %s", uid, out)
		}
	}
	for i := range w.shop.ClusterIPs {
		c := w.curl(w.client, w.shop.VIP(i), 100, "-H", "Connection: close")
		if n := c["v1/proxied "+w.client.Addr4().String()] + c["v2/proxied "+w.client.Addr4().String()]; n != 100 {
			t.Errorf("%d of 100 went through the proxy: %v", n, c)
		}
	}
	if w.metric("sockmesh_bind_refused_total") == 0 {
		t.Error("the refusal is not counted")
	}
}
