package proxy

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// kill -9 of the agent while bytes skip it. The proxy of these tests is a process of its own, this test binary started
// once more; client and server are this process.

// victimEnv has the victim's datapath configuration; its network namespaces are descriptors 3 and 4.
const victimEnv = "SOCKMESH_TEST_VICTIM"

// victimHTTP, if it is set, has the victim speak HTTP.
const victimHTTP = "SOCKMESH_TEST_VICTIM_HTTP"

func TestMain(m *testing.M) {
	if cfg := os.Getenv(victimEnv); cfg != "" {
		beVictim(cfg)
	}
	os.Exit(m.Run())
}

// outside is the part of a test that a process without one needs.
type outside struct{ testing.TB }

func (outside) Helper()        {}
func (outside) Cleanup(func()) {}
func (outside) Fatal(args ...any) {
	fmt.Fprintln(os.Stderr, args...)
	os.Exit(1)
}

// beVictim serves until it is killed, and answers every line on its input with the counters.
func beVictim(cfg string) {
	h := &hooked{world: newWorldOf(os.NewFile(3, "pod"), os.NewFile(4, "server"))}
	if err := json.Unmarshal([]byte(cfg), &h.datapath); err != nil {
		outside{}.Fatal(err)
	}
	h.datapath.Logger = slog.New(slog.DiscardHandler)
	h.prepare()
	if os.Getenv(victimHTTP) != "" {
		h.chain = httpChain(outside{}, "orig")
	}
	h.engine.StepAside, h.engine.StepAsideAfter = h.stepAside, 1
	h.engine.PairUp = h.pairUp
	h.start(outside{}, 64<<10)
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		line, err := json.Marshal(h.counters(outside{}))
		if err != nil {
			outside{}.Fatal(err)
		}
		fmt.Println(string(line))
	}
	os.Exit(0)
}

// victim is a proxy to be killed.
type victim struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

func (h *hooked) startVictim(t testing.TB, env ...string) *victim {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg := h.datapath
	cfg.Logger = nil
	raw, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{t: t, cmd: exec.Command(exe)}
	v.cmd.Env = append(append(os.Environ(), victimEnv+"="+string(raw)), env...)
	v.cmd.ExtraFiles = []*os.File{h.pod, h.server}
	v.cmd.Stderr = os.Stderr
	if v.in, err = v.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.out = bufio.NewScanner(out)
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.kill)
	if !v.out.Scan() || v.out.Text() != "ready" {
		t.Fatalf("the proxy's process says %q", v.out.Text())
	}
	return v
}

// kill ends it by SIGKILL and returns when it is gone.
func (v *victim) kill() {
	_ = v.cmd.Process.Kill()
	_ = v.cmd.Wait()
}

func (v *victim) counters() (c datapath.Counters) {
	v.t.Helper()
	if _, err := fmt.Fprintln(v.in); err != nil {
		v.t.Fatal(err)
	}
	if !v.out.Scan() {
		v.t.Fatal("the proxy's process says nothing")
	}
	if err := json.Unmarshal(v.out.Bytes(), &c); err != nil {
		v.t.Fatal(err)
	}
	return c
}

// What was sent past the proxy has arrived, although the proxy is dead: both ends read it all, and then the end. What is
// sent afterwards fails.
func TestKilledWhileItIsSkippedTheProxyTakesNothingAlong(t *testing.T) {
	h := newStage(t, true)
	v := h.startVictim(t)
	c, s := h.pair(t, "10.98.0.2:8080")
	for skipped := false; !skipped; {
		before := v.counters().AsideMessages
		say(t, c, s, []byte("question"))
		say(t, s, c, []byte("answer"))
		skipped = v.counters().AsideMessages-before == 2
	}
	for _, conn := range []*net.TCPConn{c, s} {
		for range 10 {
			if _, err := conn.Write(noise(100_000)); err != nil {
				t.Fatal(err)
			}
		}
	}
	v.kill()
	for _, conn := range []*net.TCPConn{c, s} {
		if got := ending(t, conn); got != "1000000 bytes, end" {
			t.Error(got)
		}
	}
	for _, conn := range []*net.TCPConn{c, s} {
		var err error
		for end := time.Now().Add(patience); err == nil && time.Now().Before(end); time.Sleep(time.Millisecond) {
			_, err = conn.Write([]byte("anybody there?"))
		}
		if err == nil {
			t.Error("sending goes on although the proxy is gone")
		}
		if n, _ := conn.Read(make([]byte, 1)); n != 0 {
			t.Error("something came behind the end")
		}
	}
}

