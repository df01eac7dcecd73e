package traps

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath"
	"github.com/sockmesh/sockmesh/pkg/datapath/selftest"
)

// Who else may have a hand on a connection's sockets: other tools' sockmaps, and other listeners on the same port.

// Trap 9: another tool's sockmap is refused with EBUSY, and the connection doesn't notice; sockets that are not redirected
// are anybody's.
func TestForeignSockmapIsRefused(t *testing.T) {
	f, err := selftest.NewForeign()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	both(t, func(e *ends, redirected bool) {
		for i, fd := range []int{e.sender, e.receiver} {
			if err := f.Map.Put(uint32(i), uint64(fd)); redirected != errors.Is(err, unix.EBUSY) || !redirected && err != nil {
				e.t.Errorf("redirected %v: another sockmap takes the socket: %v", redirected, err)
			}
		}
		e.send("on")
		if got, err := selftest.Read(e.receiver, 2); err != nil || string(got) != "on" {
			e.t.Errorf("redirected %v: %q, %v", redirected, got, err)
		}
	})
}

// Trap 9, the other way round: a tool whose program puts every connection of its cgroup into its own sockmap, and comes
// first because its cgroup is the inner one. The kernel refuses ours: the connection goes on as plain TCP, and
// `sockmesh sockets` says why.
func TestForeignSockmapThatWasThereFirst(t *testing.T) {
	f, err := selftest.NewForeign()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	inner := filepath.Join(cgroup, "tool")
	join := func(dir string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(os.Getpid())), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(inner)
	join(inner)
	defer join(cgroup)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "tool", Type: ebpf.SockOps, License: "GPL",
		Instructions: asm.Instructions{ // at both ends' ESTABLISHED: sock_map_update(ctx, map, op - 4, BPF_ANY)
			asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // op
			asm.JLT.Imm(asm.R2, 4, "out"),            // ACTIVE_ESTABLISHED
			asm.JGT.Imm(asm.R2, 5, "out"),            // PASSIVE_ESTABLISHED
			asm.Sub.Imm(asm.R2, 4),
			asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
			asm.LoadMapPtr(asm.R2, f.Map.FD()),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, -4),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnSockMapUpdate.Call(),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: inner, Attach: ebpf.AttachCGroupSockOps, Program: prog})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, fam := range selftest.Families {
		t.Run(string(fam), func(t *testing.T) {
			p, err := stage.Pair(fam, true)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			for _, way := range [][2]int{{p.Proxy, p.App}, {p.App, p.Proxy}} {
				if err := selftest.Write(way[0], []byte("on")); err != nil {
					t.Fatal(err)
				}
				if got, err := selftest.Read(way[1], 2); err != nil || string(got) != "on" {
					t.Errorf("%q, %v", got, err)
				}
			}
			s := listed(t, p.Proxy)
			if s.State != "plain" || !strings.Contains(s.Reason, "the kernel refused to enrol the socket: device or resource busy") {
				t.Errorf("the socket is listed as %+v", s)
			}
		})
	}
}

// listed is what `sockmesh sockets` knows of a socket.
func listed(t *testing.T, fd int) datapath.Socket {
	t.Helper()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	all, err := dp.Sockets()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Cookie == cookie {
			return s
		}
	}
	t.Fatalf("no socket with the cookie %d among %d", cookie, len(all))
	return datapath.Socket{}
}

// Several listeners on one port: each connection finds its own other end.
func TestReusePort(t *testing.T) {
	for _, fam := range selftest.Families {
		for _, redirected := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/redirected_%v", fam, redirected), func(t *testing.T) { reusePort(t, fam, redirected) })
		}
	}
}

func reusePort(t *testing.T, fam selftest.Family, redirected bool) {
	const many = 30
	var fds []int // all there are, in the order of their making
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	open := func(before func(fd int) error, sa unix.Sockaddr, do func(int, unix.Sockaddr) error) (fd int) {
		t.Helper()
		domain, _ := fam.Sockaddr(0)
		var err error
		stage.Do(func() {
			if fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
				return
			}
			fds = append(fds, fd)
			if err = before(fd); err == nil {
				err = do(fd, sa)
			}
		})
		if !errors.Is(err, unix.EINPROGRESS) {
			must(err)
		}
		return fd
	}
	share := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }
	own := func(fd int) error {
		if redirected {
			return dp.Own(fd)
		}
		return nil
	}
	_, at := fam.Sockaddr(0)
	var listeners [2]int
	for i := range listeners {
		listeners[i] = open(share, at, unix.Bind)
		must(unix.Listen(listeners[i], 2*many))
		port, err := selftest.Port(listeners[i])
		must(err)
		_, at = fam.Sockaddr(port) // the second one joins the first
	}
	before := enrolled(t)
	var conns []int
	for range many {
		conns = append(conns, open(own, at, unix.Connect))
	}
	for i, fd := range conns {
		must(selftest.Write(fd, []byte{byte(i)}))
	}
	seen := map[byte]int{}
	for accepted := 0; accepted < many; accepted++ {
		poll := []unix.PollFd{{Fd: int32(listeners[0]), Events: unix.POLLIN}, {Fd: int32(listeners[1]), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, 20_000); err != nil || n == 0 {
			t.Fatalf("%d of %d connections came: %v", accepted, many, err)
		}
		l := listeners[0]
		if poll[0].Revents == 0 {
			l = listeners[1]
		}
		fd, _, err := unix.Accept4(l, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		must(err)
		fds = append(fds, fd)
		got, err := selftest.Read(fd, 1)
		if err != nil || len(got) != 1 {
			t.Fatal(got, err)
		}
		seen[got[0]]++
		must(selftest.Write(fd, got))
	}
	for i, fd := range conns {
		if got, err := selftest.Read(fd, 1); err != nil || got[0] != byte(i) || seen[byte(i)] != 1 {
			t.Errorf("connection %d: %v, %v, %d", i, got, err, seen[byte(i)])
		}
	}
	if n := enrolled(t) - before; redirected && n < many || !redirected && n != 0 {
		t.Errorf("%d sockets were enrolled", n)
	}
}
