// Command bench compares proxies side by side, pod to pod on one node made of network namespaces: sockmesh, Envoy,
// HAProxy and nginx, each behind iptables and behind our hooks, and no proxy at all.
//
// Machines are noisy, so only ratios within one run mean anything: every combination is set up, warmed up, measured
// and taken down once per round, and the rounds alternate. Printed are medians with minimum and maximum over the
// rounds. A run with errors is no result. A benchmark prints; it never fails a test run.
//
// scenarios.go says under what load, cases.go what is compared, proxies.go how each proxy is tuned, paths.go how connections
// come to it, measure.go, syscalls.go and tcp.go what is measured, report.go how it is shown, aims.go what is wanted; latency.go, churn.go, idle.go,
// clusters.go and loops.go are scenarios that measure something else than closed-loop load.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

type options struct {
	rounds, connections  int
	duration, warmUp     time.Duration
	scenario, proxy, out string
	path                 string
	build                string
	services             string
	sync, within         time.Duration
}

// serviceCounts are the numbers of Services of the scenario services, in ascending order.
func (o options) serviceCounts() ([]int, error) {
	var counts []int
	for text := range strings.SplitSeq(o.services, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || len(counts) > 0 && n <= counts[len(counts)-1] {
			return nil, fmt.Errorf("-services %s: want ascending numbers, such as 10,1000", o.services)
		}
		counts = append(counts, n)
	}
	return counts, nil
}

func main() {
	if len(os.Args) > 1 && programs[os.Args[1]] != nil {
		if err := programs[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "how often each combination is measured")
	flag.IntVar(&o.connections, "connections", 64, "client connections")
	flag.DurationVar(&o.duration, "duration", 2*time.Second, "length of one measurement")
	flag.DurationVar(&o.warmUp, "warm-up", time.Second, "load before each measurement, under which system calls are counted")
	flag.StringVar(&o.scenario, "scenario", "all", "comma-separated: "+strings.Join(scenarioNames(), ", ")+"; or all")
	flag.StringVar(&o.proxy, "proxy", "", "only these proxies, comma-separated: "+strings.Join(proxyNames, ", ")+" (sockmesh is on io_uring where there is one)")
	flag.StringVar(&o.path, "path", "", "only these paths, comma-separated: "+strings.Join(pathNames, ", "))
	flag.StringVar(&o.out, "out", "build/bench.json", "where the results go as JSON")
	flag.StringVar(&o.services, "services", "10,1000,10000,30000", "scenario services: how many there are, in ascending steps")
	flag.DurationVar(&o.sync, "sync", 5*time.Minute, "scenario services: how long a proxy may take to know all of them before it is left out")
	flag.DurationVar(&o.within, "within", 0, "end after this time with what has been measured; 0: never")
	flag.Parse()
	chosen, err := chooseScenarios(o.scenario)
	_, countErr := o.serviceCounts()
	if err := errors.Join(err, countErr, o.positive(), known("proxy", o.proxy, proxyNames), known("path", o.path, pathNames), unknownArguments(flag.Args())); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if o.within > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.within)
		defer cancel()
	}
	if err := run(ctx, o, chosen); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// What -proxy and -path choose from; the scenario services names its own proxies.
var (
	proxyNames = []string{"none", "sockmesh", "sockmesh-epoll", "envoy", "haproxy", "nginx", "floor", "kube-proxy-iptables", "kube-proxy-nftables"}
	pathNames  = []string{"none", "iptables", "connect", "sockmap"}
)

// known returns an error if the comma-separated list, which may be empty, has a name that isn't among those.
func known(flag, list string, names []string) error {
	for name := range strings.SplitSeq(list, ",") {
		if list != "" && !slices.Contains(names, name) {
			return fmt.Errorf("-%s: there is no %q; there are %s", flag, name, strings.Join(names, ", "))
		}
	}
	return nil
}

// positive returns an error that names the flags that must be more than nothing and aren't.
func (o options) positive() error {
	var errs []error
	for _, f := range []struct {
		name string
		ok   bool
	}{{"rounds", o.rounds > 0}, {"connections", o.connections > 0}, {"duration", o.duration > 0}, {"warm-up", o.warmUp > 0}, {"sync", o.sync > 0}} {
		if !f.ok {
			errs = append(errs, fmt.Errorf("-%s: want more than 0", f.name))
		}
	}
	return errors.Join(errs...)
}

func unknownArguments(args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("no arguments are expected, only flags: %q", args)
}

// run measures, and prints what it has when it is stopped or a scenario fails.
func run(ctx context.Context, o options, scenarios []scenario) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	o.build = filepath.Dir(filepath.Dir(self))
	if err := lab.Check("wrk", "curl", "nginx", "haproxy", "iptables", "nft"); err != nil {
		return err
	}
	w, err := newWorld(ctx, o)
	if w != nil {
		defer func() { err = errors.Join(err, w.lab.Close()) }()
	}
	if err != nil {
		return err
	}

	report := newReport(o)
	err = w.measureAll(ctx, scenarios, report)
	progress("")
	report.print(os.Stdout)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil {
		err = fmt.Errorf("ended after %s; what had been measured by then is printed above: %w", o.within, err)
	}
	return errors.Join(err, report.write(o.out))
}

func (w *world) measureAll(ctx context.Context, scenarios []scenario, report *report) error {
	for _, s := range scenarios {
		if s.run != nil {
			if err := s.run(ctx, w.o, s, report); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			continue
		}
		cases := w.cases(s)
		rounds := w.o.rounds
		if s.maxRounds > 0 {
			rounds = min(rounds, s.maxRounds)
		}
		for round := range rounds {
			for _, c := range cases {
				if err := ctx.Err(); err != nil {
					return err
				}
				progress("%s, round %d of %d: %s", s.name, round+1, rounds, c)
				sample, err := w.measure(ctx, s, c)
				report.add(s, c, sample, err)
			}
		}
	}
	return nil
}

// fileLimitNow raises the limit of descriptors as far as the machine allows, for this process and those that it starts, and
// returns it.
func fileLimitNow() uint64 {
	const enough = 65536
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return 1024
	}
	if l.Max < enough && unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: enough, Max: enough}) == nil {
		return enough
	}
	l.Cur = l.Max
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	return l.Cur
}

// progress overwrites one line of a terminal; a log has no use for it.
func progress(format string, args ...any) {
	if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		fmt.Fprintf(os.Stderr, "\r%-78s\r", fmt.Sprintf(format, args...))
	}
}

// stage says on a line of its own, with the time, how far a long scenario has come: on a terminal and in a log.
func stage(format string, args ...any) {
	progress("")
	fmt.Fprintln(os.Stderr, time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}
