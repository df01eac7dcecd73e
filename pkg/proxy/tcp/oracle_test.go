package tcp

import (
	"net"
	"net/netip"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/internal/conversation"
)

// TestRandomConversationsAreThoseOfPlainTCP plays the same random conversation over plain TCP and through the
// proxy and compares what each side has seen, and what the proxy has written down.
func TestRandomConversationsAreThoseOfPlainTCP(t *testing.T) {
	accepted := make(chan *net.TCPConn)
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	direct := ln.Addr().(*net.TCPAddr).AddrPort()
	r := newRig(t, proxyTo("a"), clusterOf("a", direct))
	dialTo := func(a netip.AddrPort) func() (*net.TCPConn, error) {
		return func() (*net.TCPConn, error) { return net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(a)) }
	}
	rounds := uint64(200)
	if testing.Short() {
		rounds = 40
	}
	for seed := range rounds {
		client, server := conversation.Pair(seed)
		plainC, plainS, err := conversation.Play(dialTo(direct), accepted, client, server)
		if err != nil {
			t.Fatal(err)
		}
		proxyC, proxyS, err := conversation.Play(dialTo(r.addr), accepted, client, server)
		if err != nil {
			t.Fatal(err)
		}
		rec := r.end()
		if err := conversation.Differs(plainC, proxyC, client, server); err != nil {
			t.Fatalf("conversation %d: the client %v; flags %s", seed, err, rec.Flags)
		}
		if err := conversation.Differs(plainS, proxyS, server, client); err != nil {
			t.Fatalf("conversation %d: the server %v; flags %s", seed, err, rec.Flags)
		}
		if client.End < conversation.ResetLate && server.End < conversation.ResetLate {
			if rec.BytesReceived != uint64(client.Total()) || rec.BytesSent != uint64(server.Total()) || rec.Flags != 0 {
				t.Fatalf("conversation %d: recorded %d received, %d sent, flags %s; want %d, %d",
					seed, rec.BytesReceived, rec.BytesSent, rec.Flags, client.Total(), server.Total())
			}
		}
	}
}
