package telemetry

import (
	"bytes"
	"strings"

	"github.com/sockmesh/sockmesh/pkg/proxy/header"
)

// seriesKey is what a loop tells its series apart by: as much as a request has at hand without making strings.
// Names are configuration's or Kubernetes's, never a client's.
type seriesKey struct {
	source, destination *Workload
	cluster             string
	protocol            requestProtocol
	secure              bool
	status              uint16
	flags               Flags
}

// totalKey is what the labels are made of. Several pods of one workload are one.
type totalKey struct {
	source, sourceNamespace           string
	destination, destinationNamespace string
	cluster                           string
	protocol                          requestProtocol
	secure                            bool
	status                            uint16
	flags                             Flags
}

func (k seriesKey) total() totalKey {
	t := totalKey{cluster: k.cluster, protocol: k.protocol, secure: k.secure, status: k.status, flags: k.flags}
	t.source, t.sourceNamespace = workloadOf(k.source)
	t.destination, t.destinationNamespace = workloadOf(k.destination)
	return t
}

type requestProtocol uint8

const (
	protoTCP requestProtocol = iota
	protoHTTP
	protoGRPC
	protoOther // the series for everything beyond the limit
)

func (p requestProtocol) String() string { return [...]string{"tcp", "http", "grpc", "other"}[p] }

func keyOf(r *Record) seriesKey {
	k := seriesKey{
		source: r.Source, destination: r.Destination, cluster: r.UpstreamCluster, secure: r.DownstreamPeerName != "",
		status: uint16(r.Status), flags: r.Flags,
	}
	if r.Protocol == ProtocolNone {
		// A connection's series must not change while it lives, or opened and closed would not meet.
		k.flags, k.destination = 0, nil
		return k
	}
	k.protocol = protoHTTP
	if r.Request != nil {
		if v, ok := r.Request.Get(header.ContentType); ok && bytes.HasPrefix(v, grpcType) {
			k.protocol = protoGRPC
		}
	}
	return k
}

var grpcType = []byte("application/grpc")

// other is the series that takes what there is no room for.
func (k seriesKey) other() seriesKey { return seriesKey{protocol: protoOther, cluster: "other"} }

// labelNames are Istio's, those that can be known here.
var labelNames = []string{
	"reporter", "source_workload", "source_workload_namespace", "destination_workload", "destination_workload_namespace",
	"destination_service", "destination_service_name", "destination_service_namespace", "request_protocol",
	"connection_security_policy", "response_flags",
}

var requestLabelNames = append(append([]string(nil), labelNames...), "response_code")

const unknown = "unknown"

func (k *totalKey) labels() []string {
	service, name, namespace := destinationOf(k.cluster)
	policy := unknown // what Istio says where the reporter is the source
	if k.secure {
		policy = "mutual_tls"
	}
	return []string{
		"source", k.source, k.sourceNamespace, k.destination, k.destinationNamespace, service, name, namespace,
		k.protocol.String(), policy, k.flags.String(),
	}
}

func workloadOf(w *Workload) (name, namespace string) {
	if w == nil {
		return unknown, unknown
	}
	name, namespace = w.Name, w.Namespace
	if name == "" {
		name = w.Pod
	}
	if name == "" {
		name = unknown
	}
	if namespace == "" {
		namespace = unknown
	}
	return name, namespace
}

// destinationOf reads the service out of a cluster's name where the control plane puts it there, as Istio does
// ("outbound|80|v1|reviews.default.svc.cluster.local"); another name stands for itself.
func destinationOf(cluster string) (service, name, namespace string) {
	if cluster == "" {
		return unknown, unknown, unknown
	}
	host := cluster
	if parts := strings.Split(cluster, "|"); len(parts) == 4 {
		host = parts[3]
	}
	first, rest, dotted := strings.Cut(host, ".")
	ns, domain, _ := strings.Cut(rest, ".")
	if dotted && (domain == "svc" || strings.HasPrefix(domain, "svc.")) {
		service, _, _ = strings.Cut(host, ":")
		return service, first, ns
	}
	return host, host, unknown
}

// bounds are the buckets of Envoy's histograms, which Istio's dashboards expect: milliseconds or bytes.
var bounds = [...]float64{
	0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000,
}

type histogram struct {
	buckets [len(bounds) + 1]uint64 // not cumulative
	sum     float64
}

func (h *histogram) observe(v float64) {
	i := 0
	for i < len(bounds) && v > bounds[i] {
		i++
	}
	h.buckets[i]++
	h.sum += v
}

func (h *histogram) add(o *histogram) {
	for i := range h.buckets {
		h.buckets[i] += o.buckets[i]
	}
	h.sum += o.sum
}

func (h *histogram) cumulative() (count uint64, buckets map[float64]uint64) {
	buckets = make(map[float64]uint64, len(bounds))
	for i, b := range bounds {
		count += h.buckets[i]
		buckets[b] = count
	}
	return count + h.buckets[len(bounds)], buckets
}

// counts is what is counted of one series.
type counts struct {
	requests                              uint64
	duration, requestBytes, responseBytes histogram
	opened, closed, sent, received        uint64
}

func (c *counts) add(o *counts) {
	c.requests += o.requests
	c.duration.add(&o.duration)
	c.requestBytes.add(&o.requestBytes)
	c.responseBytes.add(&o.responseBytes)
	c.opened += o.opened
	c.closed += o.closed
	c.sent += o.sent
	c.received += o.received
}
