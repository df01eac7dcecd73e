package selftest

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// stepAside hands bodies and then a whole connection of two legs over: bytes go from application to application behind those
// that were forwarded, both ways, and when the proxy takes it back they come to the proxy.
func stepAside(s *Stage) error {
	for _, fam := range Families {
		if err := s.onPair(fam, func(client *Pair) error {
			return s.onPair(fam, func(server *Pair) error { return errors.Join(bodies(s, client, server), skip(s, client, server)) })
		}); err != nil {
			return fmt.Errorf("%s: %w", fam, err)
		}
	}
	return nil
}

// skip: the proxy's ends of the pairs are those of one connection.
func skip(s *Stage, client, server *Pair) error {
	const first = "forwarded"
	if err := errors.Join(transfer(client.App, client.Proxy, first), Write(server.Proxy, []byte(first))); err != nil {
		return err
	}
	// What bodies has left in the counts: 6 bytes each way came to the proxy.
	a, err := s.d.StepAside(client.Proxy, server.Proxy, 6+uint64(len(first)), 6)
	if err != nil {
		return err
	}
	defer a.Close()
	if err := Write(client.App, []byte(" and straight")); err != nil {
		return err
	}
	if got, err := Read(server.App, len(first)+13); err != nil || string(got) != first+" and straight" {
		return fmt.Errorf("%q was read (%w)", got, err)
	}
	if err := transfer(server.App, client.App, "and back"); err != nil {
		return err
	}
	if there, back := a.Carried(datapath.ToServer), a.Carried(datapath.ToClient); there != 13 || back != 8 {
		return fmt.Errorf("%d and %d bytes are counted, of 13 and 8", there, back)
	}
	a.Close()
	if err := Write(client.App, []byte("behind")); err != nil {
		return err
	}
	if got, err := Read(client.Proxy, 6); err != nil || string(got) != "behind" {
		return fmt.Errorf("%q came to the proxy when it had taken the connection back (%w)", got, err)
	}
	if err := unix.Shutdown(server.Proxy, unix.SHUT_WR); err != nil {
		return err
	}
	if got, err := Read(server.App, 1); err != nil || len(got) != 0 {
		return fmt.Errorf("%q was read behind the end (%w)", got, err)
	}
	return nil
}

// bodies: of messages that the applications send in one piece, beginning and end come to the proxy and what is between goes to
// the other application; and again, for the next message.
func bodies(s *Stage, client, server *Pair) error {
	a, err := s.d.PairUp(s.d.AsideEnd(client.Proxy), s.d.AsideEnd(server.Proxy))
	if err != nil {
		return err
	}
	defer a.Close()
	legs := [2]struct{ from, near, relay, to int }{
		datapath.ToServer: {client.App, client.Proxy, server.Proxy, server.App},
		datapath.ToClient: {server.App, server.Proxy, client.Proxy, client.App},
	}
	var received, written [2]uint64
	for round := range 4 {
		i := round % 2
		leg := legs[i]
		a.Forwarded(i).Store(received[i])
		a.Allow(i, received[i], 10)
		if err := Write(leg.from, []byte("0123456789ABC")); err != nil {
			return err
		}
		if err := get(leg.to, "0123456789"); err != nil {
			return fmt.Errorf("past the proxy: %w", err)
		}
		if err := get(leg.near, "ABC"); err != nil {
			return fmt.Errorf("to the proxy, behind what went past it: %w", err)
		}
		if err := errors.Join(Write(leg.relay, []byte("ABC")), get(leg.to, "ABC")); err != nil {
			return err
		}
		received[i] += 3
		written[i] += 10
		if n := a.Carried(i); n != written[i] {
			return fmt.Errorf("%d bytes are counted, of %d", n, written[i])
		}
	}
	return nil
}

// get reads just that.
func get(fd int, want string) error {
	got, err := Read(fd, len(want))
	if err == nil && string(got) != want {
		err = fmt.Errorf("%q was read instead of %q", got, want)
	}
	return err
}
