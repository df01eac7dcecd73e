package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/sockmesh/sockmesh/agent/api"
	"github.com/sockmesh/sockmesh/pkg/cli"
)

func newStatusCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "The whole state of the agent at a glance",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(cmd, o, "/status", writeStatus)
		},
	}
}

// writeOutside says by which devices clients outside are served.
func writeOutside(line func(string, string, ...any), more func(string, ...any), o api.Outside) {
	var by []string
	for _, d := range o.Devices {
		if d.Clients && d.Mode != "" {
			by = append(by, d.Name+" ("+d.Mode+")")
		}
	}
	if o.Active {
		line("Outside", "by %s: %d connections, %d accepted, %d refused", strings.Join(by, ", "), o.Connections, o.Accepted, o.Refused+o.Silent+o.Denied)
	} else {
		line("Outside", "not served: %s", orDash(o.Reason))
		return
	}
	if o.Reason != "" {
		more("- %s", o.Reason)
	}
	if o.Full+o.NoPort > 0 {
		more("- %d packets found no room in sm_nat, %d connections no source port", o.Full, o.NoPort)
	}
}

// writeStatus prints one line per subject, and below it what needs attention.
func writeStatus(w io.Writer, s api.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	line := func(subject, format string, args ...any) {
		fmt.Fprintf(t, "%s:\t%s\n", subject, fmt.Sprintf(format, args...))
	}
	more := func(format string, args ...any) { fmt.Fprintf(t, "\t%s\n", fmt.Sprintf(format, args...)) }

	line("Node", "%s", s.Node)
	line("Agent", "%s, up %s", s.Version, time.Duration(s.UptimeSeconds)*time.Second)
	switch {
	case s.Draining:
		line("Ready", "no: draining")
	case s.Ready:
		line("Ready", "yes")
	default:
		line("Ready", "no")
	}
	for _, r := range s.NotReadyReasons {
		more("- %s", r)
	}
	if s.Canary.OK {
		line("Canary", "ok, %d us, at %s (%d of %d)", s.Canary.Micros, s.Canary.At, s.Canary.Successes, s.Canary.Successes+s.Canary.Failures)
	} else {
		line("Canary", "failed: %s", orDash(s.Canary.Error))
	}
	active := "active"
	if !s.Acceleration.Active {
		active = "not active"
	}
	if s.Acceleration.Reason != "" {
		active += ": " + s.Acceleration.Reason
	}
	line("Acceleration", "%s (%s)", active, s.Acceleration.Mode)
	more("%d pairs, %s socket to socket, %s by TCP", s.Acceleration.Pairs,
		cli.Bytes(s.Acceleration.RedirectedBytes), cli.Bytes(s.Acceleration.PassedBytes))
	if aside := s.Acceleration.StepAside; aside.Active || aside.Bytes > 0 {
		more("%d connections may skip the proxy now; %d have, with %s, and %d bodies of messages, with %s", aside.Open, s.Connections.SteppedAside,
			cli.Bytes(aside.Bytes-aside.BodyBytes), aside.Bodies, cli.Bytes(aside.BodyBytes))
	}
	if aside := s.Acceleration.StepAside; !aside.Active && s.Acceleration.Active {
		more("- new connections don't skip the proxy: %s", aside.Reason)
	}
	for _, p := range s.Acceleration.Probes {
		if !p.OK {
			more("- %s: no: %s", p.Name, p.Detail)
		}
	}
	line("Connections", "%d proxied, %d offloaded, %d to Services, %d passed, %d refused",
		s.Connections.Proxied, s.Connections.Offloaded, s.Connections.Service, s.Connections.Passed, s.Connections.Refused)
	if s.Connections.FailedOpen > 0 {
		more("- %d claimed connections met no proxy and went on without it", s.Connections.FailedOpen)
	}
	writeOutside(line, more, s.Outside)
	line("Proxy", "%d loops, %d open connections, %d accepted, %d turned away, configuration %d",
		s.Proxy.Loops, s.Proxy.Connections, s.Proxy.Accepted, s.Proxy.Refused, s.Proxy.Generation)
	for _, l := range s.Proxy.Listeners {
		if l.Error != "" {
			more("- listener %s is not bound to %s: %s", l.Name, l.Address, l.Error)
		}
	}
	line("Pods", "%d on this node, %d enrolled", s.Pods.Local, s.Pods.Enrolled)
	writeKubernetes(line, more, s.Kubernetes)
	writeXDS(line, more, s.XDS)
	line("Datapath", "%d programs, %d maps", len(s.Datapath.Programs), len(s.Datapath.Maps))
	if len(s.Datapath.Waiting) > 0 {
		kept := "nothing is deleted before"
		if s.Datapath.TimedOut {
			kept = "--sync-timeout is over, so theirs stays as an earlier agent left it, and the others' is brought up to date"
		}
		more("- the first full list of %s has not come: %s", strings.Join(s.Datapath.Waiting, ", "), kept)
	}
	if s.Datapath.DriftRepaired > 0 {
		more("- %d entries had been changed by somebody else and were put right", s.Datapath.DriftRepaired)
	}
	if s.Datapath.LastRepair != "" {
		more("- somebody had removed parts of it, which have been put back: %d pins, %d links, %d verdict programs; last: %s",
			s.Datapath.Repairs["pin"], s.Datapath.Repairs["link"], s.Datapath.Repairs["verdict"], s.Datapath.LastRepair)
	}
	if s.Datapath.RepairProblem != "" {
		more("- what somebody has removed can't be put back: %s", s.Datapath.RepairProblem)
	}
	for _, w := range s.Datapath.Warnings {
		more("- %s", w)
	}
	for _, e := range s.Datapath.Errors {
		more("- %s", e)
	}
	return t.Flush()
}

