// Command sockmesh-agent is the per-node daemon: the proxy, and everything that feeds it and the kernel.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/agent/host"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/cli"
	"github.com/sockmesh/sockmesh/pkg/datapath"
)

func main() {
	os.Exit(cli.Run(context.Background(), newRootCommand(), os.Args[1:], os.Stdout, os.Stderr))
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "sockmesh-agent",
		Short: "The node's data plane: Services in the kernel, layer 7 in a proxy, no iptables",
		Example: "  sockmesh-agent --manifests /etc/sockmesh/manifests --xds 127.0.0.1:18000\n" +
			"  sockmesh-agent --kubeconfig /etc/kubernetes/agent.conf --bootstrap /etc/sockmesh/bootstrap.yaml --enroll=all",
		Version: version.Get().Line(),
	}
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	flags := config.NewFlags(root.Flags())
	root.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(flags)
		if err != nil {
			return err
		}
		return run(cfg, flags.Warnings)
	}
	setUsage(root, flags)
	root.AddCommand(newCleanupCommand(), newMountCommand(), &cobra.Command{
		Use: "version", Short: "This program's version",
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), root.Name(), root.Version) },
	})
	return root
}

// load reads and checks the settings.
func load(flags *config.Flags) (config.Config, error) {
	cfg, err := flags.Load(os.Environ())
	if err == nil {
		err = cfg.Validate(config.InCluster())
	}
	if err != nil {
		return cfg, &cli.UsageError{Err: err}
	}
	return cfg, nil
}

// setUsage groups the flags in --help.
func setUsage(cmd *cobra.Command, flags *config.Flags) {
	plain := cmd.UsageFunc()
	cmd.SetUsageFunc(func(c *cobra.Command) error {
		if c != cmd {
			return plain(c)
		}
		w := c.OutOrStderr()
		fmt.Fprintf(w, "Usage:\n  %s [flags]\n  %s [command]\n\nExamples:\n%s\n\nCommands:\n", c.Name(), c.Name(), c.Example)
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() {
				fmt.Fprintf(w, "  %-12s %s\n", sub.Name(), sub.Short)
			}
		}
		fmt.Fprintln(w)
		flags.WriteUsage(w, 110)
		return nil
	})
}

// run is the agent until SIGTERM or SIGINT; a second signal cuts open connections off.
func run(cfg config.Config, warnings []string) error {
	host.LimitGarbage()
	level := new(slog.LevelVar)
	level.Set(cfg.LogLevel)
	log := agent.NewLogger(os.Stderr, cfg.LogFormat, level)
	slog.SetDefault(log)
	for _, w := range warnings {
		log.Warn(w)
	}
	ctx, stop := context.WithCancel(context.Background())
	force, cut := context.WithCancel(context.Background())
	defer stop()
	defer cut()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	go func() {
		for n := 0; ; n++ {
			s, ok := <-signals
			if !ok {
				return
			}
			if n == 0 {
				stop()
				continue
			}
			log.Warn("a second signal: open connections are cut off", "signal", s)
			cut()
		}
	}()
	a, err := agent.New(cfg, log, level)
	if err != nil {
		return err
	}
	go reopenLogs(ctx, a)
	return a.Run(ctx, force)
}

// reopenLogs reopens the access logs on SIGUSR1, for logrotate, as Envoy does.
func reopenLogs(ctx context.Context, a *agent.Agent) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGUSR1)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			a.ReopenLogs()
		}
	}
}

// newMountCommand is for the DaemonSet's init container.
func newMountCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "mount-bpffs DIR",
		Short: "Mount a BPF file system at DIR unless there is one",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			mounted, err := host.MountBPFFS(args[0])
			if err != nil {
				return err
			}
			said := "there is a BPF file system already"
			if mounted {
				said = "a BPF file system has been mounted"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", args[0], said)
			return err
		},
	}
}

// newCleanupCommand removes what an agent leaves in the kernel on purpose.
func newCleanupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove the programs and maps that agents leave in the kernel",
		Long: "An agent that ends leaves its programs and maps in the kernel, so that Services keep working until the next one starts.\n" +
			"cleanup removes them, for a node that is to run without sockmesh. End the agent first.",
	}
	flags := config.NewFlags(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := flags.Load(os.Environ())
		if err != nil {
			return &cli.UsageError{Err: err}
		}
		level := new(slog.LevelVar)
		level.Set(cfg.LogLevel)
		log := agent.NewLogger(cmd.ErrOrStderr(), cfg.LogFormat, level)
		if err := agent.CheckGone(cfg); err != nil {
			return err
		}
		if err := datapath.Cleanup(agent.DatapathConfig(cfg, log)); err != nil {
			return fmt.Errorf("not everything could be removed: %w", err)
		}
		host.LeaveCgroup(cfg.CgroupRoot)
		_, err = fmt.Fprintln(cmd.OutOrStdout(), "Everything of sockmesh below "+cfg.BPFFS+" has been removed from the kernel.")
		return err
	}
	return cmd
}
