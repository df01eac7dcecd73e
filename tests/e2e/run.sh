#!/usr/bin/env bash
# The agent as a user installs it: deploy/daemonset.yaml on a real one-node Kubernetes without kube-proxy. Prints a line
# per thing that was seen, and "N passed, N failed" at the end. KEEP=1 leaves the node up (tests/e2e/node.sh in kubectl …).
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/e2e
export BOX=${BOX:-sockmesh-e2e}
work=/tmp/$BOX
passed=0 failed=0

node() { $here/node.sh "$@"; }
kubectl() { node in kubectl "$@"; }
# app POD ARG...: the test's client in a pod of the namespace shop.
app() { local pod=$1; shift; kubectl -n shop exec "$pod" -- /usr/local/bin/app "$@"; }
sockmesh() { kubectl -n sockmesh-system exec daemonset/sockmesh-agent -c agent -- sockmesh "$@"; }
# count WORD: how often that answer came, of the output of `app get`.
count() { awk -v w="$1" '$2 == w {print $1; found = 1} END {if (!found) print 0}'; }

# check TITLE FUNCTION ARG...: the function prints what it saw and fails if it is not what should be.
check() {
  local title=$1 seen; shift
  if seen=$(set -e; "$@" 2>&1); then
    passed=$((passed + 1)); printf '  ok   %-44s %s\n' "$title" "$(tail -n 1 <<<"$seen")"
  else
    failed=$((failed + 1)); printf '  FAIL %-44s %s\n' "$title" "$seen"
  fi
}

# within SECONDS CMD...: the command succeeds before that.
within() {
  local end=$(($(date +%s%N) + $1 * 1000000000)); shift
  until "$@"; do [ "$(date +%s%N)" -lt $end ] || return 1; sleep .1; done
}

end() {
  [ $failed -eq 0 ] || { kubectl -n sockmesh-system logs daemonset/sockmesh-agent --tail=30 || true; kubectl get pods -A -o wide || true; }
  [ -z "${load:-}" ] || kill "$load" 2>/dev/null || true
  [ "${KEEP:-}" = 1 ] || node down
}
trap end EXIT

