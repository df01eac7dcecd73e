package xds

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// server is the gRPC connection to one control plane. All streams to it share the connection.
type server struct {
	name string
	conn *grpc.ClientConn
	once sync.Once

	lastDialError atomic.Pointer[string]
}

// maxResponse bounds one xDS response; a cluster of ten thousand endpoints is about 1 MiB.
const maxResponse = 256 << 20

// newServer prepares a connection to any of the addresses ("host:port" or "unix:PATH"); they are tried in turn.
// TCP keepalive finds a dead peer within a minute; gRPC's own pings would be refused by servers that keep the
// default enforcement policy.
func newServer(name string, addresses []string, tlsConfig *tls.Config, pause backoff.Config) (*server, error) {
	s := &server{name: name}
	creds := insecure.NewCredentials()
	if tlsConfig != nil {
		creds = credentials.NewTLS(tlsConfig)
	}
	next := atomic.Uint32{}
	dialer := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 20 * time.Second, Interval: 10 * time.Second, Count: 3}}
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		var err error
		for range addresses {
			network, address := splitAddress(addresses[int(next.Add(1)-1)%len(addresses)])
			var conn net.Conn
			if conn, err = dialer.DialContext(ctx, network, address); err == nil {
				s.lastDialError.Store(nil)
				return conn, nil
			}
		}
		text := err.Error()
		s.lastDialError.Store(&text)
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///xds", // the dialer knows where; no name ends up in a header
		grpc.WithAuthority(authority(addresses[0], tlsConfig)),
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(dial),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: pause, MinConnectTimeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)),
		grpc.WithUserAgent("sockmesh"),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s.conn = conn
	return s, nil
}

// authority is the :authority that the control plane sees.
func authority(address string, tlsConfig *tls.Config) string {
	if tlsConfig != nil {
		return tlsConfig.ServerName
	}
	if _, isUnix := cutUnix(address); isUnix {
		return "localhost"
	}
	return address
}

func splitAddress(address string) (network, rest string) {
	if path, ok := cutUnix(address); ok {
		return "unix", path
	}
	return "tcp", address
}

// open starts a bidirectional stream once a connection stands.
func (s *server) open(ctx context.Context, method string) (grpc.ClientStream, error) {
	stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{StreamName: method, ServerStreams: true, ClientStreams: true}, method, grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	return stream, nil
}

// dialError is why the connection does not stand; empty if it does or was not tried.
func (s *server) dialError() string {
	if text := s.lastDialError.Load(); text != nil {
		return *text
	}
	return ""
}

func (s *server) close() { s.once.Do(func() { _ = s.conn.Close() }) }
