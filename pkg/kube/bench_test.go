package kube

import (
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// count is a Handler that keeps what a datapath keeps: the Services.
type count struct {
	services map[service.Name]*service.Service
	calls    int
}

func (c *count) ServiceChanged(name service.Name, svc *service.Service) {
	c.services[name] = svc
	c.calls++
}
func (c *count) PodChanged(*Pod)   {}
func (c *count) PodDeleted(*Pod)   {}
func (c *count) NodeChanged(*Node) {}
func (c *count) Synced()           {}

// bigCluster fills a table with Services of 25 endpoints each.
func bigCluster(services int) (*table, *count) {
	h := &count{services: map[service.Name]*service.Service{}}
	t := newTable(Config{NodeName: "here", Handler: h, Logger: slog.New(slog.DiscardHandler)}, &remarks{})
	for i := range services {
		name := fmt.Sprintf("service-%d", i)
		t.set(&service.Object{
			Name:       service.Name{Namespace: "default", Name: name},
			ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})},
			Ports:      []service.Port{{Name: "http", Protocol: service.TCP, Port: 80}},
		})
		t.set(bigSlice(i, 25))
	}
	for _, k := range kinds {
		t.listed(k)
	}
	return t, h
}

func bigSlice(i, endpoints int) *service.Slice {
	name := fmt.Sprintf("service-%d", i)
	s := &service.Slice{
		Name:    service.Name{Namespace: "default", Name: name + "-abcde"},
		Service: name,
		Ports:   []service.Port{{Name: "http", Protocol: service.TCP, Port: 8080}},
	}
	for e := range endpoints {
		s.Endpoints = append(s.Endpoints, service.Endpoint{
			Addr: netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), byte(e)}), Ready: true, Serving: true,
			Node: intern(fmt.Sprintf("node-%d", e*7%5000)), Zone: "zone-a", Pod: fmt.Sprintf("%s-%d", name, e),
		})
	}
	return s
}

// BenchmarkFirstSync is 10,000 Services with 250,000 endpoints, from lists that have arrived to the last call.
func BenchmarkFirstSync(b *testing.B) {
	for b.Loop() {
		t, h := bigCluster(10_000)
		for t.step() {
		}
		if len(h.services) != 10_000 {
			b.Fatal(len(h.services))
		}
		b.StopTimer()
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		b.ReportMetric(float64(m.HeapAlloc)/(1<<20), "MiB")
		runtime.KeepAlive(t)
		b.StartTimer()
	}
}

// BenchmarkOneChange is one endpoint's change among so many Services.
func BenchmarkOneChange(b *testing.B) {
	for _, services := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("of-%d", services), func(b *testing.B) {
			t, _ := bigCluster(services)
			for t.step() {
			}
			i := 0
			for b.Loop() {
				i++
				t.set(bigSlice(i%services, 24+i/services%2))
				for t.step() {
				}
			}
		})
	}
}
