package datapath

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/service"
)

// What the programs on the node's devices cost a packet. Figures are only worth something on a quiet machine, and as ratios
// within one run.

// frame is a UDP datagram of 64 bytes on Ethernet.
func frame(from, to netip.AddrPort) []byte {
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	eth := make([]byte, 12, 128)
	var ip []byte
	if from.Addr().Is4() {
		eth = binary.BigEndian.AppendUint16(eth, unix.ETH_P_IP)
		ip = []byte{0x45, 0, 0, 92, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	} else {
		eth = binary.BigEndian.AppendUint16(eth, unix.ETH_P_IPV6)
		ip = []byte{0x60, 0, 0, 0, 0, 72, unix.IPPROTO_UDP, 64}
	}
	out := append(append(append(eth, ip...), src...), dst...)
	out = binary.BigEndian.AppendUint16(out, from.Port())
	out = binary.BigEndian.AppendUint16(out, to.Port())
	out = append(out, 0, 72, 0x12, 0x34)
	return append(out, make([]byte, 64)...)
}

// BenchmarkOutsidePrograms is nanoseconds in the program, as the kernel measures them over many runs with one packet, which
// stays in the caches. What is translated is translated to what it is already: else the second run would see another packet.
func BenchmarkOutsidePrograms(b *testing.B) {
	o := newOuter(b)
	pod := o.pod()
	d := o.open()
	synced(b, d)
	empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	must(b, err)
	defer empty.Close()
	ours, err := d.objs.loadOutside(d.cfg, outsideVariant{l2: 14, edge: true})
	must(b, err)
	defer ours.in.Close()
	defer ours.out.Close()
	run := func(name string, p *ebpf.Program, packet []byte) {
		b.Run(name, func(b *testing.B) {
			_, each, err := p.Benchmark(packet, b.N, nil)
			must(b, err)
			b.ReportMetric(float64(each.Nanoseconds()), "ns/packet")
		})
	}
	for _, v4 := range []bool{true, false} {
		family := map[bool]string{true: "v4", false: "v6"}[v4]
		offer(b, d, choose(v4, node4, node6), service.External{}, v4, pod) // so that the programs are on
		client, backend := ap(o.client.addr(v4), 41000), ap(pod.addr(v4), 5353)
		k := natKey{Client: addr16(client.Addr()), Backend: addr16(backend.Addr()), ClientPort: client.Port(), BackendPort: backend.Port(), Proto: unix.IPPROTO_UDP}
		must(b, d.objs.nat().Put(k, natValue{Front: k.Backend, FrontPort: k.BackendPort, ClientPort: k.ClientPort, Flags: natDirect | natAnswered, Used: ktime()}))
		must(b, d.objs.natIn().Put(natInKey{Src: k.Client, Dst: k.Backend, Sport: k.ClientPort, Dport: k.BackendPort, Proto: k.Proto},
			natIn{Peer: k.Backend, PeerPort: k.BackendPort, OwnPort: k.ClientPort, FromClient: 1}))
		for _, base := range []uint32{0, 1024} { // a backend's port, and a frontend's
			must(b, d.objs.natPorts().Put(base+uint32(k.BackendPort>>6), uint64(1)<<(k.BackendPort&63)))
		}
		stranger := ap(client.Addr(), 41001)
		run(family+"/no program", empty, frame(client, backend))
		run(family+"/in, not ours", ours.in, frame(client, ap(backend.Addr(), 9999)))
		run(family+"/in, not ours, to a backend's port", ours.in, frame(stranger, backend))
		run(family+"/in, translated", ours.in, frame(client, backend))
		run(family+"/out, not ours", ours.out, frame(ap(backend.Addr(), 9999), client))
		run(family+"/out, not ours, from a backend's port", ours.out, frame(backend, stranger))
		run(family+"/out, translated", ours.out, frame(backend, client))
	}
}

// BenchmarkForwarded is a datagram of 64 bytes there and back, by a router, the node and its bridge: four times through a device
// of the node.
func BenchmarkForwarded(b *testing.B) {
	o := newOuter(b)
	pod := serving(o.pod())
	pod.seenUDP(9999)
	trips := func(b *testing.B, to netip.AddrPort) {
		c, err := o.client.dialUDP(to)
		must(b, err)
		defer c.Close()
		out, in := make([]byte, 64), make([]byte, 256)
		once := func() {
			_, err := c.Write(out)
			must(b, err)
			_, err = c.Read(in)
			must(b, err)
		}
		for range 10 { // neighbours are found, the connection is known
			once()
		}
		for b.Loop() {
			once()
		}
	}
	both := func(name string, to func(v4 bool) netip.AddrPort) {
		for _, v4 := range []bool{true, false} {
			b.Run(map[bool]string{true: "v4/", false: "v6/"}[v4]+name, func(b *testing.B) { trips(b, to(v4)) })
		}
	}
	past := func(v4 bool) netip.AddrPort { return ap(pod.addr(v4), 9999) }
	both("no programs", past)
	d := o.open()
	synced(b, d)
	front := func(v4 bool) netip.AddrPort { return ap(choose(v4, node4, node6), 30080) }
	for _, local := range []bool{true, false} {
		for _, v4 := range []bool{true, false} {
			offer(b, d, front(v4).Addr(), service.External{Local: local}, v4, pod)
		}
		if local {
			both("not ours", past)
		}
		both(map[bool]string{true: "policy Local", false: "policy Cluster"}[local], front)
	}
}
