package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/nodeaddr"
)

// Clients outside this node come by its devices, and answers leave by them: programs at the tc hooks translate (bpf/nat.bpf.c).
// Here is which devices get them. Devices come and go, and get addresses late, so netlink is listened to; because its queue
// can overflow, everything is looked at again every now and then too. tc.go is how programs are attached.
//
// A device that belongs to a bridge, bond or the like is left alone: the kernel shows its packets again at the device that it
// belongs to. One that carries VLANs shows tagged packets at the VLAN's device. A pod's end in this namespace (a veth
// pair's without a global address) gets only what backends need: clients never come by it.
//
// The programs are optional. Where they can't be attached clients outside aren't served, status says why, and everything
// else works.

// outsideResync is the time between looks at the devices when nothing was heard; outsideSettle joins the messages of one
// change.
const (
	outsideResync = 30 * time.Second
	outsideSettle = 30 * time.Millisecond
)

// Device is one network device of the node and how it's served.
type Device struct {
	Name  string `json:"name"`
	Index int    `json:"index"`
	// Mode: tcx, clsact; empty: not served, for the Reason.
	Mode string `json:"mode,omitempty"`
	// Clients may come by it; else it only leads to backends.
	Clients bool   `json:"clients"`
	Reason  string `json:"reason,omitempty"`
}

// outsideVariant is what a device's programs are loaded for.
type outsideVariant struct {
	l2   uint32 // bytes before the IP header
	edge bool
}

type outsidePrograms struct{ in, out *ebpf.Program }

// outside keeps the programs on the devices. All its work is done by one thread, which stays in the node's network
// namespace: an agent of a test runs in another.
type outside struct {
	d     *Datapath
	log   *slog.Logger
	netns *os.File
	kick  chan struct{}
	stop  chan struct{}
	done  chan struct{}

	programs map[outsideVariant]outsidePrograms // the thread's
	links    map[string]*deviceLink             // the thread's; by pin name
	noTCX    bool                               // the thread's; this kernel has no tcx, or it isn't to be used
	retaken  atomic.Bool                        // links may have another agent's programs

	mu      sync.Mutex
	devices []Device // guarded by mu
	err     error    // guarded by mu; why nothing is served
	closed  sync.Once
}

// startOutside serves clients outside from now on; it returns when the devices that are there have their programs. What fails
// is in Status.
func (d *Datapath) startOutside() {
	o := &outside{
		d: d, log: d.log, netns: d.nodeNetns, kick: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
		programs: map[outsideVariant]outsidePrograms{}, links: map[string]*deviceLink{}, noTCX: d.cfg.ForceClsact,
	}
	d.mu.Lock()
	d.outside = o
	d.mu.Unlock()
	ready := make(chan struct{})
	go o.run(ready)
	<-ready
	d.startCollector()
}

func (o *outside) close() {
	if o == nil {
		return
	}
	o.closed.Do(func() { close(o.stop) })
	<-o.done
}

// run is the thread. It is never given back, because it is in another network namespace perhaps.
func (o *outside) run(ready chan struct{}) {
	defer close(o.done)
	runtime.LockOSThread()
	if err := enterNetns(o.netns); err != nil {
		o.failed(err)
		close(ready)
		return
	}
	heard, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		o.failed(fmt.Errorf("listen for changes of network devices: %w", err))
	} else {
		defer heard.Close()
		go o.listen(heard)
	}
	o.sync()
	close(ready)
	tick := time.NewTicker(outsideResync)
	defer tick.Stop()
	defer o.release()
	for {
		select {
		case <-o.stop:
			return
		case <-o.kick:
			time.Sleep(outsideSettle)
			select {
			case <-o.kick:
			default:
			}
		case <-tick.C:
		}
		o.sync()
	}
}

// listen ends when the socket is closed. An overflow is a change like any other.
func (o *outside) listen(s *nl.NetlinkSocket) {
	for {
		_, _, err := s.Receive()
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return // outsideResync does it then
		}
		select {
		case o.kick <- struct{}{}:
		default:
		}
	}
}

