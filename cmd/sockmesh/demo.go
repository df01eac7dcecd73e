package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/demo"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// newDemoCommand is `sockmesh demo`. Its hidden child is the load generator that the demo starts inside its client pod:
// the hooks see only what runs there.
func newDemoCommand() *cobra.Command {
	var o demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job on a small cluster of network namespaces, without Kubernetes",
		Long: `Builds a node with eight pods out of network namespaces, runs real curl, nginx, Redis and MariaDB in them, and shows
canary routing, kernel offload, kernel Services, acceleration and failing open; each line with what was observed.
Needs root. Everything is removed at the end, also after Ctrl-C.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
			defer stop()
			self, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			if o.Binaries == "" {
				o.Binaries = filepath.Dir(self)
			}
			o.Helper = []string{self, "demo", "traffic"}
			o.Out = cmd.OutOrStdout()
			cmd.SilenceUsage = true
			return demo.Run(ctx, o)
		},
	}
	cmd.Flags().BoolVar(&o.Keep, "keep", os.Getenv("KEEP") == "1", "leave it running and print commands to try, until Ctrl-C (also KEEP=1)")
	cmd.Flags().StringVar(&o.Binaries, "binaries", "", "directory with sockmesh-agent and sockmesh-control (default: that of this program)")
	cmd.AddCommand(&cobra.Command{
		Use: "traffic CONFIG", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM)
			defer stop()
			return traffic.Main(ctx, args, cmd.OutOrStdout())
		},
	})
	return cmd
}
