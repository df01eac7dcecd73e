package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// Idle connections: a client opens ten thousand (where the limit of descriptors allows), has one request answered on each, and then leaves them be. What the proxy's
// resident memory has grown by since before the first is what a connection costs it; sockets' own memory is the kernel's and
// not in it.

// idleConnections is ten thousand, or what the machine has descriptors for: a proxy may need two for a connection.
// Half of that again, since the agent lets one pod have no more than half of what the limit allows for all.
var idleConnections = min(10000, int(fileLimitNow())/4-512)

var idleScenarios = []scenario{{
	name: "idle", what: fmt.Sprintf("%d idle HTTP/1.1 connections", idleConnections), path: "/small",
	cases:   only("sockmesh/sockmap", "sockmesh/connect", "sockmesh/iptables", "envoy/iptables", "haproxy/iptables", "nginx/iptables"),
	measure: (*world).idle, columns: idleColumns, maxRounds: 3,
}}

var idleColumns = []column{
	{"bytes/connection", func(x result, _ *result) string { return fmt.Sprintf("%.0f", x.PerConnection.Median) }},
	{"(min to max)", func(x result, _ *result) string {
		return fmt.Sprintf("(%.0f to %.0f)", x.PerConnection.Min, x.PerConnection.Max)
	}},
	{"RSS MiB", func(x result, _ *result) string { return fmt.Sprintf("%.0f", float64(x.RSS)/(1<<20)) }},
}

func (w *world) idle(ctx context.Context, s scenario, set setup) (result sample, err error) {
	// What the first requests make resident once, code above all, is not the connections'.
	if _, err := w.load(ctx, s, set, w.o.warmUp); err != nil {
		return sample{}, err
	}
	before, err := settledRSS(ctx, set)
	if err != nil {
		return sample{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return sample{}, err
	}
	client, err := w.client.Start("idle-client", self, "idle-client", set.target.String(), s.path, strconv.Itoa(idleConnections))
	if err != nil {
		return sample{}, err
	}
	defer func() { _ = stop(client) }()
	opened, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := lab.Wait(opened, func() error {
		if !client.Running() {
			cancel()
		}
		if !strings.Contains(client.Output(), "open\n") {
			return errors.New("the connections are not open yet")
		}
		return nil
	}); err != nil {
		return sample{}, fmt.Errorf("%w: %s", err, client.Tail())
	}
	if result.rss, err = settledRSS(ctx, set); err != nil {
		return sample{}, err
	}
	result.perConnection = float64(result.rss-before) / float64(idleConnections)
	result.requests = int64(idleConnections)
	return result, nil
}

// settledRSS is resident memory after the proxy had two seconds to give back what it does not need.
func settledRSS(ctx context.Context, set setup) (int64, error) {
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(2 * time.Second):
		return rss(set)
	}
}

// idleClient opens connections one after the other, says so, and holds them until it is ended.
func idleClient(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: bench idle-client ADDR PATH CONNECTIONS")
	}
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	conns := make([]net.Conn, 0, n)
	for range n {
		c, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		conns = append(conns, c)
		if err := getOnce(c, args[0], args[1]); err != nil {
			return fmt.Errorf("connection %d: %w", len(conns), err)
		}
	}
	fmt.Println("open")
	time.Sleep(time.Hour)
	runtime.KeepAlive(conns)
	return nil
}

// getOnce has one request answered.
func getOnce(c net.Conn, host, path string) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, host); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(c, 512), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("answered %s", resp.Status)
	}
	return nil
}
