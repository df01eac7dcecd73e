// Package demo shows the main job on a small cluster of network namespaces, with real curl, nginx, Redis and MariaDB:
// each line is something that was observed just now, with its figure, and the run succeeds only if all of it was seen.
//
// world.go builds the cluster, steps.go and failover.go hold what is shown, in order.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Options of a run.
type Options struct {
	// Binaries is where sockmesh-agent, sockmesh-control and sockmesh are.
	Binaries string
	// Helper is the command line that ends up in traffic.Main.
	Helper []string
	// Keep leaves the cluster running, after showing commands to try, until the context ends.
	Keep bool
	// Out is where the lines go.
	Out io.Writer
}

// ErrFailed: something that should have been seen was not; the lines say what.
var ErrFailed = errors.New("not everything was seen to work")

// programs that the demo runs, all from scripts/deps.sh.
var programs = []string{"curl", "nginx", "redis-server", "redis-cli", "mariadbd", "mariadb", "mariadb-install-db", "nft", "iptables-save", "nsenter"}

// Run builds the cluster, shows everything and removes the cluster, also when the context ends first.
func Run(ctx context.Context, o Options) (err error) {
	if err := Check(o); err != nil {
		return err
	}
	began := time.Now()
	w, err := newWorld(ctx, o)
	if w != nil {
		defer func() { err = errors.Join(err, w.lab.Close()) }()
	}
	if err != nil {
		return err
	}
	printf := func(format string, args ...any) { fmt.Fprintf(o.Out, format, args...) }
	printf("\nsockmesh demo: %d pods on one node, %d network namespaces, ready after %.1f s\n\n",
		w.lab.Namespaces()-1, w.lab.Namespaces(), time.Since(began).Seconds())

	failed := 0
	for _, s := range w.steps() {
		stepCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
		seen, err := s.show(stepCtx)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		mark := "ok  "
		if err != nil {
			mark, seen, failed = "FAIL", err.Error(), failed+1
		}
		printf("  %s %-36s %s\n", mark, s.title, strings.ReplaceAll(strings.TrimSpace(seen), "\n", "\n"+strings.Repeat(" ", 44)))
	}
	printf("\n%d passed, %d failed, %.1f s\n", len(w.steps())-failed, failed, time.Since(began).Seconds())

	if failed > 0 {
		if dir, err := keepLogs(w.lab); err == nil {
			printf("what the processes wrote is in %s\n", dir)
		}
	}
	if o.Keep {
		w.invite(printf)
		<-ctx.Done()
	}
	if failed > 0 {
		return ErrFailed
	}
	return nil
}

// Check says whether the demo can run here, before anything is changed.
func Check(o Options) error {
	for _, b := range []string{"sockmesh-agent", "sockmesh-control", "sockmesh"} {
		if _, err := os.Stat(filepath.Join(o.Binaries, b)); err != nil {
			return fmt.Errorf("the demo needs %s beside this program (%w): `make build`", b, err)
		}
	}
	return lab.Check(programs...)
}

func keepLogs(l *lab.Lab) (string, error) {
	dir, err := os.MkdirTemp("", "sockmesh-demo-logs-")
	if err == nil {
		err = l.SaveLogs(dir)
	}
	return dir, err
}

// invite prints commands to try on the running cluster.
func (w *world) invite(printf func(string, ...any)) {
	in := filepath.Join(w.lab.Dir, "in")
	cli := fmt.Sprintf("%s --admin %s", filepath.Join(w.o.Binaries, "sockmesh"), w.lab.Admin())
	printf("\nthe cluster is running; try, in another terminal:\n\n")
	for _, line := range []string{
		fmt.Sprintf("%s shop/client curl -s http://%s/", in, w.shop.VIP(0)),
		fmt.Sprintf("%s shop/client curl -s -H 'x-canary: always' 'http://[%s]/'", in, w.shop.VIP(1).Addr()),
		fmt.Sprintf("%s shop/client redis-cli -h %s get version", in, w.redis.VIP(0).Addr()),
		cli + " status",
		cli + " sockets",
		cli + fmt.Sprintf(" explain --from shop/client http://%s/ -H x-canary:always", w.shop.VIP(0)),
		"$EDITOR " + filepath.Join(w.lab.Dir, "xds", "shop-routes.yaml") + "     # served at once",
	} {
		printf("  %s\n", line)
	}
	printf("\nCtrl-C ends it and removes everything.\n")
}
