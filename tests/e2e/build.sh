#!/usr/bin/env bash
# Builds what the node is made of, once, into build/k8s: Kubernetes from the Go module proxy (about 10 minutes on two
# cores), the container runtime from Debian packages that are unpacked but not installed, and the test's own image.
# K8S_BIN may name a directory that has the Kubernetes binaries already.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=v1.36.3
k8s=$PWD/build/k8s
bin=${K8S_BIN:-$k8s/bin}
mkdir -p "$k8s"/{bin,debs,img,mod}

# -- Kubernetes. Its staging modules are replaced by their releases; without gitVersion the node would report v0.0.0.
programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl)
if [ "$(cat "$bin/VERSION" 2>/dev/null)" != $version ] && [ -z "${K8S_BIN:-}" ]; then
  echo "building Kubernetes $version into $bin, once (about 10 minutes on 2 cores)"
  export GOFLAGS=-mod=mod CGO_ENABLED=0
  cd "$k8s/mod"
  go mod download k8s.io/kubernetes@$version
  {
    printf 'module k8s\n\ngo 1.26.0\n\nrequire k8s.io/kubernetes %s\n\nreplace (\n' $version
    sed -n "s#^\s*\(k8s.io/[a-z-]*\) => ./staging.*#\t\1 => \1 v0.${version#v1.}#p" "$(go env GOMODCACHE)/k8s.io/kubernetes@$version/go.mod"
    echo ')'
  } >go.mod
  stamp=k8s.io/component-base/version
  for program in "${programs[@]}"; do
    go build -trimpath -ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=36" -o "$bin/" k8s.io/kubernetes/cmd/$program
    echo "  $program"
  done
  echo $version >"$bin/VERSION"
  unset GOFLAGS
  cd - >/dev/null
fi
for program in "${programs[@]}"; do
  [ -x "$bin/$program" ] || { echo "build.sh: $bin has no $program" >&2; exit 1; }
done

# -- containerd, runc and the CNI plugins: unpacked only, so that no service starts and nothing on the machine changes.
if [ ! -e "$k8s/root/usr/bin/containerd" ]; then
  (cd "$k8s/debs" && { apt-get download -q containerd runc containernetworking-plugins >/dev/null 2>&1 ||
    { apt-get update -q >/dev/null && apt-get download -q containerd runc containernetworking-plugins >/dev/null; }; })
  for deb in "$k8s"/debs/*.deb; do dpkg -x "$deb" "$k8s/root"; done
fi

# -- Images.
CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$k8s/app" ./tests/e2e/app
ln -f "$k8s/app" "$k8s/pause" # the program looks at its name
scripts/image.sh e2e.local/app:1 "$k8s/img/app.tar" "$k8s/app"
scripts/image.sh e2e.local/pause:1 "$k8s/img/pause.tar" "$k8s/pause"
