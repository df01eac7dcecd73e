package header

import "bytes"

// StripHopByHop removes the fields that concern one connection only (RFC 9110 section 7.6.1): Connection and what
// it nominates, Keep-Alive, Proxy-Connection, TE other than trailers, Transfer-Encoding, HTTP2-Settings, and Upgrade
// unless keepUpgrade. It returns false, having changed nothing, if Connection nominates a field that must not be
// dropped that way (it would let a client strip what the proxy or the application relies on); the message is then to
// be refused, as Envoy does. Content-Length stays: it is the encoder that decides about framing.
func (b *Block) StripHopByHop(keepUpgrade bool) bool {
	if !b.HasAny(&hopByHop) {
		return true
	}
	if b.Has(Connection) {
		others, ok := b.nominations()
		if !ok {
			return false
		}
		if others {
			b.removeNominated()
		}
	}
	if b.Has(TE) {
		trailers := b.HasToken(TE, "trailers")
		b.Remove(TE)
		if trailers {
			b.Add(TE, "trailers")
		}
	}
	b.RemoveAll(&hopFields)
	if !keepUpgrade {
		b.Remove(Upgrade)
	}
	return true
}

var (
	hopFields = SetOf(Connection, KeepAlive, ProxyConnection, TransferEncoding, HTTP2Settings)
	hopByHop  = SetOf(Connection, KeepAlive, ProxyConnection, TransferEncoding, HTTP2Settings, TE, Upgrade)
)

// maxConnectionFields is how often Connection may be there: nobody honest repeats it more.
const maxConnectionFields = 4

// nominations looks at what Connection nominates: others says that it is more than the usual options, ok is false if it
// is something that decides about routing, framing, identity or limits of a request.
func (b *Block) nominations() (others, ok bool) {
	n := 0
	for i := range b.fields {
		if b.fields[i].id != Connection {
			continue
		}
		if n++; n > maxConnectionFields {
			return false, false
		}
		list := b.at(b.fields[i].value)
		if s := str(list); s == "keep-alive" || s == "close" { // nearly always
			continue
		}
		for len(list) > 0 {
			var item []byte
			item, list = nextItem(list)
			switch {
			case EqualFold(item, "keep-alive"), EqualFold(item, "close"), EqualFold(item, "upgrade"):
			case len(item) > 0 && item[0] == ':' || !mayNominate(item):
				return false, false
			default:
				others = true
			}
		}
	}
	return others, true
}

func mayNominate(item []byte) bool {
	for _, prefix := range [...]string{"x-forwarded-", "x-envoy-"} {
		if len(item) >= len(prefix) && EqualFold(item[:len(prefix)], prefix) {
			return false
		}
	}
	for _, name := range [...]string{"host", "content-length", "authorization", "cookie", "x-request-id", "forwarded", "via"} {
		if EqualFold(item, name) {
			return false
		}
	}
	return true
}

// removeNominated removes the fields that a Connection field names, whatever they are.
func (b *Block) removeNominated() {
	kept := b.fields[:0]
	// The Connection fields are read while the table is compacted: compaction only moves entries down, to
	// places already read, so remember the spans first.
	var lists [maxConnectionFields]span
	n := 0
	for i := range b.fields {
		if b.fields[i].id == Connection {
			lists[n] = b.fields[i].value
			n++
		}
	}
	for _, f := range b.fields {
		if f.id != Connection && f.id != TE && f.id != Upgrade && b.nominated(lists[:n], f.name) {
			continue
		}
		kept = append(kept, f)
	}
	b.fields = kept
	b.remark()
}

func (b *Block) nominated(lists []span, name span) bool {
	for _, l := range lists {
		if HasToken(b.at(l), str(b.at(name))) {
			return true
		}
	}
	return false
}

// remark recomputes which well-known fields are there.
func (b *Block) remark() {
	b.present = [len(b.present)]uint64{}
	for i := range b.fields {
		b.mark(b.fields[i].id)
	}
	b.unmark(None)
}

func nextItem(list []byte) (item, rest []byte) {
	if i := bytes.IndexByte(list, ','); i >= 0 {
		return TrimOWS(list[:i]), list[i+1:]
	}
	return TrimOWS(list), nil
}
