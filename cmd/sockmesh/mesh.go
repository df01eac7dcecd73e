package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func newListenersCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "listeners",
		Short: "xDS listeners: what each claims, and whether the kernel or the proxy handles it",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/listeners", func(w io.Writer, list []api.Listener) error {
				t := cli.NewTable("NAME", "ADDRESSES", "HANDLED BY", "CHAINS", "WHY")
				for _, l := range list {
					chains := make([]string, len(l.Chains))
					for i, c := range l.Chains {
						chains[i] = c.Kind
						if c.Routes != "" {
							chains[i] += ":" + c.Routes
						}
						if c.Targets != "" {
							chains[i] += ":" + c.Targets
						}
					}
					t.Row(l.Name, strings.Join(l.Addresses, ","), l.Mode, strings.Join(chains, "; "), l.Reason)
				}
				return t.Write(w, "No listeners.")
			})
		},
	}
}

func newRoutesCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "routes",
		Short: "Routes in the order in which they are tried",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/routes", func(w io.Writer, list []api.Route) error {
				t := cli.NewTable("CONFIG", "HOST", "DOMAINS", "#", "NAME", "MATCH", "ACTION")
				for _, r := range list {
					t.Row(r.Config, r.Host, strings.Join(r.Domains, ","), fmt.Sprint(r.Index), r.Name, r.Match, r.Action)
				}
				return t.Write(w, "No routes.")
			})
		},
	}
}

func newClustersCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "clusters",
		Short: "xDS clusters",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/clusters", func(w io.Writer, list []api.Cluster) error {
				t := cli.NewTable("NAME", "TYPE", "POLICY", "ENDPOINTS", "CONNECT TIMEOUT", "VERSION")
				for _, c := range list {
					t.Row(c.Name, c.Discovery, c.Policy, fmt.Sprintf("%d/%d", c.Usable, c.Endpoints), fmt.Sprintf("%dms", c.TimeoutMS), short(c.Version))
				}
				return t.Write(w, "No clusters.")
			})
		},
	}
}

func newEndpointsCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "endpoints",
		Short: "The endpoints of xDS clusters",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/endpoints", func(w io.Writer, list []api.Endpoint) error {
				t := cli.NewTable("CLUSTER", "ADDRESS", "HEALTH", "PRIORITY", "WEIGHT", "LOCALITY", "POD")
				for _, e := range list {
					t.Row(e.Cluster, e.Address, e.Health, fmt.Sprint(e.Priority), fmt.Sprint(e.Weight), e.Locality, e.Pod)
				}
				return t.Write(w, "No endpoints.")
			})
		},
	}
}

// short cuts what only tells versions apart, like a hash; -o json has all of it.
func short(version string) string {
	const enough = 12
	if len(version) > enough+1 {
		return version[:enough] + "…"
	}
	return version
}
