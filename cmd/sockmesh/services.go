package main

import (
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func newServicesCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "services [[NAMESPACE/]NAME]",
		Short: "Services and where their connections go",
		Long: "services lists every address with how many of the Service's endpoints take its connections; with a name it shows\n" +
			"each address for clients inside and outside, and where each endpoint stands: ready, draining, terminating, not ready,\n" +
			"used or left out and why.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return show(cmd, o, "/services", writeServices)
			}
			return show(cmd, o, "/services?name="+url.QueryEscape(args[0]), writeService)
		},
	}
}

// writeServices has a row for each address.
func writeServices(w io.Writer, services []api.Service) error {
	t := cli.NewTable("NAMESPACE", "NAME", "TYPE", "ADDRESS", "PROTOCOL", "READY", "NOTES")
	for _, s := range services {
		for _, f := range s.Frontends {
			t.Row(s.Namespace, s.Name, f.Kind, f.Address, f.Protocol, ready(&s, &f), strings.Join(notes(&s, &f), "; "))
		}
		if len(s.Frontends) == 0 {
			t.Row(s.Namespace, s.Name, "", "none", "", "", strings.Join(s.Problems, "; "))
		}
	}
	return t.Write(w, "No Services.")
}

// ready counts endpoints by their addresses: those that take new connections, of all that the Service has in this family.
func ready(s *api.Service, f *api.Frontend) string {
	four := isV4(f.Address)
	used, all := map[string]bool{}, map[string]bool{}
	for _, b := range f.Backends {
		used[host(b.Address)] = true
		all[host(b.Address)] = true
	}
	for _, e := range s.Endpoints {
		if isV4(e.Address) == four {
			all[host(e.Address)] = true
		}
	}
	return fmt.Sprintf("%d/%d", len(used), len(all))
}

func host(addr string) string {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return addr
	}
	return a.Addr().String()
}

func isV4(addr string) bool {
	a, err := netip.ParseAddrPort(addr)
	return err == nil && a.Addr().Is4()
}

// notes are what is worth knowing of an address in few words.
func notes(s *api.Service, f *api.Frontend) []string {
	var out []string
	if f.Port != "" {
		out = append(out, "port "+f.Port)
	}
	if f.Listener != "" {
		out = append(out, "listener "+f.Listener)
	}
	if f.AffinitySeconds > 0 {
		out = append(out, fmt.Sprintf("affinity %ds", f.AffinitySeconds))
	}
	if f.Loopback {
		out = append(out, "for the host only")
	}
	if f.Kind == "ClusterIP" && s.InternalTrafficPolicy == "Local" {
		out = append(out, "internal policy Local")
	}
	if x := f.External; x != nil {
		out = append(out, "outside: "+x.Policy+", "+plural(len(x.Backends), "endpoint"))
		if len(x.Sources) > 0 {
			out = append(out, plural(len(x.Sources), "source range"))
		}
	}
	if n := len(s.Problems); n > 0 {
		out = append(out, plural(n, "problem"))
	}
	return out
}

// writeService shows all that is known of a Service.
func writeService(w io.Writer, services []api.Service) error {
	for i, s := range services {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s/%s\n", s.Namespace, s.Name)
		if s.InternalTrafficPolicy != "" {
			fmt.Fprintf(w, "traffic policy: internal %s", s.InternalTrafficPolicy)
			if s.ExternalTrafficPolicy != "" {
				fmt.Fprintf(w, ", external %s", s.ExternalTrafficPolicy)
			}
			fmt.Fprintln(w)
		}
		t := cli.NewTable("TYPE", "ADDRESS", "PROTOCOL", "PORT", "AFFINITY", "INSIDE", "OUTSIDE", "SOURCES")
		for _, f := range s.Frontends {
			affinity, inside := "", plural(len(f.Backends), "endpoint")
			if f.AffinitySeconds > 0 {
				affinity = fmt.Sprintf("%ds", f.AffinitySeconds)
			}
			if len(f.Backends) == 0 {
				inside = "refused"
			}
			if f.Loopback {
				inside += ", for the host only"
			}
			outside, sources := "-", ""
			if x := f.External; x != nil {
				outside = x.Policy + ", " + plural(len(x.Backends), "endpoint")
				if len(x.Backends) == 0 {
					outside = x.Policy + ", " + x.Without
				}
				sources = strings.Join(x.Sources, ",")
			}
			t.Row(f.Kind, f.Address, f.Protocol, f.Port, affinity, inside, outside, sources)
		}
		if err := t.Write(w, "No addresses."); err != nil {
			return err
		}
		fmt.Fprintln(w)
		if err := writeEndpoints(w, s.Endpoints); err != nil {
			return err
		}
		for _, f := range s.Frontends {
			if f.Listener != "" {
				fmt.Fprintf(w, "%s is claimed by xDS listener %s for enrolled pods\n", f.Address, f.Listener)
			}
		}
		if h := s.HealthCheck; h != nil {
			fmt.Fprintf(w, "health check: port %d, %d IPv4 and %d IPv6 endpoints ready on this node, served on %s\n",
				h.Port, h.LocalReady4, h.LocalReady6, orDash(strings.Join(h.Addresses, ", ")))
		}
		for _, p := range s.Problems {
			fmt.Fprintf(w, "problem: %s\n", p)
		}
	}
	return nil
}

func writeEndpoints(w io.Writer, list []api.ServiceEndpoint) error {
	t := cli.NewTable("ENDPOINT", "STATE", "USED", "WHERE", "POD", "NODE", "ZONE", "WHY")
	for _, e := range list {
		where := "elsewhere"
		if e.Local {
			where = "this node"
		}
		t.Row(e.Address, e.State, cli.YesNo(e.Used), where, e.Pod, e.Node, e.Zone, e.Reason)
	}
	return t.Write(w, "No endpoints: connections are refused at once.")
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
