package service

import "slices"

// Store joins Services with their slices as they come and go, in any order, and knows which Services have to be
// worked out again. The cost of a change is that of the one Service it belongs to, and of those that want the same
// addresses. It has no lock: its owner has.
type Store struct {
	node     Node
	services map[Name]*entry
	// owner is the Service that a slice belongs to, because its label may change.
	owner     map[Name]Name
	addresses owners
	dirty     []*entry
	served    int
	endpoints int
}

// entry is a Service, or slices that wait for theirs.
type entry struct {
	name      Name
	object    *Object
	slices    map[Name]*Slice
	dirty     bool
	announced bool
}

// NewStore gives an empty store for a node.
func NewStore(node Node) *Store {
	return &Store{node: node, services: map[Name]*entry{}, owner: map[Name]Name{}, addresses: owners{map[key]want{}, map[key][]want{}}}
}

// SetNode changes what is known of the node. Only Services whose meaning depends on it are worked out again.
func (s *Store) SetNode(n Node) {
	was := s.node
	s.node = n
	renamed, moved := n.Name != was.Name || n.Outside != was.Outside, n.Zone != was.Zone
	readdressed := !slices.Equal(n.NodePorts, was.NodePorts)
	owning := n.ExternalIPs != was.ExternalIPs || n.ExternalIPs == ExternalIPsOwn && !slices.Equal(n.Addresses, was.Addresses)
	var other []*entry
	for _, e := range s.services {
		if e.object != nil && (readdressed && (e.object.hasNodePort() || e.object.HealthCheckNodePort != 0) || owning && len(e.object.ExternalIPs) > 0) {
			other = append(other, e)
		} else if renamed || moved && e.hinted() {
			s.mark(e)
		}
	}
	for _, e := range other {
		s.addresses.remove(e, &was, s.mark)
	}
	for _, e := range other {
		s.addresses.add(e, &n, s.mark)
		s.mark(e)
	}
}

// SetService adds a Service or replaces it.
func (s *Store) SetService(o *Object) {
	e := s.entry(o.Name)
	if e.object != nil && e.object.Equal(o) {
		return
	}
	s.replace(e, o)
}

// DeleteService removes a Service; its slices stay until they are deleted themselves.
func (s *Store) DeleteService(name Name) {
	e := s.services[name]
	if e == nil || e.object == nil {
		return
	}
	s.replace(e, nil)
}

// replace gives an entry another object. Whoever loses an address by it is worked out before it, and whoever wins one
// after it, unless they wait already: two Services are told to serve one address for the moment between two calls of
// Next at most.
func (s *Store) replace(e *entry, o *Object) {
	var after []*entry
	s.addresses.remove(e, &s.node, func(other *entry) { after = append(after, other) })
	e.object = o
	s.addresses.add(e, &s.node, s.mark)
	s.mark(e)
	for _, other := range after {
		s.mark(other)
	}
}

// SetSlice adds a slice or replaces it.
func (s *Store) SetSlice(slice *Slice) {
	service := Name{slice.Name.Namespace, slice.Service}
	if owner, known := s.owner[slice.Name]; known && owner != service {
		s.DeleteSlice(slice.Name)
	}
	e := s.entry(service)
	if old := e.slices[slice.Name]; old != nil {
		if old.Equal(slice) {
			return
		}
		s.endpoints -= len(old.Endpoints)
	}
	if e.slices == nil {
		e.slices = make(map[Name]*Slice, 1)
	}
	e.slices[slice.Name] = slice
	s.owner[slice.Name] = service
	s.endpoints += len(slice.Endpoints)
	s.mark(e)
}

// DeleteSlice removes a slice.
func (s *Store) DeleteSlice(name Name) {
	service, known := s.owner[name]
	if !known {
		return
	}
	delete(s.owner, name)
	e := s.services[service]
	s.endpoints -= len(e.slices[name].Endpoints)
	delete(e.slices, name)
	s.mark(e)
}

// Next works out one Service that has changed: svc is nil if it is (no longer) one of ours. Services that never meant
// anything are not mentioned. ok is false when nothing is left to do.
func (s *Store) Next() (name Name, svc *Service, ok bool) {
	for len(s.dirty) > 0 {
		e := s.dirty[0]
		s.dirty[0] = nil
		s.dirty = s.dirty[1:]
		e.dirty = false
		if e.object == nil && len(e.slices) == 0 {
			delete(s.services, e.name)
		}
		svc := build(e.object, e.list(), &s.node, s.addresses.owner(e))
		announced := e.announced
		e.announced = svc != nil
		s.served += count(e.announced) - count(announced)
		if svc != nil || announced {
			return e.name, svc, true
		}
	}
	s.dirty = nil
	return Name{}, nil, false
}

// Pending is how many Services wait for Next.
func (s *Store) Pending() int { return len(s.dirty) }

// Counts are the numbers of Services that mean something here and of endpoints in all slices.
func (s *Store) Counts() (services, endpoints int) { return s.served, s.endpoints }

func count(yes bool) int {
	if yes {
		return 1
	}
	return 0
}

func (s *Store) entry(name Name) *entry {
	e := s.services[name]
	if e == nil {
		e = &entry{name: name}
		s.services[name] = e
	}
	return e
}

func (s *Store) mark(e *entry) {
	if !e.dirty {
		e.dirty = true
		s.dirty = append(s.dirty, e)
	}
}

func (e *entry) list() []*Slice {
	list := make([]*Slice, 0, len(e.slices))
	for _, slice := range e.slices {
		list = append(list, slice)
	}
	return list
}

// hinted tells whether any endpoint has hints.
func (e *entry) hinted() bool {
	for _, slice := range e.slices {
		if slices.ContainsFunc(slice.Endpoints, func(e Endpoint) bool { return e.Hints != Hints{} }) {
			return true
		}
	}
	return false
}
