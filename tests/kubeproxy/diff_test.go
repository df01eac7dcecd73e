package kubeproxy

import (
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// stepsPerWorld is how long a world lives.
const stepsPerWorld = 25

func TestMain(m *testing.M) {
	flag.Parse()
	klog.SetLogger(logr.Discard()) // kube-proxy logs what odd slices it is given.
	os.Exit(m.Run())
}

// setting reads a number from the environment.
func setting(t *testing.T, name string, otherwise uint64) uint64 {
	value := os.Getenv(name)
	if value == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(value, 10, 64)
	if err != nil {
		t.Fatalf("%s: %q is not a number", name, value)
	}
	return n
}

// compare is the test: it applies changes to both sides and gives the first disagreement, "" if there is none. steps
// counts the comparisons, luck the Services left out of them because kube-proxy's answer is a matter of luck.
func compare(changes []*change, f *fault) (disagreement string, steps, luck int) {
	ours, theirs := newSubject(f), newOracle()
	for i, c := range changes {
		theirs.apply(c)
		if bad := guarded(func() { ours.apply(c) }); bad != "" {
			return fmt.Sprintf("change %d of %d: %s", i+1, len(changes), bad), steps, luck
		}
		if c.Hold && i < len(changes)-1 {
			continue
		}
		steps++
		var a meaning
		b := theirs.meaning()
		if bad := guarded(func() { a = ours.meaning() }); bad != "" {
			return fmt.Sprintf("after change %d of %d: %s", i+1, len(changes), bad), steps, luck
		}
		if skip := ambiguous(theirs.slices); len(skip) > 0 {
			noted(differenceTwice)
			luck += len(skip)
			without(a, skip)
			without(b, skip)
		}
		if d := differ(a, b); d != "" {
			return fmt.Sprintf("after change %d of %d:\n%s", i+1, len(changes), d), steps, luck
		}
	}
	return "", steps, luck
}

// guarded calls sockmesh and says where it panics.
func guarded(call func()) (bad string) {
	defer func() {
		if p := recover(); p != nil {
			bad = fmt.Sprintf("sockmesh panics: %v", p)
		}
	}()
	call()
	return ""
}

// without leaves Services out of a meaning.
func without(m meaning, services map[string]bool) {
	for key := range m {
		name, _, _ := strings.Cut(strings.TrimPrefix(key, namespace+"/"), " ")
		if services[name] {
			delete(m, key)
		}
	}
}

// history is the changes of one world.
func history(seed uint64) []*change {
	w := newWorld(seed)
	changes := make([]*change, stepsPerWorld)
	for i := range changes {
		changes[i] = w.next()
	}
	return changes
}

func TestKubeProxyAgrees(t *testing.T) {
	want := setting(t, "KUBEPROXY_STEPS", 400_000)
	seed := setting(t, "KUBEPROXY_SEED", uint64(time.Now().UnixNano()))
	began := time.Now()
	t.Logf("KUBEPROXY_SEED=%d", seed)
	total, worlds, luck := 0, 0, 0
	for world := seed; uint64(total) < want; world++ {
		changes := history(world)
		d, steps, l := compare(changes, nil)
		total, worlds, luck = total+steps, worlds+1, luck+l
		if d != "" {
			report(t, world, changes, nil)
		}
	}
	t.Logf("%d steps in %d worlds agree, in %s; %d times one Service was left out", total, worlds, time.Since(began).Round(time.Second), luck)
	for _, d := range differences {
		t.Logf("on purpose: %s\n    kube-proxy: %s\n    sockmesh: %s\n    because %s", d.name, d.theirs, d.ours, d.why)
		if d.seen == 0 && !d.beyond {
			t.Errorf("the difference %q was never met: is it still one?", d.name)
		}
	}
}

// report fails the test with the smallest history that still disagrees.
func report(t *testing.T, seed uint64, changes []*change, f *fault) {
	t.Helper()
	small := shrink(changes, f)
	d, _, _ := compare(small, f)
	t.Fatalf("run again with KUBEPROXY_SEED=%d KUBEPROXY_STEPS=1\n%s\nchanges:\n%s", seed, d, render(small))
}

// fault spoils what sockmesh is told.
type fault struct {
	name   string
	object func(*service.Object)
	slice  func(*service.Slice)
	node   func(*service.Node)
}
