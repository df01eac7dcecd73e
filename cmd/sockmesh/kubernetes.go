package main

import (
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func newPodsCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "pods",
		Short: "This node's pods: enrolled or not and why, their network namespaces",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/pods", func(w io.Writer, pods []api.Pod) error {
				t := cli.NewTable("NAMESPACE", "NAME", "ENROLLED", "STATE", "IPS", "NETNS", "WHY")
				for _, p := range pods {
					why := p.Rule
					if p.Reason != "" {
						why = p.Reason + "; " + why
					}
					t.Row(p.Namespace, p.Name, cli.YesNo(p.Enrolled), p.State, strings.Join(p.IPs, ","), p.Netns, why)
				}
				return t.Write(w, "No pods on this node.")
			})
		},
	}
}
