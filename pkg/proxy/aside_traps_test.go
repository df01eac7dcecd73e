package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/mesh"
	"github.com/sockmesh/sockmesh/pkg/telemetry"
)

// Everything that can happen to a connection whose bytes skip the proxy, one by one. What the random conversations
// (aside_test.go) meet by chance is arranged here.

// stepped is a connection both of whose directions skip the proxy.
func (h *hooked) stepped(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	c, s := h.pair(t, "10.98.0.2:8080")
	for i := 0; ; i++ {
		before := h.counters(t)
		say(t, c, s, []byte("question"))
		say(t, s, c, []byte("answer"))
		if n := h.counters(t).AsideMessages - before.AsideMessages; n == 2 {
			return c, s
		}
		if i == 1000 {
			t.Fatalf("the bytes don't skip the proxy: %+v", h.sockets(t))
		}
	}
}

func (h *hooked) counters(t testing.TB) datapath.Counters {
	t.Helper()
	c, err := h.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (h *hooked) sockets(t testing.TB) []datapath.Socket {
	t.Helper()
	list, err := h.d.Sockets()
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// role is the only socket with that role.
func (h *hooked) role(t testing.TB, role string) datapath.Socket {
	t.Helper()
	for _, s := range h.sockets(t) {
		if s.Role == role {
			return s
		}
	}
	t.Fatalf("no socket is a %s", role)
	return datapath.Socket{}
}

// ending is how reading a connection ends.
func ending(t *testing.T, c *net.TCPConn) string {
	t.Helper()
	rest, err := io.ReadAll(readOnly{c})
	switch {
	case errors.Is(err, unix.ECONNRESET):
		return fmt.Sprintf("%d bytes, reset", len(rest))
	case err != nil:
		t.Fatalf("after %d bytes: %v", len(rest), err)
	}
	return fmt.Sprintf("%d bytes, end", len(rest))
}

type readOnly struct{ io.Reader }

// noise are bytes that differ from their neighbours.
func noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(uint64(i) * 2654435761 >> 13)
	}
	return b
}

func TestBytesThatSkipTheProxyQueueBehindThoseThatItWrote(t *testing.T) {
	h := newStepping(t, 1)
	c, s := h.pair(t, "10.98.0.2:8080")
	data := noise(20_000)
	for i := 0; i < len(data); i += 1000 { // nobody reads
		if _, err := c.Write(data[i : i+1000]); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond) // the proxy forwards this one before the next is sent
	}
	if n := h.counters(t).AsideBytes; n == 0 || n == uint64(len(data)) {
		t.Errorf("%d of %d bytes skipped the proxy", n, len(data))
	}
	_ = c.CloseWrite()
	if got, err := io.ReadAll(readOnly{s}); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes arrived, in order: %v (%v)", len(got), bytes.Equal(got, data), err)
	}
}

func TestEitherEndMayEndItsDirectionWhileTheOtherGoesOn(t *testing.T) {
	h := newStepping(t, 1)
	for _, clientFirst := range []bool{true, false} {
		first, second := h.stepped(t)
		if !clientFirst {
			first, second = second, first
		}
		_, _ = first.Write([]byte("last words"))
		_ = first.CloseWrite()
		if got := ending(t, second); got != "10 bytes, end" {
			t.Errorf("client first %v: %s", clientFirst, got)
		}
		before := h.counters(t).AsideBytes
		big := noise(200_000)
		say(t, second, first, big)
		if n := h.counters(t).AsideBytes - before; n != uint64(len(big)) {
			t.Errorf("client first %v: %d bytes of the other direction skipped the proxy, want %d", clientFirst, n, len(big))
		}
		_ = second.Close()
		if got := ending(t, first); got != "0 bytes, end" {
			t.Errorf("client first %v: %s", clientFirst, got)
		}
		_ = first.Close()
	}
}

func TestAResetIsPassedOn(t *testing.T) {
	h := newStepping(t, 1)
	for _, clientFirst := range []bool{true, false} {
		first, second := h.stepped(t)
		if !clientFirst {
			first, second = second, first
		}
		_ = first.SetLinger(0)
		_ = first.Close()
		if got := ending(t, second); got != "0 bytes, reset" {
			t.Errorf("client first %v: %s", clientFirst, got)
		}
	}
}

// An application that closes without having read, or while the other still sends: the sender learns it.
func TestSendingToAnApplicationThatIsGoneFails(t *testing.T) {
	h := newStepping(t, 1)
	for _, clientFirst := range []bool{true, false} {
		first, second := h.stepped(t)
		if !clientFirst {
			first, second = second, first
		}
		_ = first.Close()
		var err error
		for end := time.Now().Add(patience); err == nil && time.Now().Before(end); time.Sleep(time.Millisecond) {
			_, err = second.Write([]byte("anybody there?"))
		}
		if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("client first %v: %v", clientFirst, err)
		}
	}
}

