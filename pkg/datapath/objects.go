package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/cilium/ebpf"
)

// The maps' keys and values are declared once, in bpf/common.h; these are bpf2go's names for them.
type (
	configValue  = sockmeshSmConfig
	frontendKey  = sockmeshSmFrontendKey
	claimKey     = sockmeshSmClaimKey
	targetValue  = sockmeshSmTarget
	slotKey      = sockmeshSmSlotKey
	slotValue    = sockmeshSmSlot
	backendValue = sockmeshSmBackend
	netnsValue   = sockmeshSmNetns
	localKey     = sockmeshSmLocalKey
	localValue   = sockmeshSmLocal
	tupleKey     = sockmeshSmTuple
	originValue  = sockmeshSmOrigin
	sockValue    = sockmeshSmSock
	counterValue = sockmeshSmCounters
	socketRow    = sockmeshSmSocketRow
	appKey       = sockmeshSmApp
	splicedValue = sockmeshSmSpliced
	memberKey    = sockmeshSmMemberKey
	sourceKey    = sockmeshSmSourceKey
	affinityKey  = sockmeshSmAffinityKey
	affinity     = sockmeshSmAffinity
	udpKey       = sockmeshSmUdpKey
	udpFlow      = sockmeshSmUdpFlow
	spliceEvent  = sockmeshSmSpliceEvent
	asideDir     = sockmeshSmAsideDir
	asideDesk    = sockmeshSmAsideDesk
	asideRequest = sockmeshSmAsideRequest
	natKey       = sockmeshSmNatKey
	natValue     = sockmeshSmNat
	natInKey     = sockmeshSmNatInKey
	natIn        = sockmeshSmNatIn
	fragKey      = sockmeshSmFragKey
	fragValue    = sockmeshSmFrag
	nodeValue    = sockmeshSmNode
)

// Programs that the data plane can do without, each with what is lost.
const (
	progMsg        = sockmeshProgSmMsg       // acceleration
	progStepAside  = sockmeshProgSmStepAside // connections that skip the proxy
	progSockets    = sockmeshProgSmSockets   // `sockmesh sockets`; where the kernel refuses it, the next one
	progSockFiles  = sockmeshProgSmSockFiles
	progEndTCP     = sockmeshProgSmEndTcp // ending sockets; where it's missing, sock_diag does it
	progEndUDP     = sockmeshProgSmEndUdp
	progGetsockopt = sockmeshProgSmGetsockopt // SO_ORIGINAL_DST for a foreign proxy

	// Either of them notices applications that splice: acceleration
	progSpliceEntry = sockmeshProgSmSpliceEntry
	progSplicePoint = sockmeshProgSmSplicePoint

	// Clients outside this node.
	progNATIngress = sockmeshProgSmNatIngress
	progNATEgress  = sockmeshProgSmNatEgress
)

// objects are the loaded maps and programs.
type objects struct {
	maps  map[string]*ebpf.Map
	progs map[string]*ebpf.Program
	// spliceEvents is the ring of the program that notices splices; this agent's alone.
	spliceEvents *ebpf.Map
	// asideSlots and asideDesks are shared by the programs of this agent's connections and its proxy; this agent's alone.
	asideSlots, asideDesks *ebpf.Map
	// fresh: maps with configuration that were created empty, although a datapath was there before.
	fresh bool
	// kept says of maps that could not get the size that was asked for why.
	kept []string
}

func (o *objects) close() {
	for _, m := range o.maps {
		m.Close()
	}
	for _, p := range o.progs {
		p.Close()
	}
	for _, m := range []*ebpf.Map{o.spliceEvents, o.asideSlots, o.asideDesks} {
		if m != nil {
			m.Close()
		}
	}
}

