// Package envoydiff runs the same configuration and the same bytes through Envoy and through this proxy, and
// compares what the client and the upstream saw: status, headers, bodies, response flags, response code details.
// Envoy is the oracle; where this proxy differs on purpose, the case says so and why.
//
// Only tests live here.
package envoydiff
