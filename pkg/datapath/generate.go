package datapath

// The compiled object and its Go types are committed, so that building the agent needs no clang. `make bpf` runs this;
// TestObjectMatchesSource compiles again and compares. Paths are mapped away so that every checkout gives the same
// bytes.

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-stem sockmesh sockmesh ../../bpf/sockmesh.bpf.c -- -O2 -g -mcpu=v3 -Wall -Werror -I../.. -I../../bpf
