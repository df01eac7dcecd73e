package kube

import (
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// RESTConfig says how to reach the API server: by a kubeconfig file, or, if that is empty, with the service account
// that a pod is given.
//
// server, if set, replaces the address. An agent that takes kube-proxy's place must not reach the API server through
// the ClusterIP that KUBERNETES_SERVICE_HOST names, because on a fresh node nobody translates it before the agent
// has been there: give the API server's own address, here or in that variable.
func RESTConfig(kubeconfig, server string) (*rest.Config, error) {
	rc, err := restConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	if server != "" {
		rc.Host = server
	}
	rc.UserAgent = rest.DefaultKubernetesUserAgent()
	return rc, nil
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		rc, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("no --kubeconfig and no --manifests given, and not in a cluster: %w", err)
		}
		return rc, nil
	}
	rc, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig %s: %w", kubeconfig, err)
	}
	return rc, nil
}
