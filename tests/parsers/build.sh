#!/usr/bin/env bash
# Builds the parsers that ours is compared with into build/parsers; what is there already stays.
set -euo pipefail
cd "$(dirname "$0")/../.."
peers=tests/parsers/peers out=build/parsers
mkdir -p $out
flags=(-O2 -march=native -Wall -Wextra)

if [ ! -x $out/llhttp ]; then
  python3 -m pip download -q --no-deps --no-binary :all: --disable-pip-version-check -d $out/httptools httptools==0.9.0
  tar -xzf $out/httptools/httptools-*.tar.gz -C $out/httptools --strip-components=1
  llhttp=$out/httptools/vendor/llhttp
  gcc "${flags[@]}" -w -I $llhttp/include -I $peers -o $out/llhttp $peers/llhttp.c $llhttp/src/*.c
fi
[ -x $out/picohttpparser ] || gcc "${flags[@]}" -o $out/picohttpparser $peers/picohttpparser.c -lh2o
if [ ! -x $out/httparse ]; then
  CARGO_TARGET_DIR=$PWD/$out/cargo RUSTFLAGS='-C target-cpu=native' cargo build -q --release --manifest-path $peers/httparse/Cargo.toml
  cp $out/cargo/release/httparse-peer $out/httparse
fi
go build -o $out/parsers ./tests/parsers
