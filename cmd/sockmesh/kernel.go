package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func newSocketsCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "sockets",
		Short: "Sockets that the datapath touched: redirected or not, and why",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/sockets", func(w io.Writer, list []api.Socket) error {
				t := cli.NewTable("POD", "ROLE", "LOCAL", "REMOTE", "ORIGINAL", "REDIRECTED", "STATE", "SOCKET TO SOCKET", "BY TCP", "WHY", "ASIDE", "PAST THE PROXY", "WHY NOT")
				for _, s := range list {
					t.Row(s.Pod, s.Role, s.Local, s.Remote, s.Origin, cli.YesNo(s.Redirects), s.State,
						cli.Bytes(s.Redirected), cli.Bytes(s.Passed), s.Reason, s.Aside, cli.Bytes(s.AsideBytes), s.AsideReason)
				}
				return t.Write(w, "No sockets.")
			})
		},
	}
}

func newMapsCommand(o *options) *cobra.Command {
	maps := &cobra.Command{
		Use:   "maps",
		Short: "BPF maps and how full they are",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/maps", func(w io.Writer, list []api.Map) error {
				t := cli.NewTable("NAME", "ID", "TYPE", "ENTRIES", "MAX", "FULL")
				for _, m := range list {
					full := "-"
					if m.MaxEntries > 0 && !strings.Contains(m.Type, "Array") { // an array is always full
						full = fmt.Sprintf("%d%%", m.Entries*100/uint64(m.MaxEntries))
					}
					t.Row(m.Name, fmt.Sprint(m.ID), m.Type, fmt.Sprint(m.Entries), fmt.Sprint(m.MaxEntries), full)
				}
				return t.Write(w, "No maps.")
			})
		},
	}
	maps.AddCommand(&cobra.Command{
		Use:   "dump NAME",
		Short: "A map's content by field name",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return show(cmd, o, pathOf("maps", args[0]), func(w io.Writer, d api.MapDump) error {
				t := cli.NewTable("KEY", "VALUE")
				for _, e := range d.Dump {
					t.Row(flat(e.Key), flat(e.Value))
				}
				return t.Write(w, "The map is empty.")
			})
		},
	})
	return maps
}

// flat writes a JSON object as one line of name=value, in the order in which it came.
func flat(raw json.RawMessage) string {
	dec := json.NewDecoder(bytes.NewReader(raw))
	open, err := dec.Token()
	if err != nil || open != json.Delim('{') {
		return strings.Trim(string(raw), `"`)
	}
	var parts []string
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return string(raw)
		}
		var v json.RawMessage
		if dec.Decode(&v) != nil {
			return string(raw)
		}
		parts = append(parts, fmt.Sprintf("%v=%s", name, strings.Trim(string(v), `"`)))
	}
	return strings.Join(parts, " ")
}
