package header

// Method is the request method, as received.
func (b *Block) Method() []byte { return b.pseudoAt(hasMethod, b.method) }

// Path is the request target's path and query: "/" at least, "*" for OPTIONS *, empty for CONNECT.
func (b *Block) Path() []byte { return b.pseudoAt(hasPath, b.path) }

// Authority is the host and port that the request is for: HTTP/1's Host field or the target's authority.
func (b *Block) Authority() []byte { return b.pseudoAt(hasAuthority, b.authority) }

// Scheme is "http" or "https", lower case, where the client or the listener said so.
func (b *Block) Scheme() []byte { return b.pseudoAt(hasScheme, b.scheme) }

// Status is the response status, 0 in a request.
func (b *Block) Status() int { return b.status }

// MethodString shares the block's memory; valid until Reset. So do the other ...String methods.
func (b *Block) MethodString() string { return str(b.Method()) }

// PathString is Path as a string.
func (b *Block) PathString() string { return str(b.Path()) }

// AuthorityString is Authority as a string.
func (b *Block) AuthorityString() string { return str(b.Authority()) }

// SchemeString is Scheme as a string.
func (b *Block) SchemeString() string { return str(b.Scheme()) }

// HasAuthority tells an empty authority from none.
func (b *Block) HasAuthority() bool { return b.pseudo&hasAuthority != 0 }

func (b *Block) pseudoAt(p pseudoSet, s span) []byte {
	if b.pseudo&p == 0 {
		return nil
	}
	return b.at(s)
}

// SetMethod sets the request method.
func (b *Block) SetMethod(v string) { b.method = b.putTarget(v); b.pseudo |= hasMethod }

// SetPath sets the request target's path and query. White space and control characters, which would end the
// target on the wire, are percent-encoded.
func (b *Block) SetPath(v string) { b.path = b.putTarget(v); b.pseudo |= hasPath }

// SetAuthority sets the host and port that the request is for.
func (b *Block) SetAuthority(v string) { b.authority = b.putTarget(v); b.pseudo |= hasAuthority }

// SetScheme sets the scheme.
func (b *Block) SetScheme(v string) { b.scheme = b.putTarget(v); b.pseudo |= hasScheme }

// SetStatus sets the response status.
func (b *Block) SetStatus(code int) { b.status = code }

// put copies v into the arena. v may be a string that shares the arena.
func (b *Block) put(v string) span {
	off := len(b.arena)
	b.arena = append(b.arena, v...)
	return span{uint32(off), uint32(len(v))}
}

// PrefixPath puts prefix before the path.
func (b *Block) PrefixPath(prefix string) {
	off := len(b.arena)
	b.arena = append(append(b.arena, prefix...), b.Path()...)
	b.path = span{uint32(off), uint32(len(b.arena) - off)}
	b.pseudo |= hasPath
}

func (b *Block) putTarget(v string) span {
	if cleanTarget(v) {
		return b.put(v)
	}
	off := len(b.arena)
	for i := 0; i < len(v); i++ {
		if c := v[i]; c <= ' ' || c == 0x7f {
			const hex = "0123456789ABCDEF"
			b.arena = append(b.arena, '%', hex[c>>4], hex[c&15])
		} else {
			b.arena = append(b.arena, c)
		}
	}
	return span{uint32(off), uint32(len(b.arena) - off)}
}

func cleanTarget(v string) bool {
	for i := 0; i < len(v); i++ {
		if c := v[i]; c <= ' ' || c == 0x7f {
			return false
		}
	}
	return true
}
