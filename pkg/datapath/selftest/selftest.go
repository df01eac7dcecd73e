package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
)

// check is one thing that redirected sockets must do as TCP does.
type check struct {
	name string
	// vital: without it nothing may be accelerated. The others are reported.
	vital bool
	// lost says what is missing if a check that is not vital fails.
	lost string
	run  func(*Stage) error
}

var checks = []check{
	{"selftest_redirect", true, "", redirect},
	{"selftest_fionread", true, "", fionreadRedirected},
	{"selftest_epoll_edge", true, "", epollEdge},
	{"selftest_half_close", true, "", halfClose},
	{"selftest_backpressure_and_order", true, "", backpressure},
	{"selftest_fionread_plain", false, "an application that asks FIONREAD reads 0 where a direction went back to TCP, so directions towards applications go back late", fionreadPlain},
	{"selftest_foreign_sockmap", false, "another tool's sockmap may take our sockets over", foreignSockmap},
	{"selftest_splice", true, "", spliceTurnsToTCP},
	{stepAsideCheck, false, "all bytes of proxied connections pass the proxy", stepAside},
}

const stepAsideCheck = "selftest_step_aside"

// Run tries everything and tells what came of it. It takes some tens of milliseconds.
func Run(ctx context.Context, d *datapath.Datapath) []datapath.Probe {
	probes, _ := run(ctx, d)
	return probes
}

// Guard runs the self-test and switches acceleration off if something vital fails, or that part of it that fails, with
// the reason in status and in the log. It does nothing while acceleration is off anyway.
func Guard(ctx context.Context, d *datapath.Datapath, log *slog.Logger) error {
	if !d.Accelerating() {
		return nil
	}
	start := time.Now()
	probes, failure := run(ctx, d)
	d.AddProbes(probes)
	for _, p := range probes {
		if p.Name == stepAsideCheck && !p.OK && d.StepsAside() {
			log.Warn("no connection's bytes will skip the proxy: the self-test found that this kernel can't be trusted with it", "reason", p.Detail)
			d.DisableStepAside("self-test: " + p.Detail)
		}
	}
	for i, c := range checks {
		if i < len(probes) && !probes[i].OK && !c.vital && c.name != stepAsideCheck {
			log.Info("this kernel has a limit that the self-test found, and acceleration goes on", "check", c.name, "reason", probes[i].Detail)
		}
	}
	if failure == nil {
		log.Info("redirected sockets behave as TCP does on this kernel", "checks", len(probes), "took", time.Since(start))
		return nil
	}
	log.Warn("acceleration is off: the self-test found that this kernel can't be trusted with it", "reason", failure, "took", time.Since(start))
	return d.SetAcceleration(false, "self-test: "+failure.Error())
}

// run returns every probe and the first vital failure.
func run(ctx context.Context, d *datapath.Datapath) (probes []datapath.Probe, failure error) {
	stage, err := NewStage(d)
	if err != nil {
		err = fmt.Errorf("the self-test can't be set up: %w", err)
		return []datapath.Probe{{Name: "selftest", Detail: err.Error()}}, err
	}
	defer func() {
		if err := stage.Close(); err != nil && failure == nil {
			failure = err
		}
	}()
	for _, c := range checks {
		err := ctx.Err()
		if err == nil {
			err = c.run(stage)
		}
		if errors.Is(err, errTimeout) { // maybe the node, busy while everything on it starts
			err = c.run(stage)
		}
		p := datapath.Probe{Name: c.name, OK: err == nil}
		if err != nil {
			p.Detail = err.Error()
			if c.lost != "" {
				p.Detail += ": " + c.lost
			}
			if c.vital && failure == nil {
				failure = fmt.Errorf("%s: %w", c.name, err)
			}
		}
		probes = append(probes, p)
	}
	return probes, failure
}

// onPair runs f on a redirected pair.
func (s *Stage) onPair(fam Family, f func(*Pair) error) error {
	p, err := s.Pair(fam, true)
	if err != nil {
		return err
	}
	defer p.Close()
	return f(p)
}

func transfer(from, to int, text string) error {
	if err := Write(from, []byte(text)); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	got, err := Read(to, len(text))
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if string(got) != text {
		return fmt.Errorf("%q was read of %q", got, text)
	}
	return nil
}

