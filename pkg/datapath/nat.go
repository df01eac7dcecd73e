package datapath

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// The collector removes connections of clients outside that are over. The programs note when a connection was used last, to
// natCoarse seconds, and how it is ending; here is how long it may then be silent. The times are nf_conntrack's defaults where
// those are sensible for a load balancer; a TCP connection has two hours, as the keepalives of Linux, where nf_conntrack has
// five days. A round walks the maps in batches with a pause after each, so that a full table costs a few percent of one
// core and an empty one nothing.

const (
	natCoarse = 4 // bpf/natconn.h: SM_NAT_COARSE

	natSynSent     = 20  // seconds: a SYN without an answer; nf_conntrack waits 120, clients give up or try again long before
	natSynReceived = 60  // an answer without the client's third packet
	natReset       = 10  // after a reset
	natTimeWait    = 120 // after both ends' FIN: the port must not be used again while the backend may be in TIME_WAIT
	natHalfClosed  = 120 // silence after one end's FIN
	natUDP         = 30  // a datagram flow that the client has not continued after an answer
	natUDPStream   = 180 // one that it has

	natBatch = 4096
	natPause = 100 * time.Millisecond
	natRound = time.Second // between rounds
	// natOrphans: every so many rounds leads to connections that don't exist are looked for.
	natOrphans = 16
)

// Bits of sm_nat.flags; bpf/nat.h explains them.
const (
	natSNAT       = 1 << 0
	natAnswered   = 1 << 1
	natFinClient  = 1 << 2
	natFinBackend = 1 << 3
	natRstClient  = 1 << 4
	natRstBackend = 1 << 5
	natDirect     = 1 << 6
)

type collector struct {
	d     *Datapath
	round time.Duration
	stop  chan struct{}
	done  chan struct{}
	once  sync.Once

	entries, unanswered, expired atomic.Int64
}

func (d *Datapath) startCollector() {
	c := d.nat
	c.d, c.round, c.stop, c.done = d, natRound, make(chan struct{}), make(chan struct{})
	go c.run()
}

func (c *collector) close() {
	if c.stop == nil {
		return
	}
	c.once.Do(func() { close(c.stop) })
	<-c.done
}

// pause is false when the collector is to end.
func (c *collector) pause(d time.Duration) bool {
	select {
	case <-c.stop:
		return false
	case <-time.After(d):
		return true
	}
}

func (c *collector) run() {
	defer close(c.done)
	failed := ""
	for n := 0; c.pause(c.round); n++ {
		if !c.d.inCharge() {
			continue
		}
		err := c.collect(n%natOrphans == 0)
		if err != nil && err.Error() != failed {
			c.d.log.Error("connections of clients outside can't be looked through", "error", err)
			failed = err.Error()
		}
		c.d.rec.refreshFlags()
	}
}

// collect is one round.
func (c *collector) collect(orphans bool) error {
	entries, err := c.walk(c.d.objs.nat(), false)
	if err == nil {
		c.entries.Store(int64(entries))
	}
	fresh, err2 := c.walk(c.d.objs.natNew(), true)
	if err2 == nil {
		c.unanswered.Store(int64(fresh))
	}
	if orphans {
		err2 = errors.Join(err2, c.dropOrphans())
	}
	return errors.Join(err, err2)
}

// ktime is what the programs' clock says, in seconds.
func ktime() uint32 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return uint32(ts.Sec)
}

// lifetime is how many seconds a connection may be silent.
func (c *Config) lifetime(k *natKey, v *natValue, fresh bool) uint32 {
	fins := v.Flags & (natFinClient | natFinBackend)
	switch {
	case service.Protocol(k.Proto) == service.UDP && fresh:
		return natUDP
	case service.Protocol(k.Proto) == service.UDP:
		return natUDPStream
	case v.Flags&(natRstClient|natRstBackend) != 0:
		return natReset
	case fresh && v.Flags&natAnswered == 0:
		return natSynSent
	case fresh:
		return natSynReceived
	case fins == natFinClient|natFinBackend:
		return natTimeWait
	case fins != 0:
		return natHalfClosed
	}
	return uint32(c.NATEstablished / time.Second)
}

