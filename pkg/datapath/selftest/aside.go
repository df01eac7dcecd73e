package selftest

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// stepAside hands a connection of two legs over: bytes go from application to application behind those that were
// forwarded, both ways, and when the proxy takes it back they come to the proxy.
func stepAside(s *Stage) error {
	for _, fam := range Families {
		if err := s.onPair(fam, func(client *Pair) error {
			return s.onPair(fam, func(server *Pair) error { return skip(s, client, server) })
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
	a, err := s.d.StepAside(client.Proxy, server.Proxy, uint64(len(first)), 0)
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
