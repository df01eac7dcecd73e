package pod

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestAPodThatIsGoneIsClosedAndItsNamespaceFreed(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}, veth: "a"})
	m.SetPod(spec("a", "10.0.0.1"))
	ready(t, m, see, "a", 2)

	// The runtime removes the namespace while the API still has the pod.
	w.remove("a")
	gone(t, see, "a")
	eventually(t, "the namespace freed by the kernel", func() bool { return w.veths() == 0 })
	reason(t, m, "a", "no network namespace")

	// The pod goes from the API while its namespace is still there.
	w.pod("a2", podNet{addrs: []string{"10.0.0.1/24"}, veth: "a"})
	ready(t, m, see, "a", 2)
	m.DeletePod("a")
	gone(t, see, "a")
	w.remove("a2")
	eventually(t, "the namespace freed by the kernel", func() bool { return w.veths() == 0 })
}

func TestARuntimeMayUnmountANamespaceWithoutDetaching(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPod(spec("a", "10.0.0.1"))
	ready(t, m, see, "a", 2)
	if err := unix.Unmount(w.path("a"), 0); err != nil {
		t.Fatalf("umount of a known pod's namespace: %v: the manager keeps the runtime's mount busy", err)
	}
	if err := os.Remove(w.path("a")); err != nil {
		t.Fatal(err)
	}
	gone(t, see, "a")
}

func TestANewSandboxUnderTheSameFileNameIsAnotherNamespace(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPod(spec("a", "10.0.0.1"))
	first := ready(t, m, see, "a", 2)
	w.remove("a")
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	eventually(t, "the pod in its new namespace", func() bool {
		s, ok := see.get("a")
		return ok && s.Cookie != first.Cookie && len(s.listeners) == 2
	})
	if s, _ := see.get("a"); s.Cookie != w.cookieOf("a") {
		t.Errorf("cookie %d, want %d", s.Cookie, w.cookieOf("a"))
	}
}

func TestAPodMadeAgainUnderItsNameIsAnotherPod(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("one", podNet{addrs: []string{"10.0.0.1/24"}})
	old := spec("uid-1", "10.0.0.1")
	m.SetPods([]Spec{old})
	ready(t, m, see, "uid-1", 2)
	w.pod("two", podNet{addrs: []string{"10.0.0.2/24"}})
	again := spec("uid-2", "10.0.0.2")
	again.Name = old.Name
	m.SetPods([]Spec{again})
	gone(t, see, "uid-1")
	ready(t, m, see, "uid-2", 2)
}