// walk removes what is over from one of the maps of connections, and counts what stays.
func (c *collector) walk(m *ebpf.Map, fresh bool) (int, error) {
	stay := 0
	err := batches(m, c, func(keys []natKey, values []natValue) error {
		now := ktime()
		for i := range keys {
			// What was read may be a moment old, and "now" is older than what is written meanwhile.
			if idle := int32(now - values[i].Used); idle < int32(c.d.cfg.lifetime(&keys[i], &values[i], fresh)+natCoarse) {
				stay++
				continue
			}
			if err := c.d.forgetNAT(&keys[i], &values[i]); err != nil {
				return err
			}
			c.expired.Add(1)
		}
		return nil
	})
	return stay, err
}

// batches reads a map piece by piece, with a pause after each but the last.
func batches[K, V any](m *ebpf.Map, c *collector, f func([]K, []V) error) error {
	var cursor ebpf.MapBatchCursor
	keys, values := make([]K, natBatch), make([]V, natBatch)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return fmt.Errorf("read %s: %w", mapName(m), err)
		}
		if err := f(keys[:n], values[:n]); err != nil {
			return err
		}
		if last || !c.pause(natPause) {
			return nil
		}
	}
}

// forgetNAT removes a connection from every map. Leads go first, and only those that lead to it: their ports may be another
// connection's by now.
func (d *Datapath) forgetNAT(k *natKey, v *natValue) error {
	client := natInKey{Src: k.Client, Dst: v.Front, Sport: v.ClientPort, Dport: v.FrontPort, Proto: k.Proto}
	leads := []natInKey{client}
	if v.Flags&natSNAT != 0 {
		leads = append(leads, natInKey{Src: k.Backend, Dst: v.Node, Sport: k.BackendPort, Dport: v.NodePort, Proto: k.Proto})
	}
	var errs []error
	for _, m := range []*ebpf.Map{d.objs.natIn(), d.objs.natNewIn()} {
		for _, lead := range leads {
			var in natIn
			if err := m.Lookup(lead, &in); err == nil && leadsTo(&lead, &in) == *k {
				errs = append(errs, gone(m.Delete(lead)))
			}
		}
	}
	for _, m := range []*ebpf.Map{d.objs.nat(), d.objs.natNew()} {
		errs = append(errs, gone(m.Delete(k)))
	}
	return errors.Join(errs...)
}

func gone(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// leadsTo names the connection.
func leadsTo(k *natInKey, v *natIn) natKey {
	if v.FromClient != 0 {
		return natKey{Client: k.Src, Backend: v.Peer, ClientPort: v.OwnPort, BackendPort: v.PeerPort, Proto: k.Proto}
	}
	return natKey{Client: v.Peer, Backend: k.Src, ClientPort: v.PeerPort, BackendPort: v.OwnPort, Proto: k.Proto}
}

// dropOrphans removes leads to nowhere: an agent may have been killed between two deletions.
func (c *collector) dropOrphans() error {
	in, nat, fresh := c.d.objs.natIn(), c.d.objs.nat(), c.d.objs.natNew()
	return batches(in, c, func(keys []natInKey, values []natIn) error {
		for i := range keys {
			name := leadsTo(&keys[i], &values[i])
			var v natValue
			if nat.Lookup(name, &v) == nil || fresh.Lookup(name, &v) == nil {
				continue
			}
			if err := gone(in.Delete(keys[i])); err != nil {
				return fmt.Errorf("delete from %s: %w", mapName(in), err)
			}
		}
		return nil
	})
}

// natBusy tells whether connections of clients outside exist: the programs must work for them, even where no frontend is left.
func (d *Datapath) natBusy() bool {
	if !d.cfg.Outside {
		return false
	}
	for _, m := range []*ebpf.Map{d.objs.nat(), d.objs.natNew()} {
		var k natKey
		if m.NextKey(nil, &k) == nil {
			return true
		}
	}
	return false
}
