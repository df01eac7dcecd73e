#!/usr/bin/env bash
# Writes a container image as a docker-archive, without an engine: `scripts/image.sh NAME:TAG OUT.tar [BINARY...]`.
#
# `ctr images import`, `docker load`, `podman load` and `skopeo copy docker-archive:` all read it. One layer with the
# static binaries at the root, as the Dockerfile's last stage has them; the first binary is the entry point.
set -euo pipefail
name=$1 out=$2; shift 2
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- build/bin/sockmesh-agent build/bin/sockmesh build/bin/sockmesh-control
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

mkdir -p "$work/root"/{tmp,etc,run,usr/local/bin}
echo 'root:x:0:0:root:/:/sbin/nologin' >"$work/root/etc/passwd"
[ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/"
for binary in "$@"; do
  file "$binary" 2>/dev/null | grep -q 'dynamically linked' && { echo "image.sh: $binary is not static" >&2; exit 1; }
  cp "$binary" "$work/root/usr/local/bin/"
done
# Owner, order and time fixed: the same binaries give the same layer, so that a node keeps what it has.
tar -C "$work/root" --sort=name --owner=0 --group=0 --mtime=@0 -cf "$work/layer.tar" .
layer=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
cat >"$work/config.json" <<X
{"architecture":"$(go env GOARCH)","os":"linux","config":{"Entrypoint":["/usr/local/bin/$(basename "$1")"],"Env":["PATH=/usr/local/bin","SSL_CERT_FILE=/etc/ca-certificates.crt"]},"rootfs":{"type":"layers","diff_ids":["sha256:$layer"]}}
X
echo "[{\"Config\":\"config.json\",\"RepoTags\":[\"$name\"],\"Layers\":[\"layer.tar\"]}]" >"$work/manifest.json"
mkdir -p "$(dirname "$out")"
tar -C "$work" -cf "$out.part" manifest.json config.json layer.tar
mv "$out.part" "$out"
echo "$out: $name, $(du -h "$out" | cut -f1)"