// Every family, both directions.
func redirect(s *Stage) error {
	for _, fam := range Families {
		err := s.onPair(fam, func(p *Pair) error {
			if err := errors.Join(transfer(p.Proxy, p.App, "to the application"), transfer(p.App, p.Proxy, "and back")); err != nil {
				return err
			}
			if to, back := p.Sends(p.Proxy), p.Sends(p.App); to != "redirect" || back != "redirect" {
				return fmt.Errorf("bytes are not redirected: %q, %q", to, back)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", fam, err)
		}
	}
	return nil
}

func fionreadRedirected(s *Stage) error {
	return s.onPair(IPv4, func(p *Pair) error {
		if err := Write(p.Proxy, make([]byte, 1000)); err != nil {
			return err
		}
		if err := Wait(p.App, unix.POLLIN); err != nil {
			return err
		}
		if n, err := unix.IoctlGetInt(p.App, unix.SIOCINQ); err != nil || n != 1000 {
			return fmt.Errorf("FIONREAD says %d (%w) with 1000 redirected bytes waiting", n, err)
		}
		return nil
	})
}

// An edge-triggered waiter is woken by every arrival, and only then.
func epollEdge(s *Stage) error {
	return s.onPair(IPv4, func(p *Pair) error {
		ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		if err != nil {
			return err
		}
		defer unix.Close(ep)
		const edge = 1 << 31 // EPOLLET, which x/sys has as a negative number
		if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, p.App, &unix.EpollEvent{Events: unix.EPOLLIN | edge}); err != nil {
			return err
		}
		for range 3 {
			if err := Write(p.Proxy, []byte("edge")); err != nil {
				return err
			}
			if err := Wait(ep, unix.POLLIN); err != nil {
				return fmt.Errorf("no wake-up: %w", err)
			}
			events := make([]unix.EpollEvent, 1)
			if n, err := unix.EpollWait(ep, events, 0); err != nil || n != 1 {
				return fmt.Errorf("%d events (%w)", n, err)
			}
			if got, err := Read(p.App, 4); err != nil || string(got) != "edge" {
				return fmt.Errorf("%q was read (%w)", got, err)
			}
			if n, err := unix.EpollWait(ep, events, 0); err != nil || n != 0 {
				return fmt.Errorf("%d events although all is read (%w)", n, err)
			}
		}
		return nil
	})
}

// The end of the data comes after the data, and the other direction goes on.
func halfClose(s *Stage) error {
	return s.onPair(IPv4, func(p *Pair) error {
		if err := Write(p.Proxy, []byte("last words")); err != nil {
			return err
		}
		if err := unix.Shutdown(p.Proxy, unix.SHUT_WR); err != nil {
			return err
		}
		if got, err := Read(p.App, 100); err != nil || string(got) != "last words" {
			return fmt.Errorf("%q was read before the end (%w)", got, err)
		}
		if err := Write(p.App, []byte("answer")); err != nil {
			return err
		}
		if err := unix.Close(p.App); err != nil {
			return err
		}
		p.App = -1
		if got, err := Read(p.Proxy, 100); err != nil || string(got) != "answer" {
			return fmt.Errorf("%q was read after the half-close (%w)", got, err)
		}
		return nil
	})
}

// fill writes from the application's end, 64 KiB at a time, until nothing more goes. The proxy's end is where the lower
// limit is in force.
func fill(p *Pair, limit int) (sent []byte, err error) {
	for _, fd := range []int{p.App, p.Proxy} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 64<<10); err != nil {
			return nil, err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<10); err != nil {
			return nil, err
		}
	}
	chunk := make([]byte, 64<<10)
	for idle := 0; idle < 5 && len(sent) < limit; {
		for i := range chunk {
			at := uint64(len(sent) + i)
			chunk[i] = byte(at * 2654435761 >> 13)
		}
		n, err := unix.Write(p.App, chunk)
		if errors.Is(err, unix.EAGAIN) {
			idle++
			time.Sleep(2 * time.Millisecond) // what is under way may still make room
			continue
		}
		if err != nil {
			return nil, err
		}
		idle = 0
		sent = append(sent, chunk[:n]...)
	}
	return sent, nil
}

// A reader that doesn't read stops its sender, and finds everything in order although it came by two ways.
func backpressure(s *Stage) error {
	return s.onPair(IPv4, func(p *Pair) error {
		limit := 2*int(s.d.BacklogLimit()) + 4<<20
		sent, err := fill(p, limit)
		if err != nil {
			return err
		}
		if len(sent) >= limit {
			return fmt.Errorf("nothing stops the sender: %d bytes lie unread", len(sent))
		}
		if how := p.Sends(p.App); how != "tcp" {
			return fmt.Errorf("with %d bytes unread the direction is still %q", len(sent), how)
		}
		got, err := Read(p.Proxy, len(sent))
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", len(got), len(sent), err)
		}
		if !bytes.Equal(got, sent) {
			return errors.New("bytes that were redirected and bytes that came by TCP after them are out of order")
		}
		return transfer(p.App, p.Proxy, "and on by TCP")
	})
}

// FIONREAD of a socket that is enrolled, whose bytes come by TCP.
func fionreadPlain(s *Stage) error {
	return s.onPair(IPv4, func(p *Pair) error {
		sent, err := fill(p, 2*int(s.d.BacklogLimit())+4<<20)
		if err != nil {
			return err
		}
		if _, err := Read(p.Proxy, len(sent)); err != nil {
			return err
		}
		if err := Write(p.App, make([]byte, 1000)); err != nil {
			return err
		}
		if err := Wait(p.Proxy, unix.POLLIN); err != nil {
			return err
		}
		if n, err := unix.IoctlGetInt(p.Proxy, unix.SIOCINQ); err != nil || n != 1000 {
			return fmt.Errorf("FIONREAD says %d with 1000 plain bytes waiting on an enrolled socket", n)
		}
		return nil
	})
}

// An application that splices is noticed, and gets its bytes.
func spliceTurnsToTCP(s *Stage) error {
	return s.onPair(IPv4, func(p *Pair) error {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
			return err
		}
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		if n, err := Splice(p.App, pipe[1], 100); !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("a splice of nothing gives %d (%w)", n, err)
		}
		if err := Write(p.Proxy, []byte("spliced")); err != nil {
			return err
		}
		if err := Wait(p.App, unix.POLLIN); err != nil {
			return err
		}
		if n, err := Splice(p.App, pipe[1], 100); err != nil || n != 7 {
			return fmt.Errorf("an application that splices does not get its bytes: %d (%w)", n, err)
		}
		return nil
	})
}

// Splice moves up to n bytes from a socket into a pipe.
func Splice(from, to, n int) (int64, error) {
	//nolint:forbidigo // this is the case that the rule is about
	return unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_NONBLOCK)
}
