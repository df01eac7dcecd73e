package selftest

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Foreign is a sockmap with a verdict program, as another tool has it.
type Foreign struct {
	Map  *ebpf.Map
	prog *ebpf.Program
}

// NewForeign makes a map whose program lets everything pass.
func NewForeign() (*Foreign, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "foreign", Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: 4})
	if err != nil {
		return nil, err
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.SkMsg, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}, // SK_PASS
	})
	if err != nil {
		m.Close()
		return nil, err
	}
	f := &Foreign{m, prog}
	err = link.RawAttachProgram(link.RawAttachProgramOptions{Target: m.FD(), Program: prog, Attach: ebpf.AttachSkMsgVerdict})
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Close frees both.
func (f *Foreign) Close() {
	f.Map.Close()
	f.prog.Close()
}

// Another tool that wants an enrolled socket is refused with EBUSY, and the connection goes on.
func foreignSockmap(s *Stage) error {
	f, err := NewForeign()
	if err != nil {
		return err
	}
	defer f.Close()
	return s.onPair(IPv4, func(p *Pair) error {
		if err := transfer(p.Proxy, p.App, "before"); err != nil {
			return err
		}
		if err := f.Map.Put(uint32(0), uint64(p.App)); !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("another sockmap took an enrolled socket: %w", err)
		}
		return transfer(p.Proxy, p.App, "after")
	})
}
