// Command sockmesh-control is a reference xDS control plane: it serves a folder of YAML or JSON resources.
package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/pkg/cli"
	"github.com/sockmesh/sockmesh/pkg/control"
)

func main() { os.Exit(cli.Main(command(), os.Args[1:])) }

func command() *cobra.Command {
	var cfg control.Config
	var listen, level, format string
	cmd := &cobra.Command{
		Use:   "sockmesh-control --dir DIR",
		Short: "Serve a folder of xDS resources to data planes",
		Long: `sockmesh-control serves the xDS resources of a folder of YAML or JSON files: each file holds documents or lists
of resources, each with its "@type" (or a file name that tells it: x.listeners.yaml). The folder is watched. Every
type is served over ADS and over streams of its own, state of the world and delta, and by REST at
/v3/discovery:TYPE; /status says what is served to whom. A file that does not parse leaves the last good set in
place.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := newLogger(level, format)
			if err != nil {
				return cli.Usagef("%w", err)
			}
			if cfg.Dir == "" {
				return cli.Usagef("--dir is needed: a folder of xDS resources")
			}
			cfg.Logger = logger
			server, err := control.New(cfg)
			if err != nil {
				return err
			}
			network, address := "tcp", listen
			if path, ok := strings.CutPrefix(listen, "unix://"); ok {
				network, address = "unix", path
			}
			l, err := net.Listen(network, address)
			if err != nil {
				return fmt.Errorf("--listen %s: %w", listen, err)
			}
			logger.Info("listening", "address", l.Addr().String(), "dir", cfg.Dir)
			return server.Serve(cmd.Context(), l)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&cfg.Dir, "dir", "", "folder of YAML and JSON files, watched")
	flags.StringVar(&listen, "listen", "127.0.0.1:18000", "host:port or unix:///path for gRPC, REST and /status")
	flags.StringVar(&cfg.TLSCert, "tls-cert", "", "PEM certificate chain; switches TLS on")
	flags.StringVar(&cfg.TLSKey, "tls-key", "", "PEM private key")
	flags.StringVar(&cfg.TLSClientCA, "tls-client-ca", "", "PEM certificates; clients must show one signed by them")
	flags.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&format, "log-format", "text", "text or json")
	return cmd
}

func newLogger(level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: expected debug, info, warn or error", level)
	}
	options := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), nil
	}
	return nil, fmt.Errorf("--log-format %q: expected text or json", format)
}
