package main

import (
	"fmt"
	"io"
	"net/textproto"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/describe"
	"github.com/sockmesh/sockmesh/agent/explain"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func newExplainCommand(o *options) *cobra.Command {
	var req api.ExplainRequest
	var headers []string
	cmd := &cobra.Command{
		Use:   "explain --from NAMESPACE/POD|host|outside[:IP] URL",
		Short: "Every decision on a connection's or a request's way, with the rule that made it",
		Long: "explain follows a connection from a pod of this node: is the pod enrolled, which listener claims the address,\n" +
			"is it handled in the kernel or by the proxy, which filter chain, virtual host and route match and why others\n" +
			"don't, and where the bytes end. Nothing is sent. URL is tcp://host:port, http://host/path or udp://host:port;\n" +
			"host is an address or a Service's DNS name. --from host is a process of the node; --from outside a client whose\n" +
			"packets arrive at the node (with :IP source ranges are decided on).",
		Example: "  sockmesh explain --from shop/web-7d9c http://cart.shop/items -H 'x-canary: always'\n" +
			"  sockmesh explain --from shop/web-7d9c udp://kube-dns.kube-system:53\n" +
			"  sockmesh explain --from outside:198.51.100.7 tcp://203.0.113.1:443",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if req.From == "" {
				return cli.Usagef("--from is required: the pod that connects, as NAMESPACE/POD (see sockmesh pods), or host, or outside[:IP]")
			}
			req.URL = args[0]
			for _, h := range headers {
				name, value, ok := strings.Cut(h, ":")
				if !ok || strings.TrimSpace(name) == "" {
					return cli.Usagef("-H %q: expected 'name: value'", h)
				}
				req.Headers = append(req.Headers, [2]string{strings.TrimSpace(name), textproto.TrimString(value)})
			}
			if err := explain.Check(req); err != nil {
				return &cli.UsageError{Err: err}
			}
			client, err := api.NewClient(o.admin)
			if err != nil {
				return &cli.UsageError{Err: err}
			}
			defer client.Close()
			raw, err := client.Post(cmd.Context(), "/explain", req)
			if err != nil {
				return err
			}
			return printAnswer(cmd, o, raw, writeExplanation)
		},
	}
	cmd.Flags().StringVar(&req.From, "from", "", "who connects: the `pod`, NAMESPACE/POD, or host, or outside[:IP]")
	cmd.Flags().StringArrayVarP(&headers, "header", "H", nil, "a request `header`, 'name: value'; may be repeated")
	cmd.Flags().StringVarP(&req.Method, "request", "X", "", "the request's `method` (default GET)")
	return cmd
}

// writeExplanation prints one decision per line and its rule under it.
func writeExplanation(w io.Writer, e api.Explanation) error {
	fmt.Fprintf(w, "%s -> %s\n\n", e.From, e.Target)
	width := 0
	for _, s := range e.Steps {
		width = max(width, len(s.Stage))
	}
	for i, s := range e.Steps {
		fmt.Fprintf(w, "%2d. %-*s  %s\n", i+1, width, s.Stage, s.Result)
		for _, r := range s.Rejected {
			fmt.Fprintf(w, "%*s  not: %s\n", width+4, "", r)
		}
		if s.Rule != "" {
			fmt.Fprintf(w, "%*s  because: %s\n", width+4, "", s.Rule)
		}
	}
	fmt.Fprintf(w, "\n=> %s: %s\n", e.Outcome, e.Verdict)
	if len(e.Destinations) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := cli.NewTable("SHARE", "ENDPOINT", "CLUSTER", "HEALTH", "POD OF THIS NODE")
	for _, d := range e.Destinations {
		t.Row(describe.Percent(d.Percent), d.Address, d.Cluster, d.Health, d.Pod)
	}
	return t.Write(w, "")
}
