package kube

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/sockmesh/sockmesh/pkg/lab/controlplane"
	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

const (
	deployment = "../../deploy/daemonset.yaml"
	agentUser  = "system:serviceaccount:sockmesh-system:sockmesh-agent"
	nodeName   = "node-1"
)

// testCluster is the control plane that all tests share. Each test has a namespace of its own.
type testCluster struct {
	*controlplane.ControlPlane
	main *controlplane.Server
}

var cluster testCluster

// helper is the first argument that makes this test binary a traffic generator.
const helper = "traffic"

func TestMain(m *testing.M) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	traffic.MainIfAsked(ctx, helper)
	stop()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests/kube:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "sockmesh-kube")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if err := buildBinaries(dir); err != nil {
		return 1, err
	}
	binary, err := controlplane.Build("../..", "kube-apiserver")
	if err != nil {
		return 1, err
	}
	cluster.ControlPlane, err = controlplane.Start(controlplane.Config{
		Dir: dir, Binary: binary, Start: controlplane.Local(dir),
		Tokens: []string{
			fmt.Sprintf(`agent-token,%s,agent,"system:serviceaccounts,system:serviceaccounts:sockmesh-system"`, agentUser),
			`nobody-token,nobody,nobody`,
		},
	})
	if err != nil {
		return 1, err
	}
	defer cluster.Stop()
	if cluster.main, err = cluster.NewServer(); cluster.main != nil {
		defer cluster.main.Kill()
	}
	if err != nil {
		return 1, err
	}
	if err := cluster.deploy(); err != nil {
		return 1, fmt.Errorf("apply %s: %w", deployment, err)
	}
	return m.Run(), nil
}

// deploy applies what gives the agent its rights, as the file in deploy/ has it.
func (c *testCluster) deploy() error {
	ctx, client := context.Background(), c.main.Client(controlplane.AdminToken)
	if _, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "sockmesh-system"}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	role, binding, err := rights()
	if err != nil {
		return err
	}
	if _, err := client.RbacV1().ClusterRoles().Create(ctx, role, metav1.CreateOptions{}); err != nil {
		return err
	}
	_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{})
	return err
}

// rights reads the agent's ClusterRole and its binding.
func rights() (*rbacv1.ClusterRole, *rbacv1.ClusterRoleBinding, error) {
	content, err := os.ReadFile(deployment)
	if err != nil {
		return nil, nil, err
	}
	var role *rbacv1.ClusterRole
	var binding *rbacv1.ClusterRoleBinding
	for _, document := range strings.Split(string(content), "\n---\n") {
		var head metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(document), &head); err != nil {
			return nil, nil, err
		}
		switch head.Kind {
		case "ClusterRole":
			role = &rbacv1.ClusterRole{}
			err = yaml.UnmarshalStrict([]byte(document), role)
		case "ClusterRoleBinding":
			binding = &rbacv1.ClusterRoleBinding{}
			err = yaml.UnmarshalStrict([]byte(document), binding)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", head.Kind, err)
		}
	}
	if role == nil || binding == nil {
		return nil, nil, fmt.Errorf("no ClusterRole or no ClusterRoleBinding")
	}
	return role, binding, nil
}
