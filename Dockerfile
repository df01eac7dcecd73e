# The agent, the command line and the reference control plane as static binaries on nothing.
#   docker build --build-arg VERSION=v0.1.0 -t ghcr.io/sockmesh/sockmesh:v0.1.0 .
# The BPF objects are committed, so no clang is needed here; `make bpf` rebuilds them, and a test compares.
# scripts/image.sh makes the same image without an engine.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG VERSION=devel
ARG TARGETOS=linux
ARG TARGETARCH
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -buildvcs=false \
      -ldflags "-s -w -X github.com/sockmesh/sockmesh/agent/version.version=$VERSION" \
      -o /out/usr/local/bin/ ./cmd/sockmesh-agent ./cmd/sockmesh ./cmd/sockmesh-control && \
    mkdir -p /out/etc /out/tmp /out/run && \
    cp /etc/ssl/certs/ca-certificates.crt /out/etc/ca-certificates.crt && \
    echo 'root:x:0:0:root:/:/sbin/nologin' > /out/etc/passwd

FROM scratch
COPY --from=build /out/ /
ENV PATH=/usr/local/bin SSL_CERT_FILE=/etc/ca-certificates.crt
ENTRYPOINT ["/usr/local/bin/sockmesh-agent"]