func (o *objects) frontends() *ebpf.Map { return o.maps[sockmeshMapSmFrontends] }
func (o *objects) outside() *ebpf.Map   { return o.maps[sockmeshMapSmOutside] }
func (o *objects) members() *ebpf.Map   { return o.maps[sockmeshMapSmMembers] }
func (o *objects) sources() *ebpf.Map   { return o.maps[sockmeshMapSmSources] }
func (o *objects) claims() *ebpf.Map    { return o.maps[sockmeshMapSmClaims] }
func (o *objects) slots() *ebpf.Map     { return o.maps[sockmeshMapSmSlots] }
func (o *objects) backends() *ebpf.Map  { return o.maps[sockmeshMapSmBackends] }
func (o *objects) netns() *ebpf.Map     { return o.maps[sockmeshMapSmNetns] }
func (o *objects) local() *ebpf.Map     { return o.maps[sockmeshMapSmLocal] }
func (o *objects) sock() *ebpf.Map      { return o.maps[sockmeshMapSmSock] }
func (o *objects) pairs() *ebpf.Map     { return o.maps[sockmeshMapSmPairs] }
func (o *objects) counters() *ebpf.Map  { return o.maps[sockmeshMapSmCounters] }
func (o *objects) doomed() *ebpf.Map    { return o.maps[sockmeshMapSmDoomed] }
func (o *objects) config() *ebpf.Map    { return o.maps[sockmeshMapSmConfig] }
func (o *objects) spliced() *ebpf.Map   { return o.maps[sockmeshMapSmSpliced] }
func (o *objects) listeners() *ebpf.Map { return o.maps[sockmeshMapSmListeners] }
func (o *objects) splicing() *ebpf.Map  { return o.maps[sockmeshMapSmSplicing] }
func (o *objects) nat() *ebpf.Map       { return o.maps[sockmeshMapSmNat] }
func (o *objects) natIn() *ebpf.Map     { return o.maps[sockmeshMapSmNatIn] }
func (o *objects) natNew() *ebpf.Map    { return o.maps[sockmeshMapSmNatNew] }
func (o *objects) natNewIn() *ebpf.Map  { return o.maps[sockmeshMapSmNatNewIn] }
func (o *objects) natPorts() *ebpf.Map  { return o.maps[sockmeshMapSmNatPorts] }

// sized returns the embedded object with the capacities of cfg.
func sized(cfg Config) (*ebpf.CollectionSpec, error) {
	spec, err := loadSockmesh()
	if err != nil {
		return nil, err
	}
	for _, m := range cfg.Sizes.ByMap() {
		spec.Maps[m.Map].MaxEntries = *m.Entries
	}
	// A proxied connection has four sockets and two directions.
	spec.Maps[sockmeshMapAsideSlots].MaxEntries = max(cfg.Sizes.Pairs/2, 2)
	// A connection arrives in two forms. Those whose handshake isn't over are an eighth as many, and preallocated; not too few,
	// because a small LRU map forgets long before it is full.
	nat, unanswered := uint32(1), uint32(1)
	if cfg.Outside {
		nat, unanswered = cfg.Sizes.NAT, max(cfg.Sizes.NAT/8, 256)
	}
	spec.Maps[sockmeshMapSmNat].MaxEntries, spec.Maps[sockmeshMapSmNatIn].MaxEntries = nat, 2*nat
	spec.Maps[sockmeshMapSmNatNew].MaxEntries, spec.Maps[sockmeshMapSmNatNewIn].MaxEntries = unanswered, 2*unanswered
	return spec, nil
}

// load creates or adopts the maps under dir and loads the programs on them. Of the optional programs a failure is a
// probe that says no; of the others it is an error.
func load(cfg Config, dir layoutDir, probes *probeList) (*objects, error) {
	spec, err := sized(cfg)
	if err != nil {
		return nil, err
	}
	if err := spec.Variables[sockmeshVarSmHasSetRetval].Set(probes.setRetval()); err != nil {
		return nil, fmt.Errorf("set a load-time constant: %w", err)
	}
	o := &objects{maps: map[string]*ebpf.Map{}, progs: map[string]*ebpf.Program{}}
	if err := o.openMaps(spec, dir, cfg.Logger); err != nil {
		o.close()
		return nil, err
	}
	if cfg.Acceleration {
		if err := o.makeAside(spec); err != nil {
			o.close()
			return nil, fmt.Errorf("create the maps of connections that skip the proxy: %w", err)
		}
	}
	optional := map[string]bool{progMsg: cfg.Acceleration, progStepAside: cfg.Acceleration, progSockets: true, progGetsockopt: cfg.OriginalDstSockopt,
		progSockFiles: false, progEndTCP: cfg.Services, progEndUDP: cfg.Services}
	var must []string
	for name := range spec.Programs {
		if _, ok := optional[name]; !ok && name != progSpliceEntry && name != progSplicePoint && name != progNATIngress && name != progNATEgress {
			must = append(must, name)
		}
	}
	if err := o.loadPrograms(spec, must...); err != nil {
		o.close()
		return nil, fmt.Errorf("load the programs: %w%s", err, loadHint(err))
	}
	for name, wanted := range optional {
		if !wanted {
			continue
		}
		err := o.loadPrograms(spec, name)
		probes.add("load_"+name, err, "")
		if err != nil {
			cfg.Logger.Warn("an optional program does not load", "program", name, "error", err)
		}
	}
	if o.progs[progSockets] == nil || cfg.Services { // who has a socket that must be ended
		err := o.loadPrograms(spec, progSockFiles)
		if err == nil {
			probes.note("load_"+progSockFiles, "sockets are found by the descriptors of the processes that the agent can see")
		} else {
			probes.add("load_"+progSockFiles, err, "sockets can't be listed")
		}
	}
	return o, nil
}

