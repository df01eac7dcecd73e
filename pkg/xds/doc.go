// Package xds gets the configuration: from an Envoy bootstrap, from xDS control planes (ADS or a stream per
// type, state of the world or delta, over gRPC), from watched files, and from disk after a restart. It decodes
// and hands each resource to pkg/mesh, answers the control plane with an ACK or with a NACK that names resource
// and field, and publishes the resulting snapshots.
//
// One mutex (Client.mu) guards everything that responses, timers and resolvers change; streams hold it while
// they apply a response and never while they wait for the network. A stream reads its next response only after
// it has applied and answered the last one, so a fast control plane is slowed by flow control and nothing queues.
// A publisher goroutine turns whatever changed meanwhile into one snapshot.
//
// What this package must never do: drop a good resource because another one is bad, forget the last good
// configuration because a server is away, or accept a field without acting on it or saying so.
package xds
