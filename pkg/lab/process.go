package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a program that runs in a Place until it ends or Stop is called. It dies with the program that started
// it, even if that is killed.
type Process struct {
	// Log is the file with its stdout and stderr.
	Log string

	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; read only after done is closed
}

// Start runs a program in the place's namespace and cgroup. It enters them as nsenter would: `ip netns exec` would
// give it a fresh /sys, without bpffs and cgroup2.
func (p *Place) Start(name string, args ...string) (*Process, error) {
	log, err := os.CreateTemp(filepath.Join(p.lab.Dir, "log"), flat(p.Name)+"."+name+".*.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	proc, err := p.start(name, cmd)
	if err == nil {
		proc.Log = log.Name()
	}
	return proc, err
}

// start runs cmd, whose standard streams the caller has set. The lab ends it when it closes.
func (p *Place) start(name string, cmd *exec.Cmd) (*Process, error) {
	cgroup, err := os.Open(p.Cgroup)
	if err != nil {
		return nil, err
	}
	defer cgroup.Close()
	// A process group of its own: Ctrl-C at the terminal is for the lab's owner, who then ends the rest in order.
	cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd()), Pdeathsig: unix.SIGKILL, Setpgid: true}
	if err := onStarter(func() error { _, err := visit(p.netns, cmd.Start); return err }); err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", name, p.Name, err)
	}
	proc := &Process{name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		proc.err = cmd.Wait()
		close(proc.done)
	}()
	p.lab.mu.Lock()
	defer p.lab.mu.Unlock()
	if p.lab.ended {
		proc.signal(unix.SIGKILL)
		return nil, errors.New("the lab is closed")
	}
	p.lab.procs = append(p.lab.procs, proc)
	return proc, nil
}

// starts are run one by one on a thread that lives as long as this program. Pdeathsig means the thread that started the
// process, not its program, and threads of Go programs do end: those that were locked by a goroutine that has ended.
var starts = sync.OnceValue(func() chan<- func() {
	list := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range list {
			f()
		}
	}()
	return list
})

func onStarter(f func() error) error {
	done := make(chan error)
	starts() <- func() { done <- f() }
	return <-done
}

// Name is what it was started as.
func (p *Process) Name() string { return p.name }

// PID of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running says whether it has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Stop asks the process to end, kills it if it has not done so within the grace, and waits.
func (p *Process) Stop(grace time.Duration) error {
	p.signal(unix.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(grace):
		p.Kill()
	}
	return p.err
}

// Kill is kill -9, and waits for the end.
func (p *Process) Kill() {
	p.signal(unix.SIGKILL)
	<-p.done
}

// KillGroup is Kill of the process and of those that it has started, such as kube-proxy's nft, which may go on for minutes.
func (p *Process) KillGroup() {
	select {
	case <-p.done:
	default: // not waited for, so the group's number is still its own
		_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	}
	<-p.done
}

// Signal sends it a signal.
func (p *Process) Signal(s unix.Signal) { p.signal(s) }

func (p *Process) signal(s unix.Signal) {
	// os.Process knows whether the pid is still ours, so a pid that was given to another is never hit.
	_ = p.cmd.Process.Signal(s)
}

// Output is what the process has written so far.
func (p *Process) Output() string {
	text, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Tail is the end of its output, for messages.
func (p *Process) Tail() string {
	lines := strings.Split(strings.TrimRight(p.Output(), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

// Run runs a command in the place to its end and returns its stdout. The error has its stderr.
func (p *Place) Run(ctx context.Context, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	proc, err := p.start(filepath.Base(args[0]), cmd)
	if err != nil {
		return "", err
	}
	defer p.lab.forget(proc)
	select {
	case <-proc.done:
	case <-ctx.Done():
		proc.Kill()
		return stdout.String(), fmt.Errorf("%s in %s: %w", strings.Join(args, " "), p.Name, ctx.Err())
	}
	if proc.err != nil {
		return stdout.String(), fmt.Errorf("%s in %s: %w: %s", strings.Join(args, " "), p.Name, proc.err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// forget lets go of a process that has ended, so that thousands of short ones cost nothing.
func (l *Lab) forget(proc *Process) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, p := range l.procs {
		if p == proc {
			l.procs = append(l.procs[:i], l.procs[i+1:]...)
			return
		}
	}
}

// flat makes namespace/name usable as a file's name.
func flat(name string) string { return strings.ReplaceAll(name, "/", "_") }