func (o *objects) makeAside(spec *ebpf.CollectionSpec) (err error) {
	if o.asideSlots, err = ebpf.NewMap(spec.Maps[sockmeshMapAsideSlots]); err != nil {
		return err
	}
	o.asideDesks, err = ebpf.NewMap(spec.Maps[sockmeshMapAsideDesks])
	return err
}

// loadOutside loads the programs for clients outside, for devices of one sort.
func (o *objects) loadOutside(cfg Config, v outsideVariant) (outsidePrograms, error) {
	spec, err := sized(cfg)
	if err != nil {
		return outsidePrograms{}, err
	}
	if err := errors.Join(spec.Variables[sockmeshVarSmNatL2].Set(v.l2), spec.Variables[sockmeshVarSmNatEdge].Set(v.edge)); err != nil {
		return outsidePrograms{}, fmt.Errorf("set a load-time constant: %w", err)
	}
	part := objects{maps: o.maps, progs: map[string]*ebpf.Program{}}
	if err := part.loadPrograms(spec, progNATIngress, progNATEgress); err != nil {
		return outsidePrograms{}, err
	}
	return outsidePrograms{in: part.progs[progNATIngress], out: part.progs[progNATEgress]}, nil
}

func loadHint(err error) string {
	if errors.Is(err, os.ErrPermission) {
		return " (loading needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or root; a hardened kernel may need CAP_SYS_ADMIN)"
	}
	if errors.Is(err, ebpf.ErrNotSupported) {
		return " (the kernel lacks a feature that sockmesh needs: 5.15 or later, CONFIG_CGROUP_BPF, CONFIG_NET_SOCK_MSG and CONFIG_DEBUG_INFO_BTF)"
	}
	return ""
}

// loadPrograms loads the named programs onto the maps that are open already.
func (o *objects) loadPrograms(spec *ebpf.CollectionSpec, names ...string) error {
	part := spec.Copy()
	keep := map[string]*ebpf.ProgramSpec{}
	for _, n := range names {
		keep[n] = part.Programs[n]
	}
	part.Programs = keep
	watches := keep[progSpliceEntry] != nil || keep[progSplicePoint] != nil
	if !watches {
		delete(part.Maps, sockmeshMapSpliceEvents)
	}
	if keep[progNATIngress] == nil {
		delete(part.Maps, sockmeshMapNatWork)
	}
	replace := map[string]*ebpf.Map{}
	for name, m := range map[string]*ebpf.Map{sockmeshMapAsideSlots: o.asideSlots, sockmeshMapAsideDesks: o.asideDesks} {
		if m != nil {
			replace[name] = m
		} else {
			delete(part.Maps, name)
		}
	}
	for name, m := range o.maps {
		part.Maps[name].MaxEntries = m.MaxEntries() // an adopted map may have another size
		replace[name] = m
	}
	coll, err := ebpf.NewCollectionWithOptions(part, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return err
	}
	defer coll.Close()
	for _, n := range names {
		o.progs[n] = coll.DetachProgram(n)
	}
	if watches {
		o.spliceEvents = coll.DetachMap(sockmeshMapSpliceEvents)
	}
	return nil
}

// openMaps adopts the pinned maps or makes new ones.
func (o *objects) openMaps(spec *ebpf.CollectionSpec, dir layoutDir, log *slog.Logger) error {
	for name, ms := range spec.Maps {
		if !isOurs(name) {
			continue // .rodata belongs to the programs of one load
		}
		m, fresh, err := openMap(ms, dir.mapPin(name), dir, log)
		if err != nil {
			return err
		}
		o.maps[name] = m
		if m.MaxEntries() != ms.MaxEntries && !arrays[ms.Type.String()] && ms.MaxEntries != 0 {
			o.kept = append(o.kept, keptSize(ms, m))
		}
		o.fresh = o.fresh || fresh && !observed[name]
	}
	return nil
}

