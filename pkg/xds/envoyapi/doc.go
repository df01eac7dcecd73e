// Package envoyapi registers every message of Envoy's v3 API, so that an Any of any type decodes and can be named,
// looked into or refused. It has no code of its own; all.go is written by `go generate ./pkg/xds/envoyapi`.
package envoyapi

//go:generate go run generate.go
