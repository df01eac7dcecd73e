package kubeproxy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// meaning is what all Services mean, in one form for both sides: from "namespace/name address:port/protocol" to how it
// is served.
type meaning map[string]string

// served is how one address is served.
type served struct {
	kind     string
	port     string
	affinity time.Duration
	// inside and outside are the endpoints for clients of the two sorts, outside is not said of cluster IPs.
	inside, outside []string
	// local, silent and sources are as in service.External.
	local, silent bool
	sources       []string
}

func (s served) String() string {
	var b strings.Builder
	b.WriteString(s.kind)
	b.WriteString(" port=")
	b.WriteString(s.port)
	if s.affinity > 0 {
		b.WriteString(" affinity=")
		b.WriteString(s.affinity.String())
	}
	b.WriteString(" inside=")
	writeSorted(&b, s.inside)
	if s.kind == "ClusterIP" {
		return b.String()
	}
	b.WriteString(" outside=")
	writeSorted(&b, s.outside)
	if s.local {
		b.WriteString(" local")
	}
	if s.silent {
		b.WriteString(" silent")
	}
	if len(s.sources) > 0 {
		b.WriteString(" sources=")
		writeSorted(&b, s.sources)
	}
	return b.String()
}

func writeSorted(b *strings.Builder, list []string) {
	slices.Sort(list)
	b.WriteByte('[')
	for i, s := range list {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(s)
	}
	b.WriteByte(']')
}

// differ lists where two meanings are not the same; "" if nowhere.
func differ(ours, theirs meaning) string {
	if maps.Equal(ours, theirs) {
		return ""
	}
	var lines []string
	for k, v := range ours {
		if theirs[k] != v {
			lines = append(lines, fmt.Sprintf("%s\n    sockmesh:   %s\n    kube-proxy: %s", k, v, or(theirs[k])))
		}
	}
	for k, v := range theirs {
		if _, both := ours[k]; !both {
			lines = append(lines, fmt.Sprintf("%s\n    sockmesh:   nothing\n    kube-proxy: %s", k, v))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func or(s string) string {
	if s == "" {
		return "nothing"
	}
	return s
}