func TestAnAddressUsedAgainBelongsToTheNewPodsNamespace(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("old", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPods([]Spec{spec("old", "10.0.0.1")})
	ready(t, m, see, "old", 2)

	// The old pod is gone from the API; its namespace was left behind and still owns the address.
	w.pod("new", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPods([]Spec{spec("new", "10.0.0.1")})
	gone(t, see, "old")
	if p := ready(t, m, see, "new", 2); p.NetnsName != "new" {
		t.Errorf("found in %s, want new", p.NetnsName)
	}
}

func TestAPodNeverTakesTheNamespaceOfOneThatExists(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	older, younger := spec("older", "10.0.0.1"), spec("younger", "10.0.0.1")
	older.Created, younger.Created = time.Unix(1, 0), time.Unix(2, 0)
	m.SetPods([]Spec{older})
	ready(t, m, see, "older", 2)

	older.Deleting = true
	m.SetPods([]Spec{older, younger})
	reason(t, m, "younger", "belongs to pod default/older, which still exists")

	// Its own namespace appears, and the older pod's goes.
	w.pod("b", podNet{addrs: []string{"10.0.0.1/24"}})
	if p := ready(t, m, see, "younger", 2); p.NetnsName != "b" {
		t.Errorf("found in %s, want b", p.NetnsName)
	}
	reason(t, m, "older", "pod default/younger owns its address as well")
	w.remove("a")
	gone(t, see, "older")
	if p := ready(t, m, see, "younger", 2); p.NetnsName != "b" {
		t.Errorf("moved to %s", p.NetnsName)
	}
}

func TestOfPodsThatWaitForOneNamespaceTheLivingAndYoungestComesFirst(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	deleting, older, younger := spec("deleting", "10.0.0.1"), spec("older", "10.0.0.1"), spec("younger", "10.0.0.1")
	deleting.Deleting, deleting.Created = true, time.Unix(9, 0)
	older.Created, younger.Created = time.Unix(1, 0), time.Unix(2, 0)
	m.SetPods([]Spec{deleting, older, younger})
	reason(t, m, "younger", "no network namespace")
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	ready(t, m, see, "younger", 2)
	reason(t, m, "older", "belongs to pod default/younger")
	reason(t, m, "deleting", "belongs to pod default/younger")
}

func TestTwoUnknownNamespacesWithOneAddressAreReportedNotGuessed(t *testing.T) {
	w := newWorld(t)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	w.pod("b", podNet{addrs: []string{"10.0.0.1/24"}})
	m, see := start(t, w)
	m.SetPod(spec("a", "10.0.0.1"))
	reason(t, m, "a", "two network namespaces")
	if see.count() != 0 {
		t.Error("guessed")
	}
	w.remove("a")
	if p := ready(t, m, see, "a", 2); p.NetnsName != "b" {
		t.Errorf("found in %s", p.NetnsName)
	}
}

func TestAPodStaysWhenAnotherNamespaceTakesItsAddress(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPod(spec("a", "10.0.0.1"))
	before := ready(t, m, see, "a", 2)
	w.pod("thief", podNet{addrs: []string{"10.0.0.1/24"}})
	w.pod("z", podNet{addrs: []string{"10.0.0.2/24"}})
	m.SetPod(spec("z", "10.0.0.2"))
	ready(t, m, see, "z", 2)
	if s, _ := see.get("a"); s.Cookie != before.Cookie {
		t.Error("moved to the thief's namespace")
	}
}

func TestARestartedManagerOpensListenersBesideThoseStillOpen(t *testing.T) {
	w := newWorld(t)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	first, seeFirst := start(t, w)
	first.SetPod(spec("a", "10.0.0.1"))
	ready(t, first, seeFirst, "a", 2)
	second, seeSecond := start(t, w)
	second.SetPod(spec("a", "10.0.0.1"))
	ready(t, second, seeSecond, "a", 2)
}

func TestAThousandPodsComeAndGoWithoutALeak(t *testing.T) {
	const batches, size = 20, 50
	w := newWorld(t)
	see := newWitness(t)
	m, err := New(Config{NetnsDir: w.dir, Handler: see, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, m)
	w.pod("warm", podNet{addrs: []string{"10.255.0.1/24"}})
	m.SetPod(spec("warm", "10.255.0.1"))
	ready(t, m, see, "warm", 2)
	filesBefore, goroutinesBefore := openFiles(t), runtime.NumGoroutine()

	for batch := range batches {
		name := func(i int) string { return fmt.Sprintf("p%d-%d", batch, i) }
		// Addresses are used again in every batch, by pods of other names.
		ip := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(1 + i%250)}) }
		want := []Spec{spec("warm", "10.255.0.1")}
		for i := range size {
			s := spec(name(i), ip(i).String())
			s.Enrolled = i%5 != 0
			want = append(want, s)
		}
		if batch%2 == 0 {
			m.SetPods(want)
		}
		for i := range size {
			w.pod(name(i), podNet{addrs: []string{ip(i).String() + "/16"}, veth: name(i)})
		}
		m.SetPods(want)
		for i, s := range want[1:] {
			ready(t, m, see, s.UID, map[bool]int{true: 2}[i%5 != 0])
		}
		if batch%3 == 0 {
			m.SetPods(want[:1])
		}
		for i := range size {
			w.remove(name(i))
		}
		m.SetPods(want[:1])
		eventually(t, "all pods of the batch gone", func() bool { return see.count() == 1 })
	}
	eventually(t, "every namespace freed by the kernel", func() bool { return w.veths() == 0 })
	eventually(t, "no descriptor more than before", func() bool { return openFiles(t) <= filesBefore })
	eventually(t, "no goroutine more than before", func() bool { return runtime.NumGoroutine() <= goroutinesBefore })
	m.DeletePod("warm")
	gone(t, see, "warm")
	stop()
	eventually(t, "nothing open after the end", func() bool { return openNetnsFiles(t, w) == 0 })
}

// openFiles counts this process's descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// openNetnsFiles counts descriptors of namespaces other than the test's own.
func openNetnsFiles(t *testing.T, w *world) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	node, err := identify(int(w.node.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		id, err := identifyPath(filepath.Join("/proc/self/fd", e.Name()))
		own, _ := identifyPath("/proc/self/ns/net")
		if err == nil && id.dev == own.dev && id != own && id != node {
			n++
		}
	}
	return n
}

func TestAPodOfAManifestMayBeRenamed(t *testing.T) {
	w := newWorld(t)
	m, see := start(t, w)
	w.pod("a", podNet{addrs: []string{"10.0.0.1/24"}})
	m.SetPods([]Spec{spec("default/old", "10.0.0.1")})
	ready(t, m, see, "default/old", 2)
	m.SetPods([]Spec{spec("default/new", "10.0.0.1")})
	gone(t, see, "default/old")
	ready(t, m, see, "default/new", 2) // After reuseAfter.
}
