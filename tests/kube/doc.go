// Package kube tests pkg/kube against a real kube-apiserver with Debian's etcd, as the agent's own service account with
// exactly the rights that deploy/daemonset.yaml gives it.
package kube
