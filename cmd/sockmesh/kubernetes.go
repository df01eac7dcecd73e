package main

import (
	"fmt"
	"io"
	"net/url"
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

func newServicesCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "services [[NAMESPACE/]NAME]",
		Short: "Services and where their connections go",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return show(cmd, o, "/services", writeServices)
			}
			return show(cmd, o, "/services?name="+url.QueryEscape(args[0]), writeService)
		},
	}
}

func writeServices(w io.Writer, services []api.Service) error {
	t := cli.NewTable("NAMESPACE", "NAME", "ADDRESS", "PROTOCOL", "TYPE", "ENDPOINTS", "LISTENER")
	for _, s := range services {
		for _, f := range s.Frontends {
			t.Row(s.Namespace, s.Name, f.Address, f.Protocol, f.Kind, fmt.Sprint(len(f.Backends)), f.Listener)
		}
	}
	return t.Write(w, "No Services.")
}

// writeService shows each backend, and what is left out with the reason.
func writeService(w io.Writer, services []api.Service) error {
	for i, s := range services {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s/%s\n", s.Namespace, s.Name)
		t := cli.NewTable("ADDRESS", "PROTOCOL", "ENDPOINT", "STATE", "POD", "NODE", "ZONE")
		for _, f := range s.Frontends {
			for _, b := range f.Backends {
				state := "ready"
				if b.Terminating {
					state = "terminating"
				}
				if b.Local {
					state += ", local"
				}
				t.Row(f.Address, f.Protocol, b.Address, state, b.Pod, b.Node, b.Zone)
			}
			if len(f.Backends) == 0 {
				t.Row(f.Address, f.Protocol, "none", "refused", "", "", "")
			}
		}
		if err := t.Write(w, "No addresses."); err != nil {
			return err
		}
		for _, f := range s.Frontends {
			if f.Listener != "" {
				fmt.Fprintf(w, "%s is claimed by xDS listener %s for enrolled pods\n", f.Address, f.Listener)
			}
			if f.AffinitySeconds > 0 {
				fmt.Fprintf(w, "%s keeps a client at its endpoint for %d s\n", f.Address, f.AffinitySeconds)
			}
		}
		for _, x := range s.Excluded {
			fmt.Fprintf(w, "left out: %s: %s\n", x.Address, x.Reason)
		}
		for _, p := range s.Problems {
			fmt.Fprintf(w, "problem: %s\n", p)
		}
	}
	return nil
}