// A reader that doesn't read stops its sender, finds everything in order, and when it has caught up bytes skip the proxy
// again.
func TestASlowReaderStopsItsSenderAndIsForgiven(t *testing.T) {
	h := newStepping(t, 1, func(s *setup) { s.datapath.BacklogLimit = 32 << 10 })
	for _, toServer := range []bool{true, false} {
		from, to := h.stepped(t)
		if !toServer {
			from, to = to, from
		}
		sent, piece := 0, noise(64<<10)
		for err := error(nil); err == nil && sent < 1<<30; {
			var n int
			_ = from.SetWriteDeadline(time.Now().Add(time.Second))
			n, err = from.Write(piece)
			sent += n
		}
		t.Logf("to the server %v: stopped after %d KiB; %d returned", toServer, sent>>10, h.counters(t).AsideReturned)
		if sent > 200<<20 {
			t.Errorf("to the server %v: nothing stops the sender", toServer)
		}
		if h.counters(t).AsideReturned == 0 {
			t.Errorf("to the server %v: it never went back to the proxy", toServer)
		}
		got := make([]byte, sent)
		if n, err := io.ReadFull(to, got); err != nil {
			t.Fatalf("after %d of %d bytes: %v", n, sent, err)
		}
		for i := 0; i < sent; i += len(piece) {
			if n := min(len(piece), sent-i); !bytes.Equal(got[i:i+n], piece[:n]) {
				t.Fatalf("to the server %v: bytes are out of order behind %d", toServer, i)
			}
		}
		_ = from.SetDeadline(time.Now().Add(patience))
		eventually(t, "bytes skip the proxy again", func() bool {
			before := h.counters(t).AsideBytes
			say(t, from, to, []byte("again"))
			return h.counters(t).AsideBytes-before == 5
		})
		_ = from.Close()
	}
}

// The receiver's place in sm_pairs vanishes: by the next message everything goes through the proxy, in order.
func TestAReceiverThatLeavesTheMapIsServedByTheProxy(t *testing.T) {
	h := newStepping(t, 1)
	c, s := h.stepped(t)
	dirs, err := filepath.Glob(filepath.Join(h.datapath.BPFFS, "v*", "maps", "sm_pairs"))
	if err != nil || len(dirs) != 1 {
		t.Fatal(dirs, err)
	}
	pairs, err := ebpf.LoadPinnedMap(dirs[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pairs.Close()
	server := h.role(t, "server").Cookie
	var key, next []byte
	var cookie uint64
	for it := pairs.Iterate(); it.Next(&next, &cookie); {
		if cookie == server {
			key = bytes.Clone(next)
		}
	}
	if key == nil {
		t.Fatal("the server's socket is not in sm_pairs")
	}
	if err := pairs.Delete(key); err != nil {
		t.Fatal(err)
	}
	big := noise(500_000)
	say(t, c, s, big)
	say(t, s, c, big)
	if got := h.role(t, "client"); got.Aside != "over" || got.AsideReason == "" {
		t.Errorf("the client's socket: %+v", got)
	}
	_ = c.CloseWrite()
	if got := ending(t, s); got != "0 bytes, end" {
		t.Error(got)
	}
}

// Endpoints go, acceleration is switched off: what is open goes on, what comes later does not skip the proxy.
func TestWhatSkipsTheProxyOutlivesEndpointsAndAcceleration(t *testing.T) {
	h := newStepping(t, 1)
	c, s := h.stepped(t)
	h.e.SetSnapshot(snapshot(2, nil))
	if err := h.d.SetAcceleration(false, "a test"); err != nil {
		t.Fatal(err)
	}
	big := noise(300_000)
	before := h.counters(t).AsideBytes
	say(t, c, s, big)
	say(t, s, c, big)
	if n := h.counters(t).AsideBytes - before; n != 2*uint64(len(big)) {
		t.Errorf("%d bytes skipped the proxy, want %d", n, 2*len(big))
	}
	if st := h.d.Status().Acceleration.StepAside; st.Active || st.Reason == "" || st.Open != 1 {
		t.Errorf("status: %+v", st)
	}
	_ = c.CloseWrite()
	if got := ending(t, s); got != "0 bytes, end" {
		t.Error(got)
	}
	_ = s.Close()
	if got := ending(t, c); got != "0 bytes, end" {
		t.Error(got)
	}
	eventually(t, "the connection is given back", func() bool { return h.d.Status().Acceleration.StepAside.Open == 0 })
}

func TestSwitchedOffWhileAConnectionWaitsForItsTurn(t *testing.T) {
	h := newStepping(t, 1)
	h.d.DisableStepAside("a test")
	c, s := h.pair(t, "10.98.0.2:8080")
	for range 10 {
		say(t, c, s, []byte("question"))
		say(t, s, c, []byte("answer"))
	}
	if n := h.counters(t).AsideBytes; n != 0 {
		t.Errorf("%d bytes skipped the proxy", n)
	}
	if st := h.d.Status().Acceleration.StepAside; st.Active || st.Reason != "a test" {
		t.Errorf("status: %+v", st)
	}
}

// The idle clock runs by the bytes that skip the proxy.
func TestIdleTimeOutKnowsWhatSkipsTheProxy(t *testing.T) {
	const idle = 1500 * time.Millisecond
	h := newStepping(t, 1, func(s *setup) { s.chain.TCP.IdleTimeout = idle })
	c, s := h.stepped(t)
	for end := time.Now().Add(2 * idle); time.Now().Before(end); time.Sleep(idle / 15) {
		say(t, c, s, []byte("still here"))
	}
	if got := ending(t, c); got != "0 bytes, end" {
		t.Errorf("the client saw %s", got)
	}
	if got := ending(t, s); got != "0 bytes, end" {
		t.Errorf("the server saw %s", got)
	}
}

// The access log and the metrics count what skipped the proxy.
func TestTheAccessLogCountsWhatSkipsTheProxy(t *testing.T) {
	logs := telemetry.NewLogs()
	file := filepath.Join(t.TempDir(), "access.log")
	h := newStepping(t, 1, func(s *setup) {
		s.engine.Logs = logs
		s.chain.TCP.AccessLog = []*mesh.AccessLog{{Path: file,
			Format: "%BYTES_RECEIVED% %BYTES_SENT% %UPSTREAM_WIRE_BYTES_SENT% %UPSTREAM_WIRE_BYTES_RECEIVED% %RESPONSE_FLAGS%\n"}}
	})
	c, s := h.pair(t, "10.98.0.2:8080")
	up, down := noise(1_000_003), noise(400_001)
	for range 3 {
		say(t, c, s, up)
		say(t, s, c, down)
	}
	_ = c.Close()
	_ = s.Close()
	want := fmt.Sprintf("%d %d %d %d -\n", 3*len(up), 3*len(down), 3*len(up), 3*len(down))
	var got []byte
	for end := time.Now().Add(patience); !strings.HasSuffix(string(got), "\n") && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		got, _ = os.ReadFile(file)
	}
	if string(got) != want {
		t.Errorf("logged %q, want %q", got, want)
	}
	if n := h.counters(t).AsideBytes; n < uint64(len(up)+len(down)) {
		t.Errorf("only %d bytes skipped the proxy", n)
	}
	if err := logs.Close(); err != nil {
		t.Error(err)
	}
}

// Draining waits for such connections; what is left at its end gets an end, and every byte before it.
func TestDrainWaitsForWhatSkipsTheProxy(t *testing.T) {
	h := newStepping(t, 1)
	c, s := h.stepped(t)
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := h.e.Drain(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("drain with an open connection: %v", err)
	}
	say(t, c, s, []byte("still served"))
	_, _ = c.Write(noise(100_000))
	_, _ = s.Write(noise(100_000))
	h.e.Close()
	for _, conn := range []*net.TCPConn{c, s} {
		if got := ending(t, conn); got != "100000 bytes, end" {
			t.Error(got)
		}
	}
	var err error
	for end := time.Now().Add(patience); err == nil && time.Now().Before(end); time.Sleep(time.Millisecond) {
		_, err = c.Write([]byte("anybody there?"))
	}
	if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("sending when the proxy is gone: %v", err)
	}
	if n, err := s.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("behind its end the server read %d bytes (%v)", n, err)
	}
}

