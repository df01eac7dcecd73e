// Package kubeproxy holds the proof that sockmesh means by a Service what kube-proxy means: a differential test of
// pkg/kube and pkg/service against kube-proxy's own code, k8s.io/kubernetes/pkg/proxy.
//
// Random worlds (world_test.go) of Services, EndpointSlices and a Node change step by step. Every change goes to
// kube-proxy's trackers (oracle_test.go) and to sockmesh's conversion and store (ours_test.go); after every step both
// write down what all Services mean (meaning_test.go), and that is compared (diff_test.go). Where sockmesh differs on
// purpose stands in differences_test.go, as data. A failure is shrunk (shrink_test.go) to the few objects that it takes
// and printed as YAML with its seed.
//
// KUBEPROXY_STEPS raises the number of steps; KUBEPROXY_SEED runs one run again.
package kubeproxy
