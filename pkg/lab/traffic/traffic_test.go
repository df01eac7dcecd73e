package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// run lets a generator work until it has done at least n requests and returns the sum of its reports.
func run(t *testing.T, cfg Config, n uint64) Report {
	t.Helper()
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- Main(ctx, []string{string(text)}, w)
		w.Close()
	}()
	var last Report
	var failures []Failure
	for lines := bufio.NewScanner(r); lines.Scan(); {
		last = Report{}
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			t.Fatal(err)
		}
		failures = append(failures, last.Failures...)
		if last.Requests >= n {
			cancel()
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	last.Failures = failures
	return last
}

// Every request is either counted under its answer or listed as a failure with its reason.
func TestEveryRequestIsAccountedFor(t *testing.T) {
	var n atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1)%10 == 0 {
			http.Error(w, "tenth", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintf(w, "%s rest of the body", r.Header.Get("X-Who"))
	}))
	defer server.Close()
	addr := strings.TrimPrefix(server.URL, "http://")
	r := run(t, Config{Addr: addr, Host: "x", Headers: map[string]string{"X-Who": "me"}, Connections: 4, Pause: time.Millisecond}, 200)
	if r.OK+r.Failed != r.Requests || r.Answers["me"] != r.OK || r.Failed != uint64(len(r.Failures)) {
		t.Errorf("the sums are wrong: %+v", r)
	}
	if served := uint64(n.Load()); r.Requests != served || r.Failed != served/10 {
		t.Errorf("the server saw %d requests: %+v", served, r)
	}
	for _, f := range r.Failures {
		if !strings.Contains(f.Error, "503") || f.Connected.IsZero() || f.At.Before(f.Connected) {
			t.Errorf("failure %+v", f)
		}
	}
}

// A server that asks for the end of the connection is obeyed, and that is no failure.
func TestConnectionCloseIsNoFailure(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		fmt.Fprint(w, "bye")
	}))
	defer server.Close()
	r := run(t, Config{Addr: strings.TrimPrefix(server.URL, "http://"), Host: "x", Connections: 2, Pause: time.Millisecond}, 50)
	if r.Failed != 0 || r.Connected < r.OK {
		t.Errorf("%+v", r)
	}
}

// Nobody listens: each attempt is a failure without a connection.
func TestRefusedConnectsAreFailures(t *testing.T) {
	server := httptest.NewServer(nil)
	server.Close()
	r := run(t, Config{Addr: strings.TrimPrefix(server.URL, "http://"), Host: "x", Connections: 1}, 3)
	if r.OK != 0 || r.Failed < 3 || !r.Failures[0].Connected.IsZero() || !strings.Contains(r.Failures[0].Error, "refused") {
		t.Errorf("%+v", r)
	}
}
