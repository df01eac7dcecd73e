// Package traps has every trap that is known of sockmap as a test on real sockets through the real programs. The oracle
// is the same test on plain TCP between the same addresses: same bytes, same order, same errno, same end. Where a
// kernel can't do what TCP does, a test pins what happens instead, and says what sockmesh does about it.
//
// What needs the whole way of a connection (connect, proxy, second leg) is in pkg/datapath's tests: order of first
// bytes, blocking clients, MPTCP, splicing proxies.
package traps

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/datapath/selftest"
)

var (
	dp     *datapath.Datapath
	stage  *selftest.Stage
	cgroup string
	// probes are what the self-test says of this kernel. It ran before the stage was made, which has the same addresses.
	probes []datapath.Probe
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

// run gives all tests one datapath: its cgroup is the test process's own.
func run(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, fmt.Errorf("these tests load BPF programs and make network namespaces: run them as root")
	}
	root, err := datapath.FindCgroupRoot()
	if err != nil {
		return 1, err
	}
	join := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0)
	}
	cgroup = filepath.Join(root, fmt.Sprintf("sm-traps-%d", os.Getpid()))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return 1, err
	}
	defer os.Remove(cgroup)
	if err := join(cgroup); err != nil {
		return 1, err
	}
	defer join(root)
	dir, err := os.MkdirTemp("", "sockmesh-traps-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	cfg := datapath.Config{
		CgroupRoot: cgroup, BPFFS: filepath.Join(dir, "bpf"), Acceleration: true, Services: true, SyncTimeout: time.Hour,
		BacklogLimit: 256 << 10, Logger: slog.New(slog.DiscardHandler),
	}
	if dp, err = datapath.Open(cfg); err != nil {
		return 1, err
	}
	defer datapath.Cleanup(cfg)
	defer dp.Close()
	probes = selftest.Run(context.Background(), dp)
	if stage, err = selftest.NewStage(dp); err != nil {
		return 1, err
	}
	defer func() { stage.Close() }() // a test may have made another
	return m.Run(), nil
}

// ends are the two ends of a connection: bytes go from sender to receiver first.
type ends struct {
	t                *testing.T
	sender, receiver int
	pair             *selftest.Pair
}

// everyway runs a test for every family and both directions: each of a pair's ends, the connecting one, which is the
// proxy's, and the accepted one, which is an application's, is the sender once.
func everyway(t *testing.T, test func(t *testing.T, fam selftest.Family, from string)) {
	t.Helper()
	for _, fam := range selftest.Families {
		for _, from := range []string{"proxy", "application"} {
			t.Run(string(fam)+"/from_"+from, func(t *testing.T) { test(t, fam, from) })
		}
	}
}

// compare runs a conversation on redirected sockets of every family, in both roles, and on plain TCP: what it returns
// must be the same. It returns everything that an application could see, as text.
func compare(t *testing.T, conversation func(e *ends) string) {
	t.Helper()
	everyway(t, func(t *testing.T, fam selftest.Family, from string) {
		want := converse(t, fam, from, false, conversation)
		if got := converse(t, fam, from, true, conversation); got != want {
			t.Errorf("redirected:\n%s\nplain TCP:\n%s", got, want)
		}
	})
}

// pin is compare for what redirected sockets are known not to do as TCP does: both must stay as they are known to be.
func pin(t *testing.T, plain, redirected string, conversation func(e *ends) string) {
	t.Helper()
	everyway(t, func(t *testing.T, fam selftest.Family, from string) {
		if got := converse(t, fam, from, false, conversation); got != plain {
			t.Errorf("plain TCP: %q, known is %q", got, plain)
		}
		if got := converse(t, fam, from, true, conversation); got != redirected {
			t.Errorf("redirected: %q, pinned is %q", got, redirected)
		}
	})
}

// both runs a conversation redirected and not, every way; it judges for itself.
func both(t *testing.T, conversation func(e *ends, redirected bool)) {
	t.Helper()
	everyway(t, func(t *testing.T, fam selftest.Family, from string) {
		for _, redirected := range []bool{false, true} {
			converse(t, fam, from, redirected, func(e *ends) string { conversation(e, redirected); return "" })
		}
	})
}

func converse(t *testing.T, fam selftest.Family, from string, redirected bool, conversation func(e *ends) string) string {
	t.Helper()
	before := enrolled(t)
	p, err := stage.Pair(fam, redirected)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if n := enrolled(t) - before; redirected != (n == 2) || n != 0 && n != 2 {
		t.Fatalf("to be redirected: %v; %d sockets of the pair were enrolled", redirected, n)
	}
	e := &ends{t, p.Proxy, p.App, p}
	if from == "application" {
		e.sender, e.receiver = p.App, p.Proxy
	}
	return conversation(e)
}

// enrolled counts the sockets that were put into the map so far.
func enrolled(t *testing.T) uint64 {
	t.Helper()
	c, err := dp.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return c.Enrolled
}

func (e *ends) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// send writes everything.
func (e *ends) send(text string) {
	e.t.Helper()
	e.must(selftest.Write(e.sender, []byte(text)))
}

// arrive waits until something can be read.
func (e *ends) arrive() {
	e.t.Helper()
	e.must(selftest.Wait(e.receiver, 0x1)) // POLLIN
}