# xds V1 V2: routes with these weights, and the pods that run now as endpoints, for sockmesh-control.
xds() {
  mkdir -p $work/xds $work/next
  cp $here/xds/*.yaml $work/next/
  sed -i "s/weight: V1/weight: $1/; s/weight: V2/weight: $2/" $work/next/shop.routes.yaml
  local version ip
  for version in v1 v2; do
    printf -- '---\n"@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\ncluster_name: shop-%s\nendpoints:\n- lb_endpoints:\n' $version
    for ip in $(kubectl -n shop get pods -l app=shop,version=$version --field-selector=status.phase=Running -o jsonpath='{range .items[*]}{.status.podIP} {end}'); do
      printf '  - endpoint: {address: {socket_address: {address: %s, port_value: 8080}}}\n' "$ip"
    done
  done >$work/next/shop.endpoints.yaml
  mv $work/next/*.yaml $work/xds/
}

echo "building"
$here/build.sh >/dev/null
node up | tail -n 1

# -- The agent, from the manifest as it is: the node has the image under that very name. The ConfigMap that the manifest
# asks for names the control plane, which runs on the node, and the API server, since nobody translates its ClusterIP yet.
kubectl apply -f $here/shop.yaml >/dev/null
kubectl create namespace sockmesh-system >/dev/null
kubectl -n sockmesh-system create configmap sockmesh-agent --from-literal=SOCKMESH_XDS=127.0.0.1:18000 \
  --from-literal=SOCKMESH_API_SERVER=https://172.31.0.1:6443 >/dev/null
kubectl apply -f deploy/daemonset.yaml 2>&1 | grep -v -e created -e configured -e 'missing the .* annotation' || true
kubectl -n shop wait --for=condition=Ready pod --all --timeout=60s >/dev/null
xds 90 10
node in "$PWD/build/bin/sockmesh-control" --dir $work/xds --listen 127.0.0.1:18000 >$work/log/control.log 2>&1 &

ready() { kubectl -n sockmesh-system rollout status daemonset/sockmesh-agent --timeout=60s; }
check "the DaemonSet becomes ready" ready

shop=http://10.96.0.80/ plain=http://10.96.0.81/

enrolled() {
  local s
  s=$(sockmesh status -o json)
  jq -e '.ready and .kubernetes.synced and .pods.enrolled >= 4 and .xds.resources.listener == 1' <<<"$s" >/dev/null || { echo "$s"; return 1; }
  jq -r '"\(.pods.enrolled) of \(.pods.local) pods enrolled, \(.kubernetes.services) services, acceleration active: \(.acceleration.active)"' <<<"$s"
}
check "sockmesh status, by kubectl exec" within 10 enrolled

canary() { # FROM V1 V2 MIN MAX: of 500, so many by v2
  local answers v1 v2
  answers=$(app "$1" get -n 500 "${4:-$shop}")
  v1=$(count v1/proxied <<<"$answers") v2=$(count v2/proxied <<<"$answers")
  echo "$answers"
  [ $((v1 + v2)) -eq 500 ] && [ "$v2" -ge "$2" ] && [ "$v2" -le "$3" ] && echo "500 requests: v1 $v1, v2 $v2"
}
check "canary 90/10" within 10 canary client 25 85

header() { [ "$(app client get -n 100 -H 'x-canary: always' $shop | count v2/proxied)" -eq 100 ] && echo "100 of 100 by v2"; }
check "x-canary: always" header

source_address() {
  local ip
  ip=$(kubectl -n shop get pod client -o jsonpath='{.status.podIP}')
  app client get -n 20 -full $shop | awk -v ip="$ip" '$NF != ip {bad = 1} {n += $1} END {print n, "answers, all saw", ip; exit bad}'
}
check "servers see the client pod's address" source_address

live() {
  app client get -for 4s -new $shop >$work/live & local load=$!
  sleep 1; xds 0 100
  wait $load || { cat $work/live; return 1; }
  within 5 canary client 500 500 >/dev/null && echo "$(awk '{n += $1} END {print n}' $work/live) requests during the change, none failed; then all by v2"
}
check "weights changed live to 0/100" live

in_kernel() {
  local answers
  answers=$(app client get -n 200 -new -full $plain)
  echo "$answers"
  awk '/v1\/direct/ {n += $1; pods++} END {print n, "connections to", pods, "pods"; exit !(n == 200 && pods == 2)}' <<<"$answers"
}
check "a plain Service, in the kernel" in_kernel

api() { kubectl -n shop get pods >/dev/null; app client get "$plain" >/dev/null; sockmesh services shop/plain; }
check "sockmesh services" api

scale() {
  app client get -for 8s -new $plain >$work/scale & local load=$!
  kubectl -n shop scale deployment/shop-v1 --replicas=4 >/dev/null
  kubectl -n shop rollout status deployment/shop-v1 --timeout=30s >/dev/null
  four() { [ "$(app client get -n 100 -new -full $plain | awk '{print $3}' | sort -u | wc -l)" -eq 4 ]; }
  within 5 four
  kubectl -n shop scale deployment/shop-v1 --replicas=1 >/dev/null
  one() { [ "$(app client get -n 50 -new -full $plain | awk '{print $3}' | sort -u | wc -l)" -eq 1 ]; }
  within 15 one
  wait $load || { cat $work/scale; return 1; }
  echo "2, 4, then 1 pods behind it; $(awk '{n += $1} END {print n}' $work/scale) requests meanwhile, none failed"
}
check "pods that come and go" scale

restart() {
  app client get -for 6s -new $plain >$work/restart & local load=$!
  kubectl -n shop rollout restart deployment/shop-v1 >/dev/null
  kubectl -n shop rollout status deployment/shop-v1 --timeout=30s >/dev/null
  wait $load || { cat $work/restart; return 1; }
  echo "$(awk '{n += $1} END {print n}' $work/restart) requests meanwhile, none failed"
}
check "pods that restart" restart

newcomer() {
  kubectl -n shop run late --image=e2e.local/app:1 --image-pull-policy=Never --restart=Never -- serve :8080 >/dev/null
  kubectl -n shop wait --for=condition=Ready pod/late --timeout=30s >/dev/null
  proxied() { app late get -n 1 $shop | grep -q /proxied; }
  within 5 proxied
  kubectl -n shop delete pod late --grace-period=1 >/dev/null
  gone() { ! sockmesh pods | grep -q shop/late && ! sockmesh pods | grep -qw late; }
  within 10 gone && echo "enrolled, proxied, and forgotten"
}
xds 0 100
check "a pod that comes later" newcomer

agent_deleted() {
  app client get -for 12s -new $shop >$work/deleted & local load=$!
  local old new
  old=$(kubectl -n sockmesh-system get pod -l app.kubernetes.io/name=sockmesh-agent -o name)
  kubectl -n sockmesh-system delete "$old" --wait=true >/dev/null
  other() { new=$(kubectl -n sockmesh-system get pod -l app.kubernetes.io/name=sockmesh-agent -o name); [ -n "$new" ] && [ "$new" != "$old" ]; }
  within 20 other
  kubectl -n sockmesh-system rollout status daemonset/sockmesh-agent --timeout=60s >/dev/null
  wait $load || { cat $work/deleted; return 1; }
  within 10 canary client 500 500 >/dev/null
  echo "$(tr '\n' ';' <$work/deleted) none failed; then all by the new agent"
}
check "the agent's pod deleted under load" agent_deleted

service() {
  local began
  kubectl -n shop create service clusterip fresh --tcp=80:8080 --clusterip=10.96.0.99 --dry-run=client -o yaml >$work/fresh.yaml
  sed -i 's/app: fresh/app: shop/' $work/fresh.yaml
  kubectl apply -f $work/fresh.yaml -n shop >/dev/null
  began=$(date +%s%N)
  answers() { app client get http://10.96.0.99/ >/dev/null 2>&1; }
  within 5 answers
  echo "answers $((($(date +%s%N) - began) / 1000000)) ms after it was made"
  kubectl -n shop delete service fresh >/dev/null
  silent() { ! app client get http://10.96.0.99/ >/dev/null 2>&1; }
  within 5 silent
}
check "a Service made and deleted" service

explained() { sockmesh explain --from shop/client "$shop" -H 'x-canary: always' | grep '^=>'; }
check "sockmesh explain" explained

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
