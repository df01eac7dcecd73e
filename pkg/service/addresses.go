package service

import (
	"cmp"
	"iter"
	"net/netip"
)

// key is what no two frontends share.
type key struct {
	addr     netip.AddrPort
	protocol Protocol
}

// front is an address that an object wants on a node, for one of its ports.
type front struct {
	key
	kind Kind
	port int // index in Object.Ports
}

// addresses are the addresses that an object wants on a node, each once: kinds come in the order of their rank, so of
// two kinds at one address the better stands.
func (o *Object) addresses(node *Node) iter.Seq[front] {
	return func(yield func(front) bool) {
		if !o.ours() {
			return
		}
		var seen map[key]bool // Cluster IPs alone can't collide.
		if len(o.LoadBalancerIPs)+len(o.ExternalIPs) > 0 || o.hasNodePort() {
			seen = map[key]bool{}
		}
		for f := range o.wishes(node) {
			if seen[f.key] {
				continue
			}
			if seen != nil {
				seen[f.key] = true
			}
			if !yield(f) {
				return
			}
		}
	}
}

func (o *Object) wishes(node *Node) iter.Seq[front] {
	has := func(v4 bool) bool {
		for _, ip := range o.ClusterIPs {
			if ip.Is4() == v4 {
				return true
			}
		}
		return false
	}
	return func(yield func(front) bool) {
		all := func(kind Kind, ips []netip.Addr) bool {
			for _, ip := range ips {
				if !has(ip.Is4()) || kind == ExternalIP && node.refuses(ip) != "" {
					continue
				}
				for i, p := range o.Ports {
					number := p.Port
					if kind == NodePort {
						number = p.NodePort
					}
					if number != 0 && !yield(front{key{netip.AddrPortFrom(ip, number), p.Protocol}, kind, i}) {
						return false
					}
				}
			}
			return true
		}
		_ = all(ClusterIP, o.ClusterIPs) && (!o.hasNodePort() || all(NodePort, node.NodePorts)) &&
			all(LoadBalancer, o.LoadBalancerIPs) && all(ExternalIP, o.ExternalIPs)
	}
}

// owners knows who wants which address, so that no two Services serve one: the better kind has it, then the older
// Service, then the first by name. Where nobody else wants an address its record is one entry of a map.
type owners struct {
	first  map[key]want
	others map[key][]want
}

type want struct {
	entry *entry
	kind  Kind
}

// before tells whether a want goes before another.
func (w want) before(b want) bool {
	x, y := w.entry.object, b.entry.object
	return cmp.Or(cmp.Compare(w.kind, b.kind), x.Created.Compare(y.Created),
		cmp.Compare(x.Name.Namespace, y.Name.Namespace), cmp.Compare(x.Name.Name, y.Name.Name)) < 0
}

// add notes what an entry's object wants, and names those whose address has another owner by it.
func (o *owners) add(e *entry, node *Node, changed func(*entry)) {
	if e.object == nil {
		return
	}
	for f := range e.object.addresses(node) {
		w := want{e, f.kind}
		has, contested := o.first[f.key]
		switch {
		case !contested:
			o.first[f.key] = w
		case w.before(has):
			o.first[f.key], o.others[f.key] = w, append(o.others[f.key], has)
			for _, other := range o.others[f.key] {
				changed(other.entry)
			}
		default:
			o.others[f.key] = append(o.others[f.key], w)
		}
	}
}

// remove forgets what an entry's object wanted, and names those whose address has another owner by it.
func (o *owners) remove(e *entry, node *Node, changed func(*entry)) {
	if e.object == nil {
		return
	}
	for f := range e.object.addresses(node) {
		others := o.others[f.key]
		if o.first[f.key].entry == e {
			if len(others) == 0 {
				delete(o.first, f.key)
				continue
			}
			best := 0
			for i := range others {
				if others[i].before(others[best]) {
					best = i
				}
				changed(others[i].entry)
			}
			o.first[f.key] = others[best]
			others[best] = others[len(others)-1]
			others = others[:len(others)-1]
		} else {
			for i := range others {
				if others[i].entry == e {
					others[i] = others[len(others)-1]
					others = others[:len(others)-1]
					break
				}
			}
		}
		if len(others) == 0 {
			delete(o.others, f.key)
		} else {
			o.others[f.key] = others
		}
	}
}

// owner names the Service that has an address where that is not e's.
func (o *owners) owner(e *entry) func(key) (Name, bool) {
	return func(k key) (Name, bool) {
		if has := o.first[k].entry; has != nil && has != e {
			return has.name, true
		}
		return Name{}, false
	}
}
