package datapath

import (
	"fmt"
	"reflect"
	"sort"
	"time"

	"github.com/cilium/ebpf"
)

// AccelerationStatus is the "acceleration" object of `sockmesh status`.
type AccelerationStatus struct {
	Mode            string `json:"mode"` // auto, off
	Active          bool   `json:"active"`
	Reason          string `json:"reason,omitempty"`
	Pairs           int    `json:"pairs"`
	RedirectedBytes uint64 `json:"redirected_bytes"`
	PassedBytes     uint64 `json:"passed_bytes"`
	// StepAside: connections whose bytes skip the proxy.
	StepAside StepAsideStatus `json:"step_aside"`
	Probes    []Probe         `json:"probes"`
}

// ProgramStatus is one program and where it is attached.
type ProgramStatus struct {
	Name   string `json:"name"`
	Attach string `json:"attach"`
	ID     uint32 `json:"id"`
	Pinned string `json:"pinned,omitempty"`
}

// MapStatus is one map and how full it is.
type MapStatus struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	ID         uint32 `json:"id"`
	Entries    int    `json:"entries"`
	MaxEntries uint32 `json:"max_entries"`
	Pinned     string `json:"pinned,omitempty"`
}

// ObjectStatus is the "datapath" object of `sockmesh status`.
type ObjectStatus struct {
	// Attached is false while the programs of an earlier layout are still in charge.
	Attached bool            `json:"attached"`
	Cgroup   string          `json:"cgroup"`
	Programs []ProgramStatus `json:"programs"`
	Maps     []MapStatus     `json:"maps"`
	// Warnings are maps that are almost full, and sizes that could not be put in force.
	Warnings []string `json:"warnings,omitempty"`
}

// Connections is the "connections" object of `sockmesh status`.
type Connections struct {
	Proxied    uint64 `json:"proxied"`
	Offloaded  uint64 `json:"offloaded"`
	Service    uint64 `json:"service"`
	Passed     uint64 `json:"passed"` // of enrolled pods: neither claimed nor a Service
	Refused    uint64 `json:"refused"`
	FailOpen   uint64 `json:"fail_open"`
	FailClosed uint64 `json:"fail_closed"`
	// SteppedAside: of the proxied ones, those whose bytes skipped the proxy.
	SteppedAside uint64 `json:"stepped_aside"`
}

// Counters are the totals since the maps were made, summed over the CPUs. bpf/common.h has the same list.
type Counters struct {
	Proxied            uint64 `json:"proxied"`
	Offloaded          uint64 `json:"offloaded"`
	Service            uint64 `json:"service"`
	Passed             uint64 `json:"passed"`
	Refused            uint64 `json:"refused"`
	FailOpen           uint64 `json:"fail_open"`
	FailClosed         uint64 `json:"fail_closed"`
	OriginMissing      uint64 `json:"origin_missing"` // connections to the proxy's port that nobody redirected
	OriginFull         uint64 `json:"origin_full"`
	Enrolled           uint64 `json:"enrolled"` // sockets put into sm_pairs
	EnrolFailed        uint64 `json:"enrol_failed"`
	Late               uint64 `json:"late"`
	SkippedBlocking    uint64 `json:"skipped_blocking"`
	SkippedMptcp       uint64 `json:"skipped_mptcp"`
	TurnedBlocking     uint64 `json:"turned_blocking"`
	PeerMissing        uint64 `json:"peer_missing"`
	PeerGone           uint64 `json:"peer_gone"`
	SlowReader         uint64 `json:"slow_reader"` // directions that went back to TCP because too much lay unread
	RedirectedMessages uint64 `json:"redirected_messages"`
	RedirectedBytes    uint64 `json:"redirected_bytes"`
	PassedMessages     uint64 `json:"passed_messages"`
	PassedBytes        uint64 `json:"passed_bytes"`
	PoolRetries        uint64 `json:"pool_retries"`
	StorageFailed      uint64 `json:"storage_failed"`
	Spliced            uint64 `json:"spliced"`          // enrolled sockets that their application spliced
	SkippedSplicing    uint64 `json:"skipped_splicing"` // sockets not enrolled because their application splices
	SteppedAside       uint64 `json:"stepped_aside"`    // connections of which a direction has skipped the proxy
	AsideDirections    uint64 `json:"aside_directions"` // times that a direction began to
	AsideReturned      uint64 `json:"aside_returned"`   // times that one came back because its receiver was slow
	AsideMessages      uint64 `json:"aside_messages"`
	AsideBytes         uint64 `json:"aside_bytes"`
	Outside            uint64 `json:"outside"`           // connections of clients outside
	OutsideRefused     uint64 `json:"outside_refused"`   // of those, answered with a refusal
	OutsideSilent      uint64 `json:"outside_silent"`    // left without an answer: backends are on other nodes
	OutsideDenied      uint64 `json:"outside_denied"`    // left without an answer: not in the source ranges
	OutsideStray       uint64 `json:"outside_stray"`     // segments of connections that aren't known
	OutsideFull        uint64 `json:"outside_full"`      // packets that waited for room in sm_nat
	OutsideNoPort      uint64 `json:"outside_no_port"`   // connections for which no source port was free
	OutsideNoSource    uint64 `json:"outside_no_source"` // connections for which the node has no address
	OutsideErrors      uint64 `json:"outside_errors"`    // ICMP errors translated
	UdpRepicked        uint64 `json:"udp_repicked"`      // flows of UDP sockets that moved because their backend was gone
	BindRefused        uint64 `json:"bind_refused"`      // attempts of pods' processes to bind the proxy's port beside its listener
	AsideBodies        uint64 `json:"aside_bodies"`      // bodies of messages of which a part has skipped the proxy
	AsideBodyBytes     uint64 `json:"aside_body_bytes"`  // of AsideBytes, theirs
}