// keptSize says why openMap left a map's size as it was.
func keptSize(wanted *ebpf.MapSpec, m *ebpf.Map) string {
	why := "what is in it would not fit, and nothing is thrown out"
	if wanted.Type == ebpf.SockHash {
		why = "sockets can't be moved from one map to another while they talk; it takes the new size after a cleanup"
	}
	return fmt.Sprintf("%s keeps its size of %d entries, although %d are asked for: %s", wanted.Name, m.MaxEntries(), wanted.MaxEntries, why)
}

// observed are maps that the programs fill by themselves: nothing waits for them.
var observed = map[string]bool{
	sockmeshMapSmNat: true, sockmeshMapSmNatIn: true, sockmeshMapSmNatNew: true, sockmeshMapSmNatNewIn: true, sockmeshMapSmNatPorts: true,
	sockmeshMapSmFrags: true, sockmeshMapSmNode: true,
	sockmeshMapSmAffinity: true, sockmeshMapSmListeners: true, sockmeshMapSmUdpMore: true, sockmeshMapSmDoomed: true, sockmeshMapSmNosplice: true, sockmeshMapSmSpliced: true, sockmeshMapSmSplicing: true, sockmeshMapSmCounters: true,
}

func isOurs(name string) bool { return len(name) > 3 && name[:3] == "sm_" }

// openMap returns the map pinned at pin. A pinned map of another capacity is replaced by a copy with the wanted
// capacity; one whose entries have another shape is replaced by an empty one, which the reconciler fills.
func openMap(spec *ebpf.MapSpec, pin string, dir layoutDir, log *slog.Logger) (m *ebpf.Map, fresh bool, err error) {
	old, err := ebpf.LoadPinnedMap(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		m, err := createMap(spec, pin)
		return m, true, err
	}
	if err != nil {
		return nil, false, fmt.Errorf("open the pinned map %s: %w", pin, err)
	}
	if err := spec.Compatible(old); err == nil {
		return old, false, nil
	}
	sameShape := old.Type() == spec.Type && old.KeySize() == spec.KeySize && old.ValueSize() == spec.ValueSize && old.Flags() == spec.Flags
	if sameShape && spec.Type == ebpf.SockHash {
		// Sockets can't be moved from one map to another while they talk.
		log.Warn("sm_pairs keeps the size that it was made with; it takes the new one after a cleanup",
			"has", old.MaxEntries(), "wanted", spec.MaxEntries)
		return old, false, nil
	}
	next, err := ebpf.NewMap(spec)
	if err != nil {
		old.Close()
		return nil, false, fmt.Errorf("create map %s: %w", spec.Name, err)
	}
	if sameShape {
		if err := copyMap(next, old); err != nil {
			next.Close()
			log.Warn("a map keeps its old size, because its entries don't fit into the wanted one",
				"map", spec.Name, "has", old.MaxEntries(), "wanted", spec.MaxEntries, "error", err)
			return old, false, nil
		}
	} else {
		log.Warn("a pinned map has another shape and is made anew; connections move to it when it is filled", "map", spec.Name)
	}
	if spec.Type == ebpf.SockHash {
		err = dir.retire(old, pin)
	} else {
		err = old.Unpin()
	}
	old.Close()
	if err == nil {
		err = next.Pin(pin)
	}
	if err != nil {
		next.Close()
		return nil, false, fmt.Errorf("replace the pinned map %s: %w", pin, err)
	}
	return next, !sameShape, nil
}

func createMap(spec *ebpf.MapSpec, pin string) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("create map %s with %d entries: %w", spec.Name, spec.MaxEntries, err)
	}
	if err := m.Pin(pin); err != nil {
		m.Close()
		return nil, fmt.Errorf("pin map %s at %s: %w", spec.Name, pin, err)
	}
	return m, nil
}

func copyMap(to, from *ebpf.Map) error {
	if from.Type() == ebpf.SkStorage {
		return nil // lives in the sockets, has no size
	}
	key, value := make([]byte, from.KeySize()), make([]byte, from.ValueSize())
	it := from.Iterate()
	for it.Next(&key, &value) {
		if err := to.Put(key, value); err != nil {
			return err
		}
	}
	return it.Err()
}