type lineFunc func(subject, format string, args ...any)
type moreFunc func(format string, args ...any)

func writeKubernetes(line lineFunc, more moreFunc, k api.Kubernetes) {
	if k.Source == "" {
		line("Kubernetes", "none")
		return
	}
	synced := "synced"
	if !k.Synced {
		synced = "not synced"
		if len(k.Waiting) > 0 {
			synced += ", waiting for " + strings.Join(k.Waiting, ", ")
		}
	}
	line("Kubernetes", "%s, %s", k.Source, synced)
	more("%d services, %d endpoints, %d pods", k.Services, k.Endpoints, k.Pods)
	for _, e := range k.Errors {
		more("- %s", e)
	}
}

func writeXDS(line lineFunc, more moreFunc, x api.XDS) {
	if len(x.Servers) == 0 {
		line("xDS", "no server")
	}
	for i, s := range x.Servers {
		subject := ""
		if i == 0 {
			subject = "xDS"
		}
		state := "connected"
		if !s.Connected {
			state = "not connected: " + orDash(s.LastError)
		}
		if subject == "" {
			more("%s (%s), %s", s.Name, s.Stream, state)
		} else {
			line(subject, "%s (%s), %s", s.Name, s.Stream, state)
		}
	}
	r := x.Resources
	more("%d listeners, %d routes, %d clusters, %d endpoints, %d secrets", r.Listener, r.Route, r.Cluster, r.Endpoint, r.Secret)
	for _, name := range slices.Sorted(maps.Keys(x.Warming)) {
		more("- warming: %s: waits for %s", name, x.Warming[name])
	}
	for _, e := range x.Rejected {
		kept := "nothing of it is in force"
		if e.InForce {
			kept = "an older version stays in force"
		}
		more("- rejected: %s %s: %s (%s)", e.Type, e.Name, e.Error, kept)
	}
	for _, e := range x.Ignored {
		more("- ignored: %s %s: %s", e.Type, e.Name, e.Field)
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
