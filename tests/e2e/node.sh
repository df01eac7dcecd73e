#!/usr/bin/env bash
# A real one-node Kubernetes in namespaces of its own ("the box"): etcd, API server, controller manager, scheduler,
# kubelet and containerd, without kube-proxy.
#   node.sh up         starts it; returns when the node is Ready
#   node.sh in CMD...  runs CMD inside (kubectl, ctr, ...)
#   node.sh down       ends it; nothing stays
# The box has its own network, mounts, PIDs and cgroup namespace, so the machine keeps its ports, sysctls and cgroups,
# two boxes stand side by side, and "the cgroup root" that the agent attaches to is the box's own.
set -euo pipefail
self=$(readlink -f "$0")
here=$(dirname "$self")
k8s=$(readlink -f "$here/../..")/build/k8s
bin=${K8S_BIN:-$k8s/bin}
box=${BOX:-sockmesh-e2e}
work=/tmp/$box
export KUBECONFIG=/run/k8s/admin.conf
export PATH=$bin:$k8s/root/usr/bin:$k8s/root/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin

up() {
  down
  mkdir -p "$work/log"
  # The first process enters the cgroups that become the roots of the box's cgroup namespace. Its PID namespace ends
  # with it, and every process of node and pods with that.
  setsid bash "$self" outside >"$work/box.out" 2>&1 </dev/null &
  echo $! >"$work/pid"
  for _ in $(seq 300); do
    [ -e "$work/ready" ] && { cat "$work/box.out"; return; }
    kill -0 "$(cat "$work/pid")" 2>/dev/null || break
    sleep .2
  done
  cat "$work/box.out" >&2
  echo "node.sh: the node did not become Ready; the logs are in $work/log" >&2
  return 1
}

# hierarchies lists the machine's cgroup mounts: path, type, and the options that say which it is.
hierarchies() {
  awk '$3 ~ /^cgroup2?$/ {print $2, $3, $4}' /proc/mounts | while read -r path kind options; do
    echo "$path" "$kind" "$(tr , '\n' <<<"$options" | grep -vE '^(rw|nosuid|nodev|noexec|relatime|xattr|nsdelegate|memory_recursiveprot|clone_children|release_agent=.*)$' | paste -sd, || true)"
  done
}

outside() {
  hierarchies | while read -r path _; do
    mkdir -p "$path/$box"
    # A v1 cpuset takes no task before it has CPUs and memory nodes.
    for f in cpuset.cpus cpuset.mems; do [ ! -e "$path/$f" ] || cat "$path/$f" >"$path/$box/$f"; done
    echo $$ >"$path/$box/cgroup.procs"
  done
  exec unshare -m -n -p -i -u -C -f --mount-proc --kill-child bash "$self" inside
}