// ReconcilerStatus says how far the maps follow the wanted state.
type ReconcilerStatus struct {
	// Synced: every source has delivered its first list, or the time-out is over.
	Synced bool `json:"synced"`
	// Waiting names the sources that have not; their entries are never deleted before they do.
	Waiting []string `json:"waiting,omitempty"`
	// TimedOut: some are still waited for, and those that have come may delete meanwhile.
	TimedOut bool `json:"timed_out,omitempty"`
	// Superseded: another agent has opened the maps since, and writes them.
	Superseded    bool         `json:"superseded,omitempty"`
	Pending       int          `json:"pending"`
	Errors        []EntryError `json:"errors,omitempty"` // entries that could not be written
	DriftRepaired uint64       `json:"drift_repaired"`
	// EndedTCP and EndedUDP count sockets that were ended because their backend was gone.
	EndedTCP    uint64    `json:"ended_tcp"`
	EndedUDP    uint64    `json:"ended_udp"`
	Writes      uint64    `json:"writes"`
	Deletes     uint64    `json:"deletes"`
	LastApplied time.Time `json:"last_applied"`
}

// EntryError is a wanted entry that is not in force, and why.
type EntryError struct {
	Kind  string `json:"kind"` // frontend, outside, claim, pod, local
	Name  string `json:"name"` // namespace/name, or the listener's
	Addr  string `json:"addr"`
	Error string `json:"error"`
	// Map that has no room for it, where that is the reason.
	Map string `json:"map,omitempty"`
}

// Status is everything that the datapath says of itself.
type Status struct {
	Acceleration AccelerationStatus `json:"acceleration"`
	Datapath     ObjectStatus       `json:"datapath"`
	Connections  Connections        `json:"connections"`
	Reconciler   ReconcilerStatus   `json:"reconciler"`
	Outside      OutsideStatus      `json:"outside"`
	Guard        GuardStatus        `json:"guard"`
}

