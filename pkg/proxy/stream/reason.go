package stream

// Reason is why a stream ended before its time, or never began. The names are Envoy's: they stand in local
// replies and in response code details, where users search for them.
type Reason uint8

// Reasons.
const (
	// LocalReset: this proxy gave up.
	LocalReset Reason = iota
	// LocalConnectionFailure: a connection could not even be tried (no descriptors, address in use).
	LocalConnectionFailure
	// RemoteConnectionFailure: the peer refused, or is unreachable.
	RemoteConnectionFailure
	// ConnectionTimeout: no answer to the connect in time.
	ConnectionTimeout
	// ConnectionTermination: the connection ended in the middle of the exchange.
	ConnectionTermination
	// RemoteReset: the peer abandoned this stream but keeps its connection (HTTP/2).
	RemoteReset
	// RemoteRefused: the peer abandoned this stream and says that it has not begun with it (HTTP/2).
	RemoteRefused
	// Overflow: a circuit breaker is open.
	Overflow
	// ProtocolError: the peer does not speak HTTP.
	ProtocolError
)

var reasons = [...]string{
	LocalReset:              "local reset",
	LocalConnectionFailure:  "local connection failure",
	RemoteConnectionFailure: "remote connection failure",
	ConnectionTimeout:       "connection timeout",
	ConnectionTermination:   "connection termination",
	RemoteReset:             "remote reset",
	RemoteRefused:           "remote refused stream reset",
	Overflow:                "overflow",
	ProtocolError:           "protocol error",
}

// String is the reason in Envoy's words.
func (r Reason) String() string {
	if int(r) < len(reasons) {
		return reasons[r]
	}
	return "unknown"
}

// ConnectFailed says that no connection came about, so that nothing of the request was sent.
func (r Reason) ConnectFailed() bool {
	return r == LocalConnectionFailure || r == RemoteConnectionFailure || r == ConnectionTimeout
}
