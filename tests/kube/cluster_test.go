package kube

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

const (
	deployment = "../../deploy/daemonset.yaml"
	agentUser  = "system:serviceaccount:sockmesh-system:sockmesh-agent"
	nodeName   = "node-1"
)

// cluster is the control plane that all tests share. Each test has a namespace of its own.
var cluster *controlPlane

func TestMain(m *testing.M) {
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
	cluster, err = newControlPlane(dir)
	if err != nil {
		return 1, err
	}
	defer cluster.stop()
	if err := cluster.start(); err != nil {
		return 1, err
	}
	if err := cluster.deploy(); err != nil {
		return 1, fmt.Errorf("apply %s: %w", deployment, err)
	}
	return m.Run(), nil
}

// controlPlane is etcd and one kube-apiserver, which can be killed and started again.
type controlPlane struct {
	dir    string
	binary string
	ca     []byte
	etcd   *process
	main   *apiServer
}

// apiServer is a kube-apiserver process on a port.
type apiServer struct {
	cp      *controlPlane
	port    int
	process *process
}

func newControlPlane(dir string) (*controlPlane, error) {
	out, err := exec.Command("apiserver/build.sh").Output()
	if err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			return nil, fmt.Errorf("build kube-apiserver: %w\n%s", err, failed.Stderr)
		}
		return nil, fmt.Errorf("build kube-apiserver: %w", err)
	}
	cp := &controlPlane{dir: dir, binary: strings.TrimSpace(string(out))}
	cp.ca, err = writeKeys(dir)
	if err != nil {
		return nil, err
	}
	tokens := strings.Join([]string{
		`admin-token,admin,admin,"system:masters"`,
		fmt.Sprintf(`agent-token,%s,agent,"system:serviceaccounts,system:serviceaccounts:sockmesh-system"`, agentUser),
		`nobody-token,nobody,nobody`,
	}, "\n")
	return cp, os.WriteFile(filepath.Join(dir, "tokens.csv"), []byte(tokens+"\n"), 0o600)
}

func (cp *controlPlane) start() error {
	client, peer, err := twoPorts()
	if err != nil {
		return err
	}
	url := func(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }
	cp.etcd, err = startProcess(cp.dir, "etcd", "etcd", "--data-dir", filepath.Join(cp.dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", url(client), "--advertise-client-urls", url(client),
		"--listen-peer-urls", url(peer), "--initial-advertise-peer-urls", url(peer), "--initial-cluster", "default="+url(peer))
	if err != nil {
		return fmt.Errorf("%w (Debian package etcd-server)", err)
	}
	cp.etcd.note = url(client)
	cp.main, err = cp.newAPIServer()
	return err
}

func (cp *controlPlane) stop() {
	if cp.main != nil {
		cp.main.kill()
	}
	if cp.etcd != nil {
		cp.etcd.kill()
	}
}

// newAPIServer starts a kube-apiserver on a free port.
func (cp *controlPlane) newAPIServer() (*apiServer, error) {
	port, _, err := twoPorts()
	if err != nil {
		return nil, err
	}
	a := &apiServer{cp: cp, port: port}
	return a, a.start()
}

// start starts the process, again after kill on the same port, and waits until it is ready.
func (a *apiServer) start() error {
	file := func(name string) string { return filepath.Join(a.cp.dir, name) }
	var err error
	a.process, err = startProcess(a.cp.dir, fmt.Sprintf("apiserver-%d", a.port), a.cp.binary,
		"--etcd-servers", a.cp.etcd.note, "--bind-address", "127.0.0.1", "--secure-port", strconv.Itoa(a.port),
		"--advertise-address", "127.0.0.1", "--endpoint-reconciler-type", "none",
		"--tls-cert-file", file("api.crt"), "--tls-private-key-file", file("api.key"),
		"--token-auth-file", file("tokens.csv"), "--authorization-mode", "RBAC",
		"--service-cluster-ip-range", "10.96.0.0/16,fd00:96::/112",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", file("api.key"), "--service-account-signing-key-file", file("api.key"),
		// Nobody makes the default service account of a new namespace here.
		"--disable-admission-plugins", "ServiceAccount")
	if err != nil {
		return err
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		_, err := a.client("admin-token").Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(context.Background())
		if err == nil {
			return nil
		}
		if a.process.ended() || time.Now().After(deadline) {
			return fmt.Errorf("kube-apiserver is not ready: %w\n%s", err, a.process.tail())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (a *apiServer) kill() { a.process.kill() }

func (a *apiServer) rest(token string) *rest.Config {
	return &rest.Config{
		Host:            fmt.Sprintf("https://127.0.0.1:%d", a.port),
		BearerToken:     token,
		TLSClientConfig: rest.TLSClientConfig{CAData: a.cp.ca},
		QPS:             -1,
	}
}

func (a *apiServer) client(token string) kubernetes.Interface {
	return kubernetes.NewForConfigOrDie(a.rest(token))
}

// deploy applies what gives the agent its rights, as the file in deploy/ has it.
func (cp *controlPlane) deploy() error {
	ctx, client := context.Background(), cp.main.client("admin-token")
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

// process is a program that the tests started.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
	note string
}

func startProcess(dir, name, binary string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(binary, args...), log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// Should the tests be killed, these must not stay.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) tail() string {
	content, _ := os.ReadFile(p.log)
	return string(content[max(0, len(content)-4000):])
}

// writeKeys makes the API server's certificate, which is its own authority.
func writeKeys(dir string) (ca []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kube-apiserver"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	if err := os.WriteFile(filepath.Join(dir, "api.crt"), out.Bytes(), 0o644); err != nil {
		return nil, err
	}
	return out.Bytes(), os.WriteFile(filepath.Join(dir, "api.key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}), 0o600)
}

// twoPorts finds free ports.
func twoPorts() (int, int, error) {
	var ports [2]int
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return 0, 0, err
		}
		defer l.Close()
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports[0], ports[1], nil
}