// Status collects the figures. It counts maps' entries (see counts) and asks the kernel about each object, so it's not for hot
// paths.
func (d *Datapath) Status() Status {
	c, _ := d.Counters()
	s := Status{
		Acceleration: AccelerationStatus{
			Mode: "off", Pairs: d.counts.entries(d.objs.pairs()) / 2,
			RedirectedBytes: c.RedirectedBytes, PassedBytes: c.PassedBytes, StepAside: d.stepAsideStatus(&c), Probes: d.Probes(),
		},
		Datapath: ObjectStatus{Cgroup: d.cfg.CgroupRoot, Programs: d.programs(), Maps: d.Maps()},
		Connections: Connections{
			Proxied: c.Proxied, Offloaded: c.Offloaded, Service: c.Service, Passed: c.Passed,
			Refused: c.Refused + c.FailClosed, FailOpen: c.FailOpen, FailClosed: c.FailClosed,
			SteppedAside: c.SteppedAside,
		},
		Reconciler: d.rec.Status(),
		Outside:    d.outsideStatus(),
		Guard:      d.guardStatus(),
	}
	s.Datapath.Warnings = append(s.Datapath.Warnings, d.objs.kept...)
	for _, m := range s.Datapath.Maps {
		if w := m.FillWarning(); w != "" {
			s.Datapath.Warnings = append(s.Datapath.Warnings, w)
		}
	}
	if d.cfg.Acceleration {
		s.Acceleration.Mode = "auto"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s.Acceleration.Active = d.flags&flagAccelerate != 0
	s.Acceleration.Reason = d.accelReason
	s.Datapath.Attached = d.attached
	return s
}

// Probes lists the kernel features that were tried at start.
func (d *Datapath) Probes() []Probe {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]Probe(nil), d.probes.list...)
}

// Counters sums the per-CPU counters.
func (d *Datapath) Counters() (Counters, error) {
	var perCPU []counterValue
	var sum Counters
	if err := d.objs.counters().Lookup(uint32(0), &perCPU); err != nil {
		return sum, fmt.Errorf("read sm_counters: %w", err)
	}
	to := reflect.ValueOf(&sum).Elem()
	for _, cpu := range perCPU {
		from := reflect.ValueOf(cpu)
		for i := range to.NumField() {
			f := to.Field(i)
			f.SetUint(f.Uint() + from.FieldByName(to.Type().Field(i).Name).Uint())
		}
	}
	return sum, nil
}

func (d *Datapath) programs() []ProgramStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []ProgramStatus
	for _, h := range cgroupHooks {
		p := d.objs.progs[h.prog]
		if p == nil {
			continue
		}
		st := ProgramStatus{Name: h.prog, Attach: h.attach.String(), ID: progID(p)}
		if l := d.links[h.prog]; l != nil {
			st.Pinned = d.dir.linkPin(h.prog)
			if info, err := l.Info(); err == nil {
				st.ID = uint32(info.Program) // what really hangs there
			}
		}
		out = append(out, st)
	}
	if p := d.objs.progs[progMsg]; p != nil {
		out = append(out, ProgramStatus{Name: progMsg, Attach: "sm_pairs (SkMsgVerdict)", ID: progID(p)})
	}
	if p := d.objs.progs[progStepAside]; p != nil {
		out = append(out, ProgramStatus{Name: progStepAside, Attach: "run by the proxy", ID: progID(p)})
	}
	for name, attach := range map[string]string{progSpliceEntry: "fentry tcp_splice_read", progSplicePoint: "tracepoint tcp_rcv_space_adjust"} {
		if p := d.objs.progs[name]; p != nil {
			out = append(out, ProgramStatus{Name: name, Attach: attach, ID: progID(p)})
		}
	}
	for name, attach := range map[string]string{progSockets: "iter/bpf_sk_storage_map, on demand", progSockFiles: "iter/task_file, on demand"} {
		if p := d.objs.progs[name]; p != nil {
			out = append(out, ProgramStatus{Name: name, Attach: attach, ID: progID(p)})
		}
	}
	return out
}

func progID(p *ebpf.Program) uint32 {
	info, err := p.Info()
	if err != nil {
		return 0
	}
	id, _ := info.ID()
	return uint32(id)
}

// Maps lists the maps and how full they are. What the programs fill is counted no more often than costs a hundredth of a core.
func (d *Datapath) Maps() []MapStatus {
	var out []MapStatus
	known := d.rec.entries()
	for name, m := range d.objs.maps {
		st := MapStatus{Name: name, Type: m.Type().String(), MaxEntries: m.MaxEntries(), Pinned: d.dir.mapPin(name)}
		if info, err := m.Info(); err == nil {
			id, _ := info.ID()
			st.ID = uint32(id)
		}
		if n, ok := known[name]; ok {
			st.Entries = n
		} else if m.Type() != ebpf.SkStorage { // has no keys to walk
			st.Entries = d.counts.entries(m)
		}
		out = append(out, st)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}
