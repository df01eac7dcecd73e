// Command sockmesh shows and explains what the agent of this node does. It talks to the agent's admin API and
// keeps no state of its own; validate and demo need no agent at all.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/agent/version"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func main() { os.Exit(cli.Main(newRootCommand(), os.Args[1:])) }

// options are the flags that every command has.
type options struct {
	admin  string
	format cli.Format
}

// newRootCommand builds the command tree.
func newRootCommand() *cobra.Command {
	o := &options{admin: api.DefaultAdmin, format: cli.TableFormat}
	if v := os.Getenv("SOCKMESH_ADMIN"); v != "" {
		o.admin = v
	}
	root := &cobra.Command{
		Use:   "sockmesh",
		Short: "Look into the node's data plane",
		Long: "sockmesh shows what the sockmesh-agent of this node knows and does, and explains its decisions.\n" +
			"Commands that ask the agent need its Unix socket, so run them on the node as root, or in the agent's pod:\n" +
			"  kubectl -n sockmesh-system exec ds/sockmesh-agent -- sockmesh status",
		Version: version.Get().Line(),
	}
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.PersistentFlags().VarP(&o.format, "output", "o", "how to print results")
	root.PersistentFlags().StringVar(&o.admin, "admin", o.admin, "the agent's admin `socket` ($SOCKMESH_ADMIN)")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddGroup(
		&cobra.Group{ID: "look", Title: "What is there:"},
		&cobra.Group{ID: "why", Title: "Why, and what if:"},
	)
	for _, c := range []*cobra.Command{
		newStatusCommand(o), newPodsCommand(o), newServicesCommand(o), newListenersCommand(o), newRoutesCommand(o),
		newClustersCommand(o), newEndpointsCommand(o), newSocketsCommand(o), newMapsCommand(o),
	} {
		c.GroupID = "look"
		root.AddCommand(c)
	}
	for _, c := range []*cobra.Command{newExplainCommand(o), newValidateCommand(o), newConfigCommand(o), newLoggingCommand(o)} {
		c.GroupID = "why"
		root.AddCommand(c)
	}
	root.AddCommand(newDemoCommand(), newVersionCommand(o))
	return root
}
