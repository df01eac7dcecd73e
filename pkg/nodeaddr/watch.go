// Package nodeaddr knows which addresses the node's own network devices have, and tells when that changes.
//
// Node ports are served on them, and an external IP that a node "owns" is one of them, so a change (a new device, a lease
// that came late, an address that a floating-IP daemon moved here) must be seen without a restart. Changes come from
// netlink; because its queue can overflow and a socket can break, everything is listed again every now and then too.
package nodeaddr

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Resync is the time between lists when nothing was heard; settle joins the many messages of one change; retry is the
// wait after netlink failed.
const (
	resync = time.Minute
	settle = 50 * time.Millisecond
	retry  = 5 * time.Second
)

// Watch calls publish with the addresses of the calling process's network namespace, sorted, at first and whenever they
// have changed, until ctx ends. What fails is logged once, and tried again.
func Watch(ctx context.Context, log *slog.Logger, publish func([]netip.Addr)) error {
	w := watcher{log: log, publish: publish}
	for ctx.Err() == nil {
		err := w.follow(ctx)
		if ctx.Err() != nil {
			break
		}
		w.complain(err)
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
	return nil
}

type watcher struct {
	log     *slog.Logger
	publish func([]netip.Addr)
	last    []netip.Addr
	known   bool
	broken  bool
}

// follow subscribes first and lists afterwards, so that nothing falls between.
func (w *watcher) follow(ctx context.Context) error {
	changed, failed, done := make(chan netlink.AddrUpdate, 64), make(chan error, 1), make(chan struct{})
	defer close(done)
	err := netlink.AddrSubscribeWithOptions(changed, done, netlink.AddrSubscribeOptions{ErrorCallback: func(err error) {
		select {
		case failed <- err:
		default:
		}
	}})
	if err != nil {
		return fmt.Errorf("subscribe to addresses: %w", err)
	}
	// The subscription's goroutine blocks on a full channel and then would never see that it is done.
	defer func() {
		go func() {
			for range changed { //nolint:revive // drained until the goroutine closes it
			}
		}()
	}()
	if err := w.look(); err != nil {
		return err
	}
	tick := time.NewTicker(resync)
	defer tick.Stop()
	quiet := time.NewTimer(time.Hour)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return fmt.Errorf("netlink: %w", err)
		case _, open := <-changed:
			if !open {
				return fmt.Errorf("netlink ended the subscription")
			}
			quiet.Reset(settle)
		case <-quiet.C:
			if err := w.look(); err != nil {
				return err
			}
		case <-tick.C:
			if err := w.look(); err != nil {
				return err
			}
		}
	}
}

func (w *watcher) complain(err error) {
	if !w.broken {
		w.log.Warn("the node's addresses can't be watched; the last ones stay, retrying", "error", err)
	}
	w.broken = true
}

// look lists the addresses and publishes them where they differ.
func (w *watcher) look() error {
	now, err := List()
	if err != nil {
		return err
	}
	if w.broken {
		w.log.Info("watching the node's addresses again")
		w.broken = false
	}
	if w.known && slices.Equal(now, w.last) {
		return nil
	}
	w.last, w.known = now, true
	w.publish(slices.Clone(now))
	return nil
}

// ipvsDevice is where kube-proxy in mode ipvs keeps all Services' addresses. They are not the node's, and stay there
// after such a kube-proxy has gone, until somebody cleans up.
const ipvsDevice = "kube-ipvs0"

// List gives the addresses that are in use now: not those that still wait for duplicate address detection or failed it.
func List() ([]netip.Addr, error) {
	links, err := Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list the node's devices: %w", err)
	}
	foreign := -1
	for _, l := range links {
		if l.Attrs().Name == ipvsDevice {
			foreign = l.Attrs().Index
		}
	}
	list, err := Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range list {
		if a.LinkIndex == foreign || a.Flags&(unix.IFA_F_DADFAILED|unix.IFA_F_TENTATIVE) != 0 && a.Flags&unix.IFA_F_OPTIMISTIC == 0 {
			continue
		}
		if ip, ok := fromIP(a.IP); ok {
			out = append(out, ip)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

func fromIP(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return a.Unmap(), ok
}
