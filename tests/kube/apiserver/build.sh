#!/usr/bin/env bash
# Builds a real kube-apiserver from the Go module proxy into build/bin (about 3 minutes on 2 cores, once) and prints its
# path. SOCKMESH_K8S_BIN may name a folder that has one already; one that `make e2e` built is used too.
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../../.. && pwd)
version=$(sed -n 's#^require k8s.io/kubernetes \(v.*\)#\1#p' go.mod)

if [ -n "${SOCKMESH_K8S_BIN:-}" ]; then
  [ -x "$SOCKMESH_K8S_BIN/kube-apiserver" ] || { echo "build.sh: SOCKMESH_K8S_BIN=$SOCKMESH_K8S_BIN has no kube-apiserver" >&2; exit 1; }
  echo "$SOCKMESH_K8S_BIN/kube-apiserver"
  exit
fi
if [ "$(cat "$root/build/k8s/bin/VERSION" 2>/dev/null)" = "$version" ]; then
  echo "$root/build/k8s/bin/kube-apiserver"
  exit
fi

mkdir -p "$root/build/bin"
out=$root/build/bin/kube-apiserver
exec 9>"$out.lock"
flock 9 # two test runs must not build the same thing
if [ ! -x "$out" ] || [ "$(cat "$out.version" 2>/dev/null)" != "$version" ]; then
  echo "building kube-apiserver $version, once (about 3 minutes on 2 cores)" >&2
  stamp=k8s.io/component-base/version
  minor=${version#v1.} minor=${minor%%.*}
  CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=$minor" \
    -o "$out" k8s.io/kubernetes/cmd/kube-apiserver
  echo "$version" >"$out.version"
fi
echo "$out"