inside() {
  began=$(date +%s%N)
  say() { echo "$(((($(date +%s%N) - began)) / 1000000)) ms: $*"; }
  hostname node1
  mounts
  network
  cd /run/k8s
  credentials
  configuration
  log=$work/log

  etcd --data-dir /var/lib/etcd --unsafe-no-fsync --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 >"$log/etcd.log" 2>&1 &
  containerd --config containerd.toml >"$log/containerd.log" 2>&1 &
  # InternalIP: exec and logs would otherwise look the node's name up in a DNS that isn't there.
  kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address=172.31.0.1 --secure-port=6443 \
    --tls-cert-file=api.crt --tls-private-key-file=api.key --token-auth-file=tokens.csv --authorization-mode=Node,RBAC \
    --service-cluster-ip-range=10.96.0.0/24 --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file=sa.key --service-account-signing-key-file=sa.key \
    --allow-privileged=true --kubelet-preferred-address-types=InternalIP >"$log/apiserver.log" 2>&1 &
  wait_for 100 ctr version
  for image in "$k8s"/img/*.tar "$k8s"/../sockmesh-agent.tar; do [ ! -e "$image" ] || ctr -n k8s.io images import "$image" >/dev/null; done
  say images imported
  wait_for 300 kubectl get --raw /readyz
  say API server ready
  # Each controller under its own account: with one plain identity RBAC keeps them from untainting the node.
  kube-controller-manager --kubeconfig=kcm.conf --leader-elect=false --service-account-private-key-file=sa.key --root-ca-file=ca.crt \
    --use-service-account-credentials=true >"$log/kcm.log" 2>&1 &
  kube-scheduler --kubeconfig=sched.conf --leader-elect=false >"$log/scheduler.log" 2>&1 &
  kubelet --config=kubelet.yaml --kubeconfig=node.conf --hostname-override=node1 --node-ip=172.31.0.1 --v=2 >"$log/kubelet.log" 2>&1 &
  wait_for 300 sh -c 'kubectl get node node1 | grep -qw Ready && kubectl get serviceaccount default'
  say "$(kubectl get node node1 --no-headers)"
  touch "$work/ready"
  while :; do wait -n 2>/dev/null || sleep 1; done # PID 1: stay, and reap orphans
}

wait_for() { # TRIES CMD...: five times a second
  local tries=$1; shift
  for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return; sleep .2; done
  echo "node.sh: gave up on: $*"; exit 1
}

mounts() {
  mount --make-rshared / # HostToContainer and Bidirectional propagation in pods
  local dir f kv path kind options
  for dir in /run /var/lib /var/log; do mount -t tmpfs tmpfs $dir; done
  mount -t bpf bpf /sys/fs/bpf
  # Cgroups as seen from the namespace: the box's own directories are the roots.
  hierarchies >/run/hierarchies
  while read -r path kind options; do
    umount "$path"
    mount -t "$kind" ${options:+-o "$options"} none "$path"
  done </run/hierarchies
  mkdir -p /run/netns /run/k8s/cni /run/fake
  # The kubelet sets these three for the whole machine unless they read as it wants: show it files that do.
  for kv in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
    f=/run/fake/$(basename "${kv%=*}")
    echo "${kv#*=}" >"$f"
    mount --bind "$f" "/proc/sys/${kv%=*}"
  done
}

network() {
  ip link set lo up
  ip link add eth0 type veth peer name eth0p # some kernels have no dummy device
  ip link set eth0p up
  ip addr add 172.31.0.1/24 dev eth0
  ip link set eth0 up
  ip route add default dev eth0
}

credentials() {
  local ec=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes) user
  openssl req -x509 "${ec[@]}" -keyout ca.key -out ca.crt -subj /CN=ca -days 30 2>/dev/null
  openssl req "${ec[@]}" -keyout api.key -out api.csr -subj /CN=kube-apiserver 2>/dev/null
  openssl x509 -req -in api.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out api.crt 2>/dev/null \
    -extfile <(echo "subjectAltName=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost,IP:127.0.0.1,IP:10.96.0.1,IP:172.31.0.1")
  openssl genrsa -out sa.key 2048 2>/dev/null
  printf '%s\n' 'admin-token,admin,admin,"system:masters"' kcm-token,system:kube-controller-manager,kcm \
    sched-token,system:kube-scheduler,sched 'node-token,system:node:node1,node1,"system:nodes"' >tokens.csv
  for user in admin kcm sched node; do
    cat >$user.conf <<X
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", certificate-authority: /run/k8s/ca.crt}}]
users: [{name: u, user: {token: $user-token}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
X
  done
}

configuration() {
  # restrict_oom_score_adj: a root without CAP_SYS_RESOURCE cannot write the pause container's -998.
  cat >containerd.toml <<X
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "e2e.local/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$k8s/root/usr/lib/cni"
    conf_dir = "/run/k8s/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
X
  cat >cni/10-bridge.conflist <<X
{"cniVersion": "1.0.0", "name": "e2e", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
X
  # failCgroupV1: machines with v1 controllers beside cgroup2 would be refused otherwise.
  cat >kubelet.yaml <<X
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
failSwapOn: false
evictionHard: {memory.available: 50Mi, nodefs.available: "0%", imagefs.available: "0%", nodefs.inodesFree: "0%"}
X
}

in_() {
  local outer inner
  outer=$(cat "$work/pid") && inner=$(cat "/proc/$outer/task/$outer/children") || { echo "node.sh: the node is not up" >&2; exit 1; }
  exec nsenter -t "${inner// /}" -m -n -p -i -u -C -W "$PWD" "$@"
}

down() {
  local pid
  pid=$(cat "$work/pid" 2>/dev/null) || pid=self
  # SIGKILL: unshare --fork ignores SIGTERM. Its death ends PID 1 of the box, and that everything else.
  if { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -q "$self inside"; then kill -9 "$pid"; fi
  local left=
  for _ in $(seq 50); do # processes take a moment to leave their cgroups
    left=$(hierarchies | while read -r path _; do ls -d "$path/$box" 2>/dev/null || true; done)
    [ -n "$left" ] || break
    find $left -depth -type d -exec rmdir {} \; 2>/dev/null || true
    sleep .1
  done
  rm -f "$work/ready" "$work/pid"
  [ -z "$left" ] || { echo "node.sh: cgroups are left: $left" >&2; return 1; }
}

case ${1:-} in
  up | down | outside | inside) "$1" ;;
  in) shift; in_ "$@" ;;
  *) sed -n 2,8p "$self" >&2; exit 2 ;;
esac
