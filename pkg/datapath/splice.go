package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
)

// Applications that splice an enrolled socket would wait for ever for bytes that were redirected (bpf/splice.bpf.c says
// why). The programs notice them, remember the application and turn the connection to TCP. What is left to do here:
//
//   - bytes that lay unread when the splicing began are lost to the application: the connection is cut off, once, so
//     that the application connects again, unaccelerated;
//   - else the spliced socket leaves sm_pairs as soon as the other end has gone over to TCP, so that FIONREAD counts
//     again what comes by TCP.

// spliceGrace is how long an application may take to read by itself what a splice did not find.
const spliceGrace = time.Millisecond

// spliceWaits is how often sockets are looked at whose other end has not sent anything yet.
const spliceWaits = 250 * time.Millisecond

// spliceLooks is how often the map is looked at without an event.
const spliceLooks = time.Second

// spliceWatch is one agent's eye on splices.
type spliceWatch struct {
	d      *Datapath
	link   link.Link
	ring   *ringbuf.Reader
	events chan spliceEvent
	done   sync.WaitGroup
}

// watchSplices loads and attaches the first program that this kernel allows, and watches what it says.
func (d *Datapath) watchSplices() error {
	w := &spliceWatch{d: d, events: make(chan spliceEvent, 64)}
	how, err := w.attach()
	if err != nil {
		err = fmt.Errorf("applications that splice can't be noticed: %w", err)
		d.probes.add("splice", err, "they would hang")
		return err
	}
	if w.ring, err = ringbuf.NewReader(d.objs.spliceEvents); err != nil {
		w.link.Close()
		return fmt.Errorf("read the ring of spliced sockets: %w", err)
	}
	d.probes.note("splice", how)
	d.splice = w
	w.done.Go(w.read)
	w.done.Go(w.run)
	return nil
}

