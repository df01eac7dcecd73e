// Command app is everything that the test's pods run, as one static binary: the pause container, a server that says
// who it is and whom it sees, and a client that counts who answered.
package main

import (
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"
)

func main() {
	// The pause image has no arguments: there the program goes by that name.
	if filepath.Base(os.Args[0]) == "pause" {
		pause()
		return
	}
	if len(os.Args) < 2 {
		fail("usage: app serve ADDR | get [-n N] [-H 'k: v'] [-new] URL")
	}
	switch os.Args[1] {
	case "serve":
		serve(os.Args[2])
	case "get":
		get(os.Args[2:])
	default:
		fail("app: no command " + os.Args[1])
	}
}

func fail(text string) {
	fmt.Fprintln(os.Stderr, text)
	os.Exit(1)
}

// pause holds a pod's namespaces and reaps what is left to it.
func pause() {
	end, child := make(chan os.Signal, 1), make(chan os.Signal, 8)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(child, syscall.SIGCHLD)
	for {
		select {
		case <-end:
			return
		case <-child:
			for pid, err := 1, error(nil); pid > 0 && err == nil; {
				pid, err = syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			}
		}
	}
}

// serve answers "VERSION/proxied POD CLIENT" or "VERSION/direct …": the proxy adds a request id. It finishes what it
// has when the pod is deleted.
func serve(addr string) {
	pod, _ := os.Hostname()
	server := http.Server{Addr: addr, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		how, client := "direct", r.RemoteAddr
		if r.Header.Get("X-Request-Id") != "" {
			how = "proxied"
		}
		if host, _, err := net.SplitHostPort(client); err == nil {
			client = host
		}
		fmt.Fprintf(w, "%s/%s %s %s\n", os.Getenv("VERSION"), how, pod, client)
	})}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	go func() {
		<-end
		// The endpoint is being removed meanwhile: late connections still find a server.
		time.Sleep(time.Second)
		os.Exit(0)
	}()
	fail(server.ListenAndServe().Error())
}

// get sends requests and prints how often each answer came, most frequent first; errors are counted as "error: …".
func get(args []string) {
	flags := flag.NewFlagSet("get", flag.ExitOnError)
	n := flags.Int("n", 1, "requests")
	header := flags.String("H", "", "one more header, 'name: value'")
	fresh := flags.Bool("new", false, "a connection per request")
	duration := flags.Duration("for", 0, "instead of -n: how long, 100 requests a second")
	full := flags.Bool("full", false, "count whole answers, not their first word")
	if err := flags.Parse(args); err != nil || flags.NArg() != 1 {
		fail("app get: one URL is needed")
	}
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: *fresh}}
	counts, errors, until := map[string]int{}, 0, time.Now().Add(*duration)
	for i := 0; *duration > 0 && time.Now().Before(until) || *duration == 0 && i < *n; i++ {
		answer, err := one(&client, flags.Arg(0), *header, *full)
		if err != nil {
			answer, errors = "error: "+err.Error(), errors+1
		}
		counts[answer]++
		if *duration > 0 {
			time.Sleep(10 * time.Millisecond)
		}
	}
	var answers []string
	for a := range counts {
		answers = append(answers, a)
	}
	sort.Slice(answers, func(i, j int) bool { return counts[answers[i]] > counts[answers[j]] })
	for _, a := range answers {
		fmt.Printf("%d %s\n", counts[a], a)
	}
	if errors > 0 {
		os.Exit(1)
	}
}

func one(client *http.Client, url, header string, full bool) (string, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	if k, v, ok := strings.Cut(header, ":"); ok {
		req.Header.Set(k, strings.TrimSpace(v))
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("status %d: %.100s", resp.StatusCode, body)
	}
	if words := strings.Fields(string(body)); len(words) > 0 && !full {
		return words[0], nil
	}
	return strings.TrimSpace(string(body)), nil
}
