package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/sockmesh/sockmesh/pkg/lab/traffic"
)

// Load is a traffic generator that runs in a pod.
type Load struct {
	proc    *Process
	timeout time.Duration // of an exchange, and of the end of a connection

	mu       sync.Mutex // guards what follows
	last     traffic.Report
	failures []traffic.Failure
}

// StartTraffic starts a generator in the pod, by Config.Helper.
func (p *Pod) StartTraffic(cfg traffic.Config) (*Load, error) {
	text, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	command, err := p.lab.helper(string(text))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(command[0], command[1:]...)
	log, err := os.CreateTemp(filepath.Join(p.lab.Dir, "log"), flat(p.Place.Name)+".traffic.*.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stderr = log
	// An os.Pipe and not StdoutPipe, whose reader Wait closes before the last report is read.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = w
	l := &Load{timeout: cfg.Timeout}
	l.proc, err = p.start("traffic", cmd)
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	l.proc.Log = log.Name()
	go l.read(r)
	return l, nil
}

// helper is the command line of traffic.Main with this argument.
func (l *Lab) helper(arg string) ([]string, error) {
	h := l.cfg.Helper
	if len(h) == 0 {
		return nil, errors.New("lab: Config.Helper is not set")
	}
	return append(h[:len(h):len(h)], arg), nil
}

func (l *Load) read(r *os.File) {
	defer r.Close()
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var report traffic.Report
		if json.Unmarshal(lines.Bytes(), &report) != nil {
			continue
		}
		l.mu.Lock()
		l.last = report
		l.failures = append(l.failures, report.Failures...)
		l.mu.Unlock()
	}
}

// Now is the last report, with all failures so far; at most 50 ms old.
func (l *Load) Now() traffic.Report {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.last
	r.Failures = append([]traffic.Failure(nil), l.failures...)
	return r
}

// Stop ends the generator and returns what it has to say at the end. It gives an exchange that nobody answers, and the
// end of its connection, time to fail: killed before that, a generator could not tell of it.
func (l *Load) Stop() (traffic.Report, error) {
	before := l.Now().At
	err := l.proc.Stop(2*max(l.timeout, 10*time.Second) + 5*time.Second)
	for range 100 { // the last line may still be in the pipe
		if l.Now().At.After(before) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	return l.Now(), err
}

// WaitRequests waits until n more requests have been answered with 200.
func (l *Load) WaitRequests(ctx context.Context, n uint64) error {
	start := l.Now().OK
	return Wait(ctx, func() error {
		if !l.proc.Running() {
			return fmt.Errorf("the traffic generator ended: %s", l.proc.Tail())
		}
		if now := l.Now(); now.OK < start+n {
			return fmt.Errorf("%d of %d requests answered, %d failed in all, last failure: %s", now.OK-start, n, now.Failed, lastFailure(now))
		}
		return nil
	})
}

func lastFailure(r traffic.Report) string {
	if len(r.Failures) == 0 {
		return "none"
	}
	f := r.Failures[len(r.Failures)-1]
	return f.At.Format("15:04:05.000 ") + f.Error
}

// Window is the time in which a process was being killed: from just before the signal until its end was seen. Its
// sockets close somewhere in between.
type Window struct{ From, Until time.Time }

// KillTimed is Kill that says when.
func (p *Process) KillTimed() Window {
	from := time.Now()
	p.Kill()
	return Window{from, time.Now()}
}

// OutsideOf returns the failures that the end of the process does not explain. It explains those of connections that
// were made before its end and broke after the signal, and of connects in between.
func (w Window) OutsideOf(failures []traffic.Failure) []traffic.Failure {
	const slack = 5 * time.Millisecond // between what happens and when the generator's thread takes its time
	var rest []traffic.Failure
	for _, f := range failures {
		made := f.Connected
		if made.IsZero() {
			made = f.At
		}
		if f.At.Before(w.From.Add(-slack)) || made.After(w.Until.Add(slack)) {
			rest = append(rest, f)
		}
	}
	return rest
}
