package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
)

// DefaultAdmin is where an agent serves its admin API unless told otherwise.
const DefaultAdmin = "unix:///run/sockmesh/admin.sock"

// Client talks to an agent's admin API.
type Client struct {
	addr string
	path string
	http *http.Client
}

// NewClient returns a client for unix:///path.
func NewClient(addr string) (*Client, error) {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("--admin %q: expected unix:///path/to.sock", addr)
	}
	var d net.Dialer
	return &Client{addr: addr, path: path, http: &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			DisableCompression: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return d.DialContext(ctx, "unix", path)
			},
		},
	}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Get returns the JSON of a path.
func (c *Client) Get(ctx context.Context, path string) ([]byte, error) {
	return c.do(ctx, http.MethodGet, path, nil)
}

// Post sends in as JSON and returns the JSON that comes back.
func (c *Client) Post(ctx context.Context, path string, in any) ([]byte, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	return c.do(ctx, http.MethodPost, path, body)
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://sockmesh"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("reading the agent's answer: %w", err)
	}
	if resp.StatusCode/100 != 2 {
		var e Error
		if json.Unmarshal(answer, &e) != nil || e.Error == "" {
			e.Error = resp.Status
		}
		return nil, errors.New(e.Error)
	}
	return answer, nil
}

// explain turns a failed connect into its cause and cure.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("no agent here: %s does not exist; start sockmesh-agent, or say with --admin where its socket is", c.path)
	case errors.Is(err, syscall.ECONNREFUSED):
		if st, statErr := os.Stat(c.path); statErr == nil && st.Mode()&fs.ModeSocket == 0 {
			return fmt.Errorf("%s is not a socket: --admin names the wrong file", c.path)
		}
		return fmt.Errorf("no agent behind %s: the socket is left over from one that was killed; start sockmesh-agent", c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s may only be used by the user that the agent runs as: run this as root (sudo)", c.path)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("the agent behind %s does not answer: %w", c.path, err)
	}
	return fmt.Errorf("asking the agent at %s: %w", c.addr, err)
}
