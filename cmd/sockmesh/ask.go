package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

// show gets a path of the admin API and prints it: as it came for json and yaml, by table for people.
func show[T any](cmd *cobra.Command, o *options, path string, table func(io.Writer, T) error) error {
	client, err := api.NewClient(o.admin)
	if err != nil {
		return &cli.UsageError{Err: err}
	}
	defer client.Close()
	raw, err := client.Get(cmd.Context(), path)
	if err != nil {
		return err
	}
	return printAnswer(cmd, o, raw, table)
}

// printAnswer prints an answer of the admin API.
func printAnswer[T any](cmd *cobra.Command, o *options, raw []byte, table func(io.Writer, T) error) error {
	return cli.Print(cmd.OutOrStdout(), o.format, raw, func(w io.Writer) error {
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("the agent's answer is not what this version of sockmesh expects (see sockmesh version): %w", err)
		}
		return table(w, v)
	})
}

// pathOf joins path elements that may hold any character.
func pathOf(elements ...string) string {
	p := ""
	for _, e := range elements {
		p += "/" + url.PathEscape(e)
	}
	return p
}