// takeBack has the programs of an agent that had taken over replaced by ours, soon.
func (o *outside) takeBack() {
	o.retaken.Store(true)
	select {
	case o.kick <- struct{}{}:
	default:
	}
}

func (o *outside) failed(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil || o.err.Error() != err.Error() {
		o.log.Error("clients outside this node can't be served as they should", "error", err)
	}
	o.err = err
}

// sync brings the devices in line. What can't be listed stays as it is.
func (o *outside) sync() {
	if !o.d.inCharge() {
		return
	}
	if o.retaken.Swap(false) {
		for _, l := range o.links {
			l.prog = nil
		}
	}
	links, err := nodeaddr.Whole(netlink.LinkList)
	if err != nil {
		o.failed(fmt.Errorf("list the network devices: %w", err))
		return
	}
	addrs, err := nodeaddr.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		o.failed(fmt.Errorf("list the network devices' addresses: %w", err))
		return
	}
	if err := o.writeNode(addrs); err != nil {
		o.failed(err)
	}
	masters := map[int]string{}
	for _, l := range links {
		masters[l.Attrs().Index] = l.Type()
	}
	var list []Device
	var errs []error
	wanted := map[string]bool{}
	for _, l := range links {
		dev, v := o.judge(l, addrs, masters)
		if dev.Reason == "" {
			pair, err := o.load(v)
			if err == nil {
				dev.Mode, err = o.attach(l, pair, wanted)
			}
			if err != nil {
				dev.Reason = err.Error()
				errs = append(errs, fmt.Errorf("device %s: %w", dev.Name, err))
			}
		}
		if dev.Name != "lo" {
			list = append(list, dev)
		}
	}
	o.drop(wanted)
	o.mu.Lock()
	o.devices = list
	o.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		o.failed(err)
		return
	}
	o.mu.Lock()
	o.err = nil
	o.mu.Unlock()
}

// Device types (ARPHRD) by what stands before the IP header.
var l2Sizes = map[string]uint32{"ether": 14, "none": 0, "ppp": 0, "ipip": 0, "tunnel": 0, "tunnel6": 0, "sit": 0, "rawip": 0}

// judge says whether and how a device is served.
func (o *outside) judge(l netlink.Link, addrs []netlink.Addr, masters map[int]string) (Device, outsideVariant) {
	a := l.Attrs()
	dev := Device{Name: a.Name, Index: a.Index}
	v := outsideVariant{}
	l2, known := l2Sizes[a.EncapType]
	v.l2 = l2
	switch {
	case a.EncapType == "loopback":
		dev.Reason = "loopback"
	case a.MasterIndex != 0 && masters[a.MasterIndex] != "vrf":
		dev.Reason = "belongs to another device, where its packets are seen"
	case !known:
		dev.Reason = fmt.Sprintf("packets of devices of type %s can't be read", a.EncapType)
	}
	podFacing := (l.Type() == "veth" || l.Type() == "netkit") && !hasGlobal(a.Index, addrs)
	dev.Clients = dev.Reason == "" && !podFacing && o.d.cfg.servesDevice(a.Name)
	v.edge = dev.Clients
	return dev, v
}

// servesDevice tells whether clients outside may come by a device of that name.
func (c *Config) servesDevice(name string) bool {
	if len(c.Devices) == 0 {
		return true
	}
	return slices.ContainsFunc(c.Devices, func(glob string) bool {
		ok, _ := path.Match(glob, name)
		return ok
	})
}

// maxDeviceName is how long the kernel lets a device's name be.
const maxDeviceName = unix.IFNAMSIZ - 1

