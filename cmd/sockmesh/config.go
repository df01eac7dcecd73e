package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/config"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func newConfigCommand(o *options) *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "The xDS configuration in force"}
	c.AddCommand(&cobra.Command{
		Use:   "dump",
		Short: "Everything in Envoy's config_dump format, secrets redacted",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := api.NewClient(o.admin)
			if err != nil {
				return &cli.UsageError{Err: err}
			}
			defer client.Close()
			raw, err := client.Get(cmd.Context(), "/config_dump")
			if err != nil {
				return err
			}
			// A tree has no table: people read it as YAML.
			return cli.Print(cmd.OutOrStdout(), o.format, raw, func(w io.Writer) error {
				y, err := yaml.JSONToYAML(raw)
				if err != nil {
					return err
				}
				_, err = w.Write(y)
				return err
			})
		},
	})
	return c
}

func newLoggingCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:       "logging [LEVEL]",
		Short:     "Show or change the agent's log level, until it restarts",
		Args:      cobra.MaximumNArgs(1),
		ValidArgs: config.LogLevels,
		RunE: func(cmd *cobra.Command, args []string) error {
			table := func(w io.Writer, l api.Logging) error { _, err := fmt.Fprintln(w, l.Level); return err }
			if len(args) == 0 {
				return show(cmd, o, "/logging", table)
			}
			if _, err := config.ParseLevel(args[0]); err != nil {
				return cli.Usagef("level %q: %w", args[0], err)
			}
			client, err := api.NewClient(o.admin)
			if err != nil {
				return &cli.UsageError{Err: err}
			}
			defer client.Close()
			raw, err := client.Post(cmd.Context(), "/logging", api.Logging{Level: args[0]})
			if err != nil {
				return err
			}
			return printAnswer(cmd, o, raw, table)
		},
	}
}

func newVersionCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "This program's version, and the agent's where one runs",
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Client version.Info `json:"client"`
				Agent  string       `json:"agent,omitempty"`
			}{Client: version.Get(), Agent: agentVersion(cmd, o)}
			return cli.PrintValue(cmd.OutOrStdout(), o.format, v, func(w io.Writer) error {
				fmt.Fprintf(w, "sockmesh %s\n", v.Client.Line())
				if v.Agent != "" {
					fmt.Fprintf(w, "agent    %s\n", v.Agent)
				}
				return nil
			})
		},
	}
}

// agentVersion asks; that no agent runs is no error here.
func agentVersion(cmd *cobra.Command, o *options) string {
	client, err := api.NewClient(o.admin)
	if err != nil {
		return ""
	}
	defer client.Close()
	raw, err := client.Get(cmd.Context(), "/status")
	if err != nil {
		return ""
	}
	var s api.Status
	if yaml.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s.Version
}
