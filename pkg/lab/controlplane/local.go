package controlplane

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Local starts processes on the machine itself, as the caller's children, with their output in dir. Loopback is all that
// they need.
func Local(dir string) func(name string, args ...string) (Process, error) {
	return func(name string, args ...string) (Process, error) {
		p := &child{cmd: exec.Command(args[0], args[1:]...), log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
		log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		defer log.Close()
		p.cmd.Stdout, p.cmd.Stderr = log, log
		// Should the caller be killed, these must not stay.
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
}

type child struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

func (p *child) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *child) Done() <-chan struct{} { return p.done }

func (p *child) Tail() string {
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
