#!/usr/bin/env bash
# Builds a program of Kubernetes from the Go module proxy into build/bin and prints its path: kube-apiserver (about 3 minutes
# on 2 cores, once) unless another is named, such as kube-proxy. SOCKMESH_K8S_BIN may name a folder that has it already;
# one that `make e2e` built is used too.
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../../.. && pwd)
program=${1:-kube-apiserver}
version=$(sed -n 's#^require k8s.io/kubernetes \(v.*\)#\1#p' go.mod)

for folder in "${SOCKMESH_K8S_BIN:-}" "$root/build/k8s/bin"; do
  [ -n "$folder" ] && [ -x "$folder/$program" ] || continue
  [ "$folder" = "${SOCKMESH_K8S_BIN:-}" ] || [ "$(cat "$folder/VERSION" 2>/dev/null)" = "$version" ] || continue
  echo "$folder/$program"
  exit
done

mkdir -p "$root/build/bin"
out=$root/build/bin/$program
exec 9>"$out.lock"
flock 9 # two test runs must not build the same thing
if [ ! -x "$out" ] || [ "$(cat "$out.version" 2>/dev/null)" != "$version" ]; then
  echo "building $program $version, once (minutes)" >&2
  stamp=k8s.io/component-base/version
  minor=${version#v1.} minor=${minor%%.*}
  CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=$minor" \
    -o "$out" "k8s.io/kubernetes/cmd/$program"
  echo "$version" >"$out.version"
fi
echo "$out"
