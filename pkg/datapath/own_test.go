package datapath

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// An agent that stops closes its listeners. Whoever is in their queues then is reset, so connections must go elsewhere
// before.
func TestListenerThatLeavesIsSentNoConnection(t *testing.T) {
	w := newWorld(t)
	d := w.open()
	client, b := w.pod(), w.pod()
	b.server("b", 8080)
	enrol(d, client)
	p := &proxy{t: t, d: d, pod: client}
	var fds []int
	own := func(fd int) error {
		again, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		fds = append(fds, again)
		if err != nil {
			return err
		}
		return d.OwnListener(fd)
	}
	client.listen("127.0.0.1:15001", p.handle, own)
	client.listen("[::1]:15001", p.handle, own)
	defer func() {
		for _, fd := range fds {
			must(t, unix.Close(fd))
		}
	}()
	families(t, func(t *testing.T, fam family) {
		d.Reconciler().SetService(svc("web", fam.vip, ap(fam.of(b), 8080)))
		d.Reconciler().SetClaims([]mesh.Claim{claim(fam.vip)})
		synced(t, d)
		ask := func(proxied bool) {
			t.Helper()
			before := len(p.seen())
			got, err := fam.ask(client, fam.vip)
			if err != nil || got != "b" || (len(p.seen()) > before) != proxied {
				t.Errorf("%q, %v, through the proxy %v; want that to be %v", got, err, len(p.seen()) > before, proxied)
			}
		}
		ask(true)
		for _, fd := range fds {
			must(t, d.DisownListener(fd))
		}
		ask(false)
		for _, fd := range fds {
			must(t, d.DisownListener(fd)) // a second time changes nothing
			must(t, d.OwnListener(fd))
		}
		ask(true)
	})
}
