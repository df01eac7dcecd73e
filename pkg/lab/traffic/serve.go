package traffic

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/net/websocket"
)

// The server of all kinds: HTTP, bodies that come back and WebSocket at Config.Addr; TCP and UDP echo at the port after
// it. Config.Host is who it says that it is.
//
// Its sockets are plain TCP: Go's listeners are MPTCP by default, and MPTCP can't be redirected.

func serve(ctx context.Context, cfg Config) error {
	host, port, err := net.SplitHostPort(cfg.Addr)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return err
	}
	echo := net.JoinHostPort(host, strconv.Itoa(n+1))
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	udp, err := lc.ListenPacket(ctx, "udp", echo)
	if err != nil {
		return err
	}
	tcp, err := lc.Listen(ctx, "tcp", echo)
	if err != nil {
		return err
	}
	web, err := lc.Listen(ctx, "tcp", cfg.Addr)
	if err != nil {
		return err
	}
	go echoDatagrams(udp)
	go echoStreams(tcp)
	server := &http.Server{Handler: handler(cfg.Host), ReadHeaderTimeout: time.Minute}
	context.AfterFunc(ctx, func() { server.Close() })
	if err := server.Serve(web); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func handler(who string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		how := "proxied"
		if r.Header.Get("X-Request-Id") == "" {
			how = "direct"
		}
		fmt.Fprintf(w, "%s/%s %s\n", who, how, r.RemoteAddr)
	})
	mux.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		w.Header().Set("X-Who", who)
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body)
	})
	mux.HandleFunc("POST /stream", func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		if err := rc.EnableFullDuplex(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("X-Who", who)
		b := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(b)
			if n > 0 {
				if _, err := w.Write(b[:n]); err != nil {
					return
				}
				_ = rc.Flush()
			}
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				panic(http.ErrAbortHandler) // an answer that is cut short must not look whole
			}
		}
	})
	mux.Handle("/ws", websocket.Handler(func(c *websocket.Conn) {
		for {
			var message []byte
			if websocket.Message.Receive(c, &message) != nil || !isWhole(message) || websocket.Message.Send(c, message) != nil {
				_ = c.WriteClose(1000)
				return
			}
		}
	}))
	return mux
}

// echoStreams reads and writes by hand: io.Copy between TCP connections splices.
func echoStreams(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			b := make([]byte, 32<<10)
			for {
				n, err := c.Read(b)
				if n > 0 {
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
				if err != nil {
					return
				}
			}
		}()
	}
}

func echoDatagrams(c net.PacketConn) {
	b := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(b[:n], from)
	}
}