// attach takes fentry where it works, else the tracepoint. The link is not pinned: without an agent there is nobody to
// end a connection, and the connections of the proxy end with the agent.
func (w *spliceWatch) attach() (how string, err error) {
	spec, err := sized(w.d.cfg)
	if err != nil {
		return "", err
	}
	var errs []error
	for _, c := range []struct{ prog, how string }{
		{progSpliceEntry, "by fentry on tcp_splice_read"},
		{progSplicePoint, "by the tracepoint tcp_rcv_space_adjust"},
	} {
		err := w.d.objs.loadPrograms(spec, c.prog)
		if err == nil {
			if w.link, err = link.AttachTracing(link.TracingOptions{Program: w.d.objs.progs[c.prog]}); err == nil {
				return c.how, nil
			}
			w.d.objs.progs[c.prog].Close()
			delete(w.d.objs.progs, c.prog)
			w.d.objs.spliceEvents.Close()
			w.d.objs.spliceEvents = nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", c.prog, err))
	}
	return "", errors.Join(errs...)
}

func (w *spliceWatch) close() {
	if w == nil {
		return
	}
	w.link.Close()
	w.ring.Close()
	w.done.Wait()
}

func (w *spliceWatch) read() {
	defer close(w.events)
	var rec ringbuf.Record
	for {
		if err := w.ring.ReadInto(&rec); err != nil {
			return // closed
		}
		var e spliceEvent
		if err := binary.Read(bytes.NewReader(rec.RawSample), binary.NativeEndian, &e); err == nil {
			w.events <- e
		}
	}
}

// run settles every spliced socket. The set is bounded by what sm_spliced holds: a socket that drops out of that LRU map
// goes on being redirected to, is spliced again, and comes back.
//
// While one agent replaces another, both watch, and only one of them gets the event, maybe not the one whose proxy has
// the other end. So each looks into the map itself now and then.
func (w *spliceWatch) run() {
	open := map[tupleKey]*openSplice{}
	tick := time.NewTimer(spliceGrace)
	defer tick.Stop()
	for {
		select {
		case e, ok := <-w.events:
			if !ok {
				return
			}
			w.d.log.Info("an application splices its redirected connections: they go by TCP from now on", "netns", e.App.Netns,
				"port", e.App.Port, "cgroup", e.App.Cgroup, "socket", addrPort(e.Self.Local, e.Self.LocalPort), "peer", addrPort(e.Self.Remote, e.Self.RemotePort))
			open[e.Self] = &openSplice{}
			tick.Reset(spliceGrace)
		case <-tick.C:
			var any uint32
			if w.d.objs.splicing().Lookup(uint32(0), &any) == nil && any != 0 {
				w.adopt(open)
				w.settle(open)
			}
			if len(open) > 0 {
				tick.Reset(spliceWaits)
			} else {
				tick.Reset(spliceLooks)
			}
		}
	}
}

// openSplice is a spliced socket that needs looking after.
type openSplice struct{ told bool }

// adopt takes in what the map has.
func (w *spliceWatch) adopt(open map[tupleKey]*openSplice) {
	var key tupleKey
	var seen splicedValue
	it := w.d.objs.spliced().Iterate()
	for it.Next(&key, &seen) {
		if open[key] == nil {
			open[key] = &openSplice{}
		}
	}
}

// settle looks at every open socket once, and forgets those with which all is done.
func (w *spliceWatch) settle(open map[tupleKey]*openSplice) {
	rows, err := w.d.socketRows()
	if err != nil {
		w.d.log.Warn("look at spliced sockets", "error", err)
		return
	}
	byKey := make(map[tupleKey]*socketRow, len(rows))
	skipped := map[tupleKey]bool{} // sockets that are sent to from past the proxy
	for i := range rows {
		byKey[rowKey(&rows[i])] = &rows[i]
		if rows[i].State.Aside == asideOn {
			skipped[rows[i].State.Route] = true
		}
	}
	for key, o := range open {
		self, peer := byKey[key], byKey[mirror(key)]
		switch {
		case self == nil: // closed
		case self.Unread > 0:
			if !w.cut(self, peer, o) {
				continue // another agent's, or nobody's
			}
		case skipped[key]:
			continue // until that sender's next message, which goes to the proxy
		case peer == nil || peer.State.State != stateEnrolled || peer.State.Latch == latchPass:
			// Nothing more will be redirected to it, and nothing is under way: the latch changed after the last message.
			if err := w.d.objs.pairs().Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				w.d.log.Warn("take a spliced socket out of sm_pairs", "error", err)
			}
		default:
			continue // the other end has not sent since
		}
		delete(open, key)
		_ = w.d.objs.spliced().Delete(key) // may have fallen out already
	}
	if len(open) == 0 {
		w.lower()
	}
}

// lower tells sm_msg that there is nothing to look for; unless the programs have added something meanwhile.
func (w *spliceWatch) lower() {
	_ = w.d.objs.splicing().Put(uint32(0), uint32(0))
	var key tupleKey
	if w.d.objs.spliced().NextKey(nil, &key) == nil {
		_ = w.d.objs.splicing().Put(uint32(0), uint32(1))
	}
}

// cut ends a connection whose application waits for bytes that it will never see. The other end is this process's, the
// proxy's: both ends must read an error, never an EOF that looks like the end of the data.
// false: it is another process's, or an application's.
func (w *spliceWatch) cut(self, peer *socketRow, o *openSplice) bool {
	log := w.d.log.With("unread", self.Unread, "socket", addrPort(self.Local, self.LocalPort), "peer", addrPort(self.Remote, self.RemotePort))
	var done bool
	var err error
	if peer != nil {
		if done, err = destroy(peer.Cookie, rowKey(peer)); done {
			log.Info("a connection is cut off, because its application splices and had bytes unread; the next one is not redirected")
			return true
		}
	}
	if o.told {
		return false
	}
	o.told = true
	if err != nil {
		log.Warn("a spliced connection can't be cut off; its application waits until it gives up", "error", err)
	} else if r := Role(self.State.Role); r != RoleClient && r != RoleServer {
		log.Warn("an application splices a connection between two pods and waits for bytes that it can't see; restart it, or switch --accelerate-pods off")
	}
	return false
}
