// Package loop is the reactor under the proxy: one Loop per core, each on an operating-system thread of its
// own, owning its connections, timers and buffers. Nothing in a loop is shared, so nothing is locked; Post is
// the only door from other goroutines.
//
// A connection's bytes are lent, not given: data is received into one scratch buffer per loop and offered to
// the connection's Handler at once; only what the handler leaves is copied into a pooled buffer that the
// connection keeps. An idle connection therefore holds no buffer. Output is corked: small writes of one wake-up
// are gathered and sent by one system call when the batch of events has been worked off, large ones go out at
// once, by writev, without being copied.
//
// The kernel is behind one narrow seam, type backend. It is shaped after completions (received, sendable,
// connected), because that fits epoll, which works everywhere, as well as io_uring, which is faster where the kernel has
// it: a wake-up's receives and sends cost the one system call that waits for the next.
//
// Level-triggered epoll is deliberate. A socket in a sockmap may return a short read although more is queued
// (redirected bytes and bytes that came by TCP are two queues), so "short read means empty", on which
// edge-triggered loops save their second read, does not hold. With level triggering one read per wake-up is
// right for every socket. Interest is changed lazily: a connection whose reading is paused keeps EPOLLIN until
// an event really arrives, so that pausing and resuming around a request costs no system call.
//
// The rooms: loop.go is the turn of the wheel and its work lists; epoll.go and uring.go (on ring.go) the backends; listen.go and dial.go how
// connections begin; conn.go what their owners may do with them; connio.go how bytes come and go; buffer.go and
// timer.go what is lent; netns.go where sockets are made; sys.go the system calls.
//
// No splice(2), sendfile(2) or io.Copy anywhere: they never see bytes that were redirected by sk_msg.
package loop
