package telemetry

import "math/bits"

// Flags are Envoy's response flags: what went wrong with a request or connection, in the proxy's own words.
type Flags uint64

// Response flags, in Envoy's order, which is also the order that several are printed in.
const (
	LH    Flags = 1 << iota // FailedLocalHealthCheck
	UH                      // NoHealthyUpstream
	UT                      // UpstreamRequestTimeout
	LR                      // LocalReset
	UR                      // UpstreamRemoteReset
	UF                      // UpstreamConnectionFailure
	UC                      // UpstreamConnectionTermination
	UO                      // UpstreamOverflow
	NR                      // NoRouteFound
	DI                      // DelayInjected
	FI                      // FaultInjected
	RL                      // RateLimited
	UAEX                    // UnauthorizedExternalService
	RLSE                    // RateLimitServiceError
	DC                      // DownstreamConnectionTermination
	URX                     // UpstreamRetryLimitExceeded
	SI                      // StreamIdleTimeout
	IH                      // InvalidEnvoyRequestHeaders
	DPE                     // DownstreamProtocolError
	UMSDR                   // UpstreamMaxStreamDurationReached
	RFCF                    // ResponseFromCacheFilter
	NFCF                    // NoFilterConfigFound
	DT                      // DurationTimeout
	UPE                     // UpstreamProtocolError
	NC                      // NoClusterFound
	OM                      // OverloadManagerTerminated
	DF                      // DnsResolutionFailed
	DO                      // DropOverload
	DR                      // DownstreamRemoteReset
	UDO                     // UnconditionalDropOverload
	endOfFlags
)

var flagNames = [...]struct{ short, long string }{
	{"LH", "FailedLocalHealthCheck"},
	{"UH", "NoHealthyUpstream"},
	{"UT", "UpstreamRequestTimeout"},
	{"LR", "LocalReset"},
	{"UR", "UpstreamRemoteReset"},
	{"UF", "UpstreamConnectionFailure"},
	{"UC", "UpstreamConnectionTermination"},
	{"UO", "UpstreamOverflow"},
	{"NR", "NoRouteFound"},
	{"DI", "DelayInjected"},
	{"FI", "FaultInjected"},
	{"RL", "RateLimited"},
	{"UAEX", "UnauthorizedExternalService"},
	{"RLSE", "RateLimitServiceError"},
	{"DC", "DownstreamConnectionTermination"},
	{"URX", "UpstreamRetryLimitExceeded"},
	{"SI", "StreamIdleTimeout"},
	{"IH", "InvalidEnvoyRequestHeaders"},
	{"DPE", "DownstreamProtocolError"},
	{"UMSDR", "UpstreamMaxStreamDurationReached"},
	{"RFCF", "ResponseFromCacheFilter"},
	{"NFCF", "NoFilterConfigFound"},
	{"DT", "DurationTimeout"},
	{"UPE", "UpstreamProtocolError"},
	{"NC", "NoClusterFound"},
	{"OM", "OverloadManagerTerminated"},
	{"DF", "DnsResolutionFailed"},
	{"DO", "DropOverload"},
	{"DR", "DownstreamRemoteReset"},
	{"UDO", "UnconditionalDropOverload"},
}

// String gives the short names joined by commas, "-" if there are none.
func (f Flags) String() string { return string(f.Append(nil, false)) }

// Append appends the short or long names joined by commas, "-" if there are none.
func (f Flags) Append(dst []byte, long bool) []byte {
	f &= endOfFlags - 1
	if f == 0 {
		return append(dst, '-')
	}
	for first := true; f != 0; f &= f - 1 {
		if !first {
			dst = append(dst, ',')
		}
		first = false
		n := &flagNames[bits.TrailingZeros64(uint64(f))]
		if long {
			dst = append(dst, n.long...)
		} else {
			dst = append(dst, n.short...)
		}
	}
	return dst
}

// ParseFlag returns the flag of a short name.
func ParseFlag(short string) (Flags, bool) {
	for i := range flagNames {
		if flagNames[i].short == short {
			return 1 << i, true
		}
	}
	return 0, false
}
