package datapath

import (
	"errors"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// Features are tried, never concluded from a version string: distributions backport, and hardened kernels take away.

// Probe is one feature of the kernel that was tried, and what came of it.
type Probe struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

type probeList struct{ list []Probe }

// add records what came of one attempt; lost says what is missing without the feature.
func (p *probeList) add(name string, err error, lost string) {
	probe := Probe{Name: name, OK: err == nil}
	if err != nil {
		probe.Detail, _, _ = strings.Cut(err.Error(), "\n")
		if lost != "" {
			probe.Detail += ": " + lost
		}
	}
	for i := range p.list {
		if p.list[i].Name == name {
			p.list[i] = probe
			return
		}
	}
	p.list = append(p.list, probe)
}

// note adds to a probe that went well how it did.
func (p *probeList) note(name, detail string) {
	p.add(name, nil, "")
	for i := range p.list {
		if p.list[i].Name == name {
			p.list[i].Detail = detail
		}
	}
}

// btf: the programs read a few kernel structs by CO-RE.
func (p *probeList) btf() error {
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	p.add("btf", err, "the kernel has no type information (CONFIG_DEBUG_INFO_BTF)")
	if err != nil {
		return errors.New("/sys/kernel/btf/vmlinux is missing: sockmesh needs a kernel built with CONFIG_DEBUG_INFO_BTF")
	}
	return nil
}

// setRetval tries bpf_set_retval in a connect hook.
func (p *probeList) setRetval() bool {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:       "sm_probe",
		Type:       ebpf.CGroupSockAddr,
		AttachType: ebpf.AttachCGroupInet4Connect,
		License:    "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, -111),
			asm.FnSetRetval.Call(),
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
		},
	})
	if err == nil {
		prog.Close()
	}
	p.add("set_retval", err, "refused connections read EPERM instead of ECONNREFUSED")
	return err == nil
}

// fionread looks for the kernel's own count of redirected bytes (929e30f93125). Without it FIONREAD of a redirected
// socket reads 0 while bytes are waiting, and applications that trust it (nginx, Java, .NET) stall.
func (p *probeList) fionread() error {
	err := errors.New("this kernel does not count redirected bytes in FIONREAD, so applications that ask for it would stall")
	if spec, e := btf.LoadKernelSpec(); e == nil {
		var psock *btf.Struct
		if spec.TypeByName("sk_psock", &psock) == nil {
			for _, m := range psock.Members {
				if m.Name == "msg_tot_len" {
					err = nil
				}
			}
		}
	}
	p.add("fionread", err, "acceleration stays off")
	return err
}
