package traps

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sockmesh/sockmesh/pkg/datapath/selftest"
)

// Trap 11.
func TestEndComesAfterTheData(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send(string(noise(200_000)))
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		return all(e.receiver) + all(e.receiver)
	})
}

func TestCloseWithBytesInFlight(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send(string(noise(100_000)))
		e.closeSender()
		return all(e.receiver)
	})
}

func (e *ends) closeSender() {
	if e.sender == e.pair.Proxy {
		e.pair.Proxy = -1
	} else {
		e.pair.App = -1
	}
	e.must(unix.Close(e.sender))
}

func (e *ends) closeReceiver() {
	e.sender, e.receiver = e.receiver, e.sender
	e.closeSender()
	e.sender, e.receiver = e.receiver, e.sender
}

func TestHalfCloseLeavesTheOtherDirection(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send("question")
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		out := all(e.receiver)
		_, err := unix.Write(e.sender, []byte("too late"))
		out += errno(err)
		e.must(selftest.Write(e.receiver, noise(50_000)))
		e.closeReceiver()
		return out + all(e.sender)
	})
}

func TestResetByLinger(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send("never read")
		e.must(unix.SetsockoptLinger(e.sender, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		e.must(unix.Shutdown(e.receiver, unix.SHUT_WR)) // nothing that the reset could overtake
		e.closeSender()
		e.must(selftest.Wait(e.receiver, unix.POLLHUP))
		_, err := unix.Write(e.receiver, []byte("x"))
		return errno(err)
	})
}

// A peer that is gone: the second write fails, and so it goes on.
func TestWritesToAPeerThatDied(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send("x")
		_, err := selftest.Read(e.receiver, 1)
		e.must(err)
		e.closeReceiver()
		e.must(selftest.Wait(e.sender, unix.POLLRDHUP))
		_, err1 := unix.Write(e.sender, []byte("y"))
		e.must(selftest.Wait(e.sender, unix.POLLHUP))
		_, err2 := unix.Write(e.sender, []byte("z"))
		_, err3 := unix.Read(e.sender, make([]byte, 1))
		return errno(err1) + errno(err2) + errno(err3)
	})
}

// TCP answers a close with unread data by a reset. Redirected bytes are not TCP's, so the close is an ordinary one: the
// sender learns with its next write that nobody reads. Pinned: no bytes that somebody reads are lost by it.
func TestCloseWithUnreadData(t *testing.T) {
	pin(t, "ECONNRESET", "<nil>", func(e *ends) string {
		e.send("unread")
		e.arrive()
		e.closeReceiver()
		e.must(selftest.Wait(e.sender, unix.POLLRDHUP))
		_, err := unix.Read(e.sender, make([]byte, 1))
		return errno(err)
	})
}

// A namespace whose pod is deleted while its sockets live: they go on to their end, as on plain TCP.
func TestNamespaceGoesUnderLiveSockets(t *testing.T) {
	compare(t, func(e *ends) string {
		e.send("before")
		e.must(stage.Close())
		e.send(", after")
		e.must(unix.Shutdown(e.sender, unix.SHUT_WR))
		out := all(e.receiver)
		_, err := unix.Write(e.receiver, []byte("and back"))
		out += errno(err)
		e.closeReceiver()
		out += all(e.sender)
		stage, err = selftest.NewStage(dp)
		e.must(err)
		return out
	})
}
