package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/pkg/cli"
	"github.com/sockmesh/sockmesh/pkg/xds"
)

func newValidateCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "validate FILE...",
		Short: "What the agent would refuse or ignore in bootstraps and xDS resources; needs no agent",
		Long: "validate reads bootstraps and files of xDS resources (YAML or JSON, one or many to a file) and says of each resource\n" +
			"whether it would be accepted, which fields are the reason if not, and which fields would be ignored. A resource's\n" +
			"type is its @type, or told by the file's name: x.listeners.yaml, .routes., .clusters., .endpoints., .secrets.\n" +
			"The exit code is 1 if anything would be refused.",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			results := xds.ValidateFiles(args)
			if err := cli.PrintValue(cmd.OutOrStdout(), o.format, results, func(w io.Writer) error { return writeValidation(w, results) }); err != nil {
				return err
			}
			refused := 0
			for i := range results {
				if !results[i].OK() {
					refused++
				}
			}
			if refused > 0 {
				return fmt.Errorf("%d of %d resources would be refused", refused, len(results))
			}
			return nil
		},
	}
}

// writeValidation prints a line per resource and one per finding, then a summary.
func writeValidation(w io.Writer, results []xds.Validation) error {
	refused, ignored := 0, 0
	for i := range results {
		v := &results[i]
		verdict := "ok"
		if !v.OK() {
			verdict = "refused"
			refused++
		}
		subject := strings.TrimSpace(v.Type + " " + v.Name)
		if v.Where != "" {
			subject += " (" + v.Where + ")"
		}
		if subject = strings.TrimSpace(subject); subject != "" {
			subject += ": "
		}
		fmt.Fprintf(w, "%s: %s%s\n", v.File, subject, verdict)
		for _, r := range v.Refused {
			if r.Field != "" {
				fmt.Fprintf(w, "  refused: %s: %s\n", r.Field, r.Reason)
			} else {
				fmt.Fprintf(w, "  refused: %s\n", r.Reason)
			}
		}
		for _, f := range v.Ignored {
			fmt.Fprintf(w, "  ignored: %s\n", f)
			ignored++
		}
	}
	_, err := fmt.Fprintf(w, "%d resources: %d accepted, %d refused; %d fields ignored\n", len(results), len(results)-refused, refused, ignored)
	return err
}