// CheckDevices refuses names and patterns of network devices that no device can have or match; the error names the flag.
func CheckDevices(globs []string) error {
	for _, g := range globs {
		_, err := path.Match(g, "")
		switch {
		case g == "":
			return errors.New("--devices: an empty name matches no device: name devices, or patterns like eth*, or leave the flag out (auto)")
		case err != nil || strings.ContainsAny(g, "/ \t\n"):
			return fmt.Errorf("--devices: %q: expected names of network devices, or patterns like eth*", g)
		case g == "auto" && len(globs) > 1:
			return errors.New("--devices: auto can't stand beside names: it takes all devices but loopback and those of pods")
		case g == "lo":
			return errors.New("--devices: clients outside don't come by loopback (lo): take it out; the host's own processes are served there by " +
				"--nodeport-addresses primary,loopback")
		case len(g) > maxDeviceName && !strings.ContainsAny(g, `*?[\`):
			return fmt.Errorf("--devices: %q: no device has a name of more than %d bytes", g, maxDeviceName)
		}
	}
	return nil
}

func hasGlobal(index int, addrs []netlink.Addr) bool {
	return slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.LinkIndex == index && isGlobal(a) })
}

func isGlobal(a netlink.Addr) bool {
	return a.Scope == int(netlink.SCOPE_UNIVERSE) && a.IP.IsGlobalUnicast()
}

// writeNode tells the programs an address of each family, for where the kernel can't say which one it prefers: that which it
// takes towards the rest of the world, else the first.
func (o *outside) writeNode(addrs []netlink.Addr) error {
	pick := func(v4 bool, world string) [16]byte {
		if routes, err := netlink.RouteGet(netip.MustParseAddr(world).AsSlice()); err == nil && len(routes) > 0 {
			if src, ok := netip.AddrFromSlice(routes[0].Src); ok && src.IsGlobalUnicast() {
				return addr16(src.Unmap())
			}
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && isGlobal(a) && ip.Unmap().Is4() == v4 {
				return addr16(ip.Unmap())
			}
		}
		return [16]byte{}
	}
	// Addresses of the documentation's ranges: only the default route leads there.
	value := nodeValue{V4: pick(true, "192.0.2.1"), V6: pick(false, "2001:db8::1")}
	if err := o.d.objs.maps[sockmeshMapSmNode].Put(uint32(0), value); err != nil {
		return fmt.Errorf("write sm_node: %w", err)
	}
	return nil
}

// load returns the programs for devices of a sort.
func (o *outside) load(v outsideVariant) (outsidePrograms, error) {
	if p, ok := o.programs[v]; ok {
		return p, nil
	}
	p, err := o.d.objs.loadOutside(o.d.cfg, v)
	o.d.mu.Lock()
	o.d.probes.add("outside", err, "clients outside this node are not served")
	o.d.mu.Unlock()
	if err != nil {
		return p, fmt.Errorf("load the programs for clients outside: %w%s", err, loadHint(err))
	}
	o.programs[v] = p
	return p, nil
}

// release lets go of descriptors; what is attached stays.
func (o *outside) release() {
	for _, l := range o.links {
		l.link.Close()
	}
	for _, p := range o.programs {
		p.in.Close()
		p.out.Close()
	}
}

// OutsideStatus says how clients outside this node are served.
type OutsideStatus struct {
	Active bool `json:"active"`
	// Reason: why not, or not everywhere.
	Reason  string   `json:"reason,omitempty"`
	Devices []Device `json:"devices"`
	// Connections that exist now, and those whose handshake isn't over; as of the collector's last round.
	Connections int `json:"connections"`
	Unanswered  int `json:"unanswered"`
}

func (d *Datapath) outsideStatus() OutsideStatus {
	s := OutsideStatus{Devices: []Device{}}
	d.mu.Lock()
	o := d.outside
	d.mu.Unlock()
	if o == nil {
		s.Reason = "switched off by --outside=off"
		if d.cfg.Outside {
			s.Reason = "the programs of an earlier layout are still in charge"
		}
		return s
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	s.Devices = append(s.Devices, o.devices...)
	for _, dev := range s.Devices {
		s.Active = s.Active || dev.Clients && dev.Mode != ""
	}
	if o.err != nil {
		s.Reason = o.err.Error()
	} else if !s.Active {
		s.Reason = "no device that clients could come by"
	}
	s.Connections, s.Unanswered = int(d.nat.entries.Load()), int(d.nat.unanswered.Load())
	return s
}
