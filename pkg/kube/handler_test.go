package kube

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// ledger is a Handler that keeps what it was told, and checks the contract.
type ledger struct {
	t        *testing.T
	mu       sync.Mutex
	services map[service.Name]*service.Service
	pods     map[string]*Pod // by UID
	node     *Node
	synced   int
	calls    []string
}

func newLedger(t *testing.T) *ledger {
	return &ledger{t: t, services: map[service.Name]*service.Service{}, pods: map[string]*Pod{}}
}

func (l *ledger) note(format string, args ...any) {
	l.calls = append(l.calls, fmt.Sprintf(format, args...))
}

func (l *ledger) ServiceChanged(name service.Name, svc *service.Service) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if svc == nil {
		if l.services[name] == nil {
			l.t.Errorf("Service %s is gone but never was", name)
		}
		l.note("service %s gone", name)
		delete(l.services, name)
		return
	}
	l.note("service %s", name)
	l.services[name] = svc
}

func (l *ledger) PodChanged(p *Pod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, other := range l.pods {
		if other.String() == p.String() && other.UID != p.UID {
			l.t.Errorf("pod %s announced beside its predecessor", p)
		}
	}
	l.note("pod %s", p)
	l.pods[p.UID] = p
}

func (l *ledger) PodDeleted(p *Pod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pods[p.UID] == nil {
		l.t.Errorf("pod %s is gone but never was", p)
	}
	l.note("pod %s gone", p)
	delete(l.pods, p.UID)
}

func (l *ledger) NodeChanged(n *Node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.note("node %s", n.Name)
	l.node = n
}

func (l *ledger) Synced() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.note("synced")
	l.synced++
}

// view renders everything: "10.96.0.1:80 -> 10.0.0.1:8080", one frontend a line, sorted, TCP not mentioned.
func (l *ledger) view() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var lines []string
	for _, svc := range l.services {
		for _, f := range svc.Frontends {
			line := f.Addr.String()
			if f.Protocol != service.TCP {
				line += "/" + f.Protocol.String()
			}
			line += " ->"
			for _, b := range f.Backends {
				line += " " + b.Addr.String()
			}
			lines = append(lines, line)
		}
	}
	for _, p := range l.pods {
		line := fmt.Sprintf("pod %s %v", p, p.IPs)
		if p.Enrolled {
			line += " enrolled"
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// eventually waits until the view is as wanted.
func (l *ledger) eventually(want ...string) {
	l.t.Helper()
	slices.Sort(want)
	wanted := strings.Join(want, "\n")
	deadline := time.Now().Add(20 * time.Second)
	for l.view() != wanted {
		if time.Now().After(deadline) {
			l.t.Fatalf("got\n%s\nwant\n%s", l.view(), wanted)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// stays checks that nothing changes for a while: long enough for a change to be taken up.
func (l *ledger) stays(want ...string) {
	l.t.Helper()
	time.Sleep(4 * settle)
	l.eventually(want...)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not seen: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