// Killed at any moment under connections in every state: each end reads a beginning of what the other has sent, no byte
// twice, none wrong, and then an end or a reset; nobody waits for ever. The next proxy serves at once.
func TestKilledAtAnyMomentTheProxyLeavesNoConnectionCorrupt(t *testing.T) {
	h := newStage(t, true)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 7))
	rounds := 4
	if testing.Short() {
		rounds = 2
	}
	var skipped uint64
	for range rounds {
		v := h.startVictim(t)
		before := v.counters().AsideBytes
		talks := make([]*talk, 16)
		for i := range talks {
			c, s := h.pair(t, "10.98.0.2:8080")
			talks[i] = newTalk(rng.Uint64(), c, s)
		}
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
		after := v.counters().AsideBytes
		v.kill()
		for i, talk := range talks {
			if err := talk.end(); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		}
		skipped += after - before
	}
	t.Logf("%d bytes had skipped the proxy", skipped)
	if skipped == 0 {
		t.Error("nothing skipped the proxy")
	}
}

// talk is a connection on which both ends send without end, now and then waiting for each other.
type talk struct {
	done sync.WaitGroup
	errs chan error
}

// tale is what everybody tells, from the beginning; longer than one can tell before the kill.
var tale = noise(64 << 20)

func newTalk(seed uint64, c, s *net.TCPConn) *talk {
	k := &talk{errs: make(chan error, 2)}
	var heard [2]atomic.Int64 // by the client, by the server
	for i, conn := range []*net.TCPConn{c, s} {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		over := make(chan struct{})
		k.done.Go(func() { k.listen(conn, &heard[i], over) })
		k.done.Go(func() { k.tell(conn, rng, &heard[1-i], over) })
	}
	return k
}

func (k *talk) listen(conn *net.TCPConn, heard *atomic.Int64, over chan struct{}) {
	defer close(over)
	b := make([]byte, 64<<10)
	for at := 0; ; {
		n, err := conn.Read(b)
		if string(b[:n]) != string(tale[at:at+n]) {
			k.errs <- fmt.Errorf("wrong bytes behind %d", at)
			return
		}
		at += n
		heard.Store(int64(at))
		if err != nil {
			if os.IsTimeout(err) {
				k.errs <- fmt.Errorf("it still waits for bytes behind %d", at)
			}
			return
		}
	}
}

func (k *talk) tell(conn *net.TCPConn, rng *rand.Rand, theirs *atomic.Int64, over chan struct{}) {
	for at := 0; at < len(tale); {
		n := min(1+rng.IntN(1<<uint(1+rng.IntN(16))), len(tale)-at)
		if _, err := conn.Write(tale[at : at+n]); err != nil {
			_ = conn.CloseWrite()
			return
		}
		at += n
		if rng.IntN(3) > 0 { // until the other has heard it
			for theirs.Load() < int64(at) {
				select {
				case <-over:
					_ = conn.CloseWrite()
					return
				case <-time.After(10 * time.Microsecond):
				}
			}
		}
	}
}

// end waits until both have noticed that the proxy is gone.
func (k *talk) end() error {
	k.done.Wait()
	select {
	case err := <-k.errs:
		return err
	default:
		return nil
	}
}
