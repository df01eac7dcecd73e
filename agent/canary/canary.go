// Package canary proves that the data plane works by using it: a connection from a network namespace of its own, to
// an address that only an internal listener claims, through the real hooks and the real proxy, and back.
//
// The address is from the ranges that are reserved for documentation (RFC 5737, RFC 3849), so no real pod wants
// it; and the listener's only filter chain is for the canary's own source address, so that a pod that connects
// there nevertheless gets its connection closed rather than an answer. The namespace has no name in --netns-dir and no
// device but loopback: whatever the hooks don't redirect goes nowhere.
package canary

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/pod"
)

// Name of the listener and of the pod that the canary looks like.
const Name = "sockmesh.internal.canary"

// Addresses of the canary: what it connects to and what it claims to be.
var (
	target4 = netip.MustParseAddrPort("192.0.2.21:15021")
	target6 = netip.MustParseAddrPort("[2001:db8::21]:15021")
	source4 = netip.MustParseAddr("192.0.2.20")
	source6 = netip.MustParseAddr("2001:db8::20")
)

// timeout of one connection, from connect to the last byte.
const timeout = 5 * time.Second

// Canary is the namespace and what belongs to it.
type Canary struct {
	// Netns and Cookie are the namespace; IPs its addresses as a pod's would be.
	Netns  *os.File
	Cookie uint64
	IPs    []netip.Addr
	// Listeners are the in-pod listeners, as pkg/pod opens them in pods. They belong to the engine once it has them.
	Listeners []int
	// Listener is the internal listener that answers.
	Listener *mesh.Listener

	targets []netip.AddrPort
	answer  string
}

// New makes the namespace, its listeners on port, and the internal listener. own tells the datapath that a listener is the
// agent's.
func New(port uint16, own func(fd int) error) (*Canary, error) {
	token := make([]byte, 16)
	if _, err := rand.Read(token); err != nil {
		return nil, err
	}
	// The answer is drawn per agent: a canary must not be satisfied by the proxy of another one.
	c := &Canary{answer: "sockmesh canary " + hex.EncodeToString(token), targets: []netip.AddrPort{target4}, IPs: []netip.Addr{source4}}
	var err error
	if c.Netns, err = newNetns(); err != nil {
		return nil, fmt.Errorf("making the canary's network namespace: %w", err)
	}
	if err := pod.OpenInNetns(c.Netns, func() error { return c.listen(port, own) }); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the canary's listeners: %w", err), c.Close())
	}
	if c.Listener, err = c.compile(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// newNetns makes a network namespace with loopback up. The thread that made it is thrown away, because it can't be
// trusted in any other namespace again.
func newNetns() (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the goroutine takes the thread with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- result{nil, fmt.Errorf("unshare: %w (needs CAP_SYS_ADMIN)", err)}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			err = loopbackUp()
		}
		done <- result{f, err}
	}()
	r := <-done
	return r.f, r.err
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// listen opens the in-pod listeners in the calling thread's namespace. IPv6 is left out where the node has none.
func (c *Canary) listen(port uint16, own func(fd int) error) error {
	var cookie uint64
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if e := raw.Control(func(fd uintptr) {
			cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
			if err == nil {
				err = own(int(fd))
			}
		}); e != nil {
			return e
		}
		return err
	}}
	lc.SetMultipathTCP(false) // sockmap takes plain TCP only
	for _, on := range []struct{ network, host string }{{"tcp4", "127.0.0.1"}, {"tcp6", "::1"}} {
		l, err := lc.Listen(context.Background(), on.network, net.JoinHostPort(on.host, fmt.Sprint(port)))
		if err != nil {
			if on.network == "tcp6" {
				break
			}
			return err
		}
		if on.network == "tcp6" {
			c.targets, c.IPs = append(c.targets, target6), append(c.IPs, source6)
		}
		fd, err := takeFD(l.(*net.TCPListener))
		if err != nil {
			return err
		}
		c.Listeners = append(c.Listeners, fd)
	}
	c.Cookie = cookie
	return nil
}

// takeFD takes the descriptor out of Go's poller.
func takeFD(l *net.TCPListener) (int, error) {
	defer l.Close()
	f, err := l.File()
	if err != nil {
		return -1, err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, err
	}
	return fd, unix.SetNonblock(fd, true)
}

// compile makes the internal listener the way every other is made: out of Envoy's message.
func (c *Canary) compile() (*mesh.Listener, error) {
	address := func(a netip.AddrPort) string {
		return fmt.Sprintf(`{"socket_address":{"address":%q,"port_value":%d}}`, a.Addr(), a.Port())
	}
	text := fmt.Sprintf(`{
	  "name": %q, "bind_to_port": false, "traffic_direction": "OUTBOUND",
	  "address": %s, "additional_addresses": [{"address": %s}],
	  "filter_chains": [{
	    "filter_chain_match": {"source_prefix_ranges": [{"address_prefix": %q, "prefix_len": 32}, {"address_prefix": %q, "prefix_len": 128}]},
	    "filters": [{"name": "http", "typed_config": {
	      "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
	      "stat_prefix": "canary",
	      "http_filters": [{"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
	      "route_config": {"name": %q, "virtual_hosts": [{"name": "canary", "domains": ["*"], "routes": [
	        {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": %q}}}]}]}}}]}]}`,
		Name, address(target4), address(target6), source4, source6, Name, c.answer)
	var m listenerv3.Listener
	if err := protojson.Unmarshal([]byte(text), &m); err != nil {
		return nil, fmt.Errorf("the canary's listener: %w", err)
	}
	l, _, err := mesh.CompileListener(&m, "")
	if err != nil {
		return nil, fmt.Errorf("the canary's listener: %w", err)
	}
	return l, nil
}

// Close lets go of the namespace; listeners that the engine has are the engine's to close.
func (c *Canary) Close() error { return c.Netns.Close() }

// Check makes one connection of each family and says how long they took together.
func (c *Canary) Check(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	for _, to := range c.targets {
		if err := c.try(ctx, to); err != nil {
			family := "IPv4"
			if to.Addr().Is6() {
				family = "IPv6"
			}
			return 0, fmt.Errorf("%s canary: %w", family, err)
		}
	}
	return time.Since(start), nil
}

func (c *Canary) try(ctx context.Context, to netip.AddrPort) error {
	var conn net.Conn
	var d net.Dialer
	d.SetMultipathTCP(false)
	err := pod.OpenInNetns(c.Netns, func() (err error) {
		conn, err = d.DialContext(ctx, "tcp", to.String())
		return err
	})
	if err != nil {
		return reason(err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+Name+"\r\nConnection: close\r\n\r\n"); err != nil {
		return fmt.Errorf("sending the request: %w", err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return fmt.Errorf("connected, but the proxy closed the connection or did not answer: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1024))
	if err != nil {
		return fmt.Errorf("reading the proxy's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK || string(body) != c.answer {
		return fmt.Errorf("expected this agent's proxy to answer, got %s %q", resp.Status, body)
	}
	return nil
}

// reason says what a failed connect means here.
func reason(err error) error {
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return errors.New("the connection was not redirected to the proxy: the connect hook did not see it or does not know the claim; " +
			"is the agent below --cgroup-root, and are the programs attached (sockmesh status)?")
	case errors.Is(err, unix.ECONNREFUSED):
		return errors.New("connection refused: the hook found no proxy listening in the canary's network namespace")
	}
	return err
}
