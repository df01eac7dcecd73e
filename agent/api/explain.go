package api

// ExplainRequest is POST /explain: what would happen to a connection or a request.
type ExplainRequest struct {
	// From is the pod that connects, namespace/name; or host, a process of the node; or outside[:IP], a client outside.
	From string `json:"from"`
	// URL is tcp://host:port, http://host[:port]/path, or udp://host:port.
	URL string `json:"url"`
	// Method defaults to GET.
	Method string `json:"method,omitempty"`
	// Headers are name and value, in order.
	Headers [][2]string `json:"headers,omitempty"`
}

// Explanation is its answer.
type Explanation struct {
	From   string `json:"from"`
	Target string `json:"target"`
	// Steps are the decisions in the order in which they are made.
	Steps []Step `json:"steps"`
	// Outcome is proxied, offloaded, service, passed, refused, dropped or failed; Verdict says it in a sentence.
	Outcome string `json:"outcome"`
	Verdict string `json:"verdict"`
	// Destinations are where the connection or request may end, with their share.
	Destinations []Destination `json:"destinations,omitempty"`
}

// Step is one decision.
type Step struct {
	// Stage is what was decided: pod, address, enrolment, claim, listener, chain, host, route, cluster, service, kernel …
	Stage string `json:"stage"`
	// Result is the decision.
	Result string `json:"result"`
	// Rule is what made it: the label, field or table entry.
	Rule string `json:"rule,omitempty"`
	// Rejected are the alternatives that were looked at first, and why each did not apply.
	Rejected []string `json:"rejected,omitempty"`
}

// Destination is one endpoint that may be chosen.
type Destination struct {
	Cluster string  `json:"cluster,omitempty"`
	Address string  `json:"address"`
	Percent float64 `json:"percent"`
	Health  string  `json:"health,omitempty"`
	Pod     string  `json:"pod,omitempty"`
	Local   bool    `json:"local,omitempty"`
}
