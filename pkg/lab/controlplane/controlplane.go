// Package controlplane runs a real Kubernetes control plane for tests and benchmarks: etcd from Debian and a
// kube-apiserver that is built from upstream, and nothing else: no controllers, so that objects are what the caller makes
// them. It knows nothing of where it runs: a Starter starts its processes, on the machine itself or in a lab's node.
package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Process is a program that runs; lab.Process is one.
type Process interface {
	// Kill is kill -9, and waits for the end.
	Kill()
	Done() <-chan struct{}
	// Tail is the end of what it has written.
	Tail() string
}

// Config says where a control plane runs and who may talk to it.
type Config struct {
	// Dir is for keys and etcd's data.
	Dir string
	// Binary is kube-apiserver; Build makes it.
	Binary string
	// Start starts a process; Local is a way.
	Start func(name string, args ...string) (Process, error)
	// Within runs f where the processes' sockets are; nil: right here.
	Within func(f func() error) error
	// Tokens are more lines of the API server's token file, beside AdminToken's.
	Tokens []string
	// Load: the API server is to take as much as comes, and to keep what it knows in memory: for benchmarks.
	Load bool
}

// AdminToken may do everything.
const AdminToken = "admin-token"

// ServiceCIDRs are the ranges of cluster IPs.
const ServiceCIDRs = "10.96.0.0/16,fd00:96::/112"

// ControlPlane is etcd and one kube-apiserver or several.
type ControlPlane struct {
	cfg  Config
	ca   []byte
	etcd Process
	url  string // etcd's
}

// Build builds a program of Kubernetes (kube-apiserver, kube-proxy) unless that has been done, and returns its path; root
// is the repository. The first time takes minutes.
func Build(root, program string) (string, error) {
	out, err := exec.Command(filepath.Join(root, "tests/kube/apiserver/build.sh"), program).Output()
	if err == nil {
		return strings.TrimSpace(string(out)), nil
	}
	if failed := (*exec.ExitError)(nil); errors.As(err, &failed) {
		return "", fmt.Errorf("build %s: %w\n%s", program, err, failed.Stderr)
	}
	return "", fmt.Errorf("build %s: %w", program, err)
}

// Start starts etcd. Servers are started by NewServer.
func Start(cfg Config) (*ControlPlane, error) {
	if cfg.Within == nil {
		cfg.Within = func(f func() error) error { return f() }
	}
	cp := &ControlPlane{cfg: cfg}
	var err error
	if cp.ca, err = writeKeys(cfg.Dir); err != nil {
		return nil, err
	}
	tokens := append([]string{AdminToken + `,admin,admin,"system:masters"`}, cfg.Tokens...)
	if err := os.WriteFile(cp.file("tokens.csv"), []byte(strings.Join(tokens, "\n")+"\n"), 0o600); err != nil {
		return nil, err
	}
	ports, err := cp.freePorts(2)
	if err != nil {
		return nil, err
	}
	url := func(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }
	cp.url = url(ports[0])
	cp.etcd, err = cfg.Start("etcd", "etcd", "--data-dir", cp.file("etcd"), "--unsafe-no-fsync", "--quota-backend-bytes", strconv.Itoa(4<<30),
		"--listen-client-urls", cp.url, "--advertise-client-urls", cp.url, "--log-level", "error",
		"--listen-peer-urls", url(ports[1]), "--initial-advertise-peer-urls", url(ports[1]), "--initial-cluster", "default="+url(ports[1]))
	if err != nil {
		return nil, fmt.Errorf("%w (Debian package etcd-server)", err)
	}
	return cp, nil
}

// Stop ends etcd; servers are ended by their own Kill.
func (cp *ControlPlane) Stop() { cp.etcd.Kill() }

func (cp *ControlPlane) file(name string) string { return filepath.Join(cp.cfg.Dir, name) }

// freePorts finds ports that nobody listens on.
func (cp *ControlPlane) freePorts(n int) (ports []int, err error) {
	err = cp.cfg.Within(func() error {
		for range n {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer l.Close()
			ports = append(ports, l.Addr().(*net.TCPAddr).Port)
		}
		return nil
	})
	return ports, err
}

// Server is a kube-apiserver process on a port of the loopback device.
type Server struct {
	Port    int
	cp      *ControlPlane
	process Process
}

// NewServer starts a kube-apiserver on a free port and waits until it is ready.
func (cp *ControlPlane) NewServer() (*Server, error) {
	ports, err := cp.freePorts(1)
	if err != nil {
		return nil, err
	}
	s := &Server{cp: cp, Port: ports[0]}
	return s, s.Start()
}

// Start starts the process, again after Kill on the same port, and waits until it is ready.
func (s *Server) Start() error {
	args := []string{s.cp.cfg.Binary,
		"--etcd-servers", s.cp.url, "--bind-address", "127.0.0.1", "--secure-port", strconv.Itoa(s.Port),
		"--advertise-address", "127.0.0.1", "--endpoint-reconciler-type", "none",
		"--tls-cert-file", s.cp.file("api.crt"), "--tls-private-key-file", s.cp.file("api.key"),
		"--token-auth-file", s.cp.file("tokens.csv"), "--authorization-mode", "RBAC",
		"--service-cluster-ip-range", ServiceCIDRs,
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", s.cp.file("api.key"), "--service-account-signing-key-file", s.cp.file("api.key"),
		// Nobody makes the default service account of a new namespace here.
		"--disable-admission-plugins", "ServiceAccount"}
	if s.cp.cfg.Load {
		args = append(args, "--max-requests-inflight", "3000", "--max-mutating-requests-inflight", "1000", "--request-timeout", "5m")
	}
	var err error
	if s.process, err = s.cp.cfg.Start(fmt.Sprintf("apiserver-%d", s.Port), args...); err != nil {
		return err
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		_, err := s.Client(AdminToken).Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(context.Background())
		if err == nil {
			return nil
		}
		ended := false
		select {
		case <-s.process.Done():
			ended = true
		default:
		}
		if ended || time.Now().After(deadline) {
			return fmt.Errorf("kube-apiserver is not ready: %w\n%s", err, s.process.Tail())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Kill ends the process at once.
func (s *Server) Kill() { s.process.Kill() }

// URL is the server's address, seen from where it runs.
func (s *Server) URL() string { return fmt.Sprintf("https://127.0.0.1:%d", s.Port) }

// REST is how to reach it with a token. Requests are not limited.
func (s *Server) REST(token string) *rest.Config {
	return &rest.Config{
		Host: s.URL(), BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAData: s.cp.ca}, QPS: -1,
		Dial: s.cp.dial,
	}
}

// Client talks to it with a token.
func (s *Server) Client(token string) kubernetes.Interface {
	return kubernetes.NewForConfigOrDie(s.REST(token))
}

// dial connects from where the processes are.
func (cp *ControlPlane) dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = cp.cfg.Within(func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Kubeconfig writes a file by which a process reaches the server at a URL (its own, or a way to it), and returns its name.
func (s *Server) Kubeconfig(url, token string) (string, error) {
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: u, user: {token: %q}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, url, s.cp.file("api.crt"), token)
	f, err := os.CreateTemp(s.cp.cfg.Dir, "kubeconfig-")
	if err != nil {
		return "", err
	}
	if _, err = f.WriteString(text); err == nil {
		err = f.Close()
	}
	return f.Name(), err
}
