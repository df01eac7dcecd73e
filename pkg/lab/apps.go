package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// maxBody bounds what is kept of a body that is only looked at.
const maxBody = 16 << 20

func copyBounded(w io.Writer, r io.Reader) (int64, error) {
	return io.Copy(w, io.LimitReader(r, maxBody))
}

// StartNginx runs nginx in the pod: one worker, keep-alive without limit, and what the caller puts into `server {}`
// after the listen lines. It returns when nginx accepts connections.
func (p *Pod) StartNginx(ctx context.Context, port uint16, server string) (*Process, error) {
	dir, err := os.MkdirTemp(filepath.Join(p.lab.Dir, "tmp"), "nginx")
	if err != nil {
		return nil, err
	}
	// nginx's worker runs as another user and must reach its temporary files.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(`
daemon off; user root; worker_processes 1; pid %[1]s/pid; error_log stderr error;
events { worker_connections 16384; }
http {
  access_log off; default_type text/plain; tcp_nodelay on;
  keepalive_requests 1000000000; keepalive_timeout 1h; client_max_body_size 0;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
  server { listen %[2]d backlog=4096; listen [::]:%[2]d backlog=4096; %[3]s }
}
`, dir, port, server)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return nil, err
	}
	proc, err := p.Start("nginx", "nginx", "-e", "stderr", "-c", file)
	if err != nil {
		return nil, err
	}
	return proc, p.WaitListening(ctx, proc, port)
}

// StartServer runs a traffic server (traffic.Serve) in the pod, by Config.Helper: HTTP at the port, TCP and UDP echo at
// the one after it. It returns when the server accepts connections.
func (p *Pod) StartServer(ctx context.Context, port uint16) (*Process, error) {
	text, err := json.Marshal(traffic.Config{Kind: traffic.Serve, Addr: fmt.Sprintf("[::]:%d", port), Host: p.PodSpec.Name})
	if err != nil {
		return nil, err
	}
	command, err := p.lab.helper(string(text))
	if err != nil {
		return nil, err
	}
	proc, err := p.Start("server", command...)
	if err != nil {
		return nil, err
	}
	return proc, p.WaitListening(ctx, proc, port)
}

// WaitListening waits until something in the pod accepts connections on the port.
func (p *Pod) WaitListening(ctx context.Context, proc *Process, port uint16) error {
	return p.lab.waitFor(ctx, proc, func() error {
		c, err := p.Dial(ctx, "tcp", netip.AddrPortFrom(p.Addrs[0], port).String())
		if err == nil {
			c.Close()
		}
		return err
	})
}