// An application that begins to splice gets its bytes, through the proxy and by TCP.
func TestAnApplicationThatBeginsToSpliceGetsItsBytes(t *testing.T) {
	h := newStepping(t, 1)
	c, s := h.stepped(t)
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	splice := func() (n int64, err error) {
		if cerr := raw.Control(func(fd uintptr) {
			n, err = unix.Splice(int(fd), nil, pipe[1], nil, 1<<16, unix.SPLICE_F_NONBLOCK)
		}); cerr != nil {
			t.Fatal(cerr)
		}
		return n, err
	}
	if n, err := splice(); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("a splice of nothing: %d, %v", n, err)
	}
	if _, err := c.Write([]byte("spliced")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the bytes arrive", func() bool { n, _ := splice(); return n == 7 })
	b := make([]byte, 100)
	if n, err := unix.Read(pipe[0], b); err != nil || string(b[:n]) != "spliced" {
		t.Errorf("%q (%v)", b[:n], err)
	}
	if got := h.role(t, "client"); got.Aside != "over" {
		t.Errorf("the client's socket: %+v", got)
	}
	say(t, s, c, []byte("and back"))
}

// A client whose leg is not redirected stays with the proxy, and one can see why.
func TestWhyAConnectionDoesNotSkipTheProxyIsShown(t *testing.T) {
	h := newStepping(t, 1)
	h.d.Reconciler().SetPods([]datapath.Pod{ // the server is elsewhere
		{Namespace: "ns", Name: "client", Cookie: cookie(t, h.pod), IPs: h.podIPs, Enrolled: true},
	})
	if err := h.d.Reconciler().Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	c, s := h.pair(t, "10.98.0.2:8080")
	for range 5 {
		say(t, c, s, []byte("question"))
		say(t, s, c, []byte("answer"))
	}
	if got := h.role(t, "client"); got.Aside != "" || got.AsideReason != "the receiver can't be redirected to" || got.AsideBytes != 0 {
		t.Errorf("the client's socket: %+v", got)
	}
}
