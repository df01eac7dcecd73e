package datapath

// The compiled object and its Go types are committed, so that building the agent needs no clang. `make bpf` runs this;
// TestObjectMatchesSource compiles again and compares. All paths are relative, so that every checkout gives the same
// bytes. Needs clang-19, llvm-strip-19 (Debian: llvm-19) and libbpf's headers (libbpf-dev).

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-stem sockmesh sockmesh ../../bpf/sockmesh.bpf.c -- -O2 -g -mcpu=v3 -Wall -Werror -I../.. -I../../bpf
