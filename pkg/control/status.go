package control

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/sockmesh/sockmesh/pkg/xds"
)

// Status is what GET /status answers.
type Status struct {
	Dir       string         `json:"dir"`
	Version   string         `json:"version"`
	Loaded    time.Time      `json:"loaded"` // when the folder was last read
	Resources map[string]int `json:"resources"`
	// Errors are why the folder as it is now is not what is served.
	Errors  []FileProblem  `json:"errors"`
	Streams []StreamStatus `json:"streams"`
}

// FileProblem is one error of the folder.
type FileProblem struct {
	File  string `json:"file,omitempty"`
	Where string `json:"where,omitempty"`
	Error string `json:"error"`
}

// StreamStatus is one open stream of a data plane.
type StreamStatus struct {
	ID    int64  `json:"id"`
	Node  string `json:"node"`
	Type  string `json:"type"` // "ads", or the type URL
	Delta bool   `json:"delta"`
	// Accepted are the versions that were last acknowledged, by type (state of the world only).
	Accepted map[string]string `json:"accepted,omitempty"`
	// Refused are the reasons of the last refusals, by type; a later acknowledgement removes them.
	Refused map[string]string `json:"refused,omitempty"`
}

// streamID tells streams apart: the library numbers both variants from 1.
type streamID struct {
	id    int64
	delta bool
}

type streamStatus struct{ StreamStatus }

// Status says what is served to whom.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Dir: s.cfg.Dir, Loaded: s.loaded, Resources: map[string]int{}, Errors: []FileProblem{}, Streams: []StreamStatus{}}
	if s.set != nil {
		st.Version = s.set.Version
		for typeURL, n := range s.set.Counts {
			st.Resources[strings.TrimPrefix(typeURL, "type.googleapis.com/")] = n
		}
	}
	for _, err := range s.errs {
		p := FileProblem{Error: err.Error()}
		var fe *xds.FileError
		if errors.As(err, &fe) {
			p = FileProblem{fe.File, fe.Where, fe.Err.Error()}
		}
		st.Errors = append(st.Errors, p)
	}
	for _, stream := range s.streams {
		row := stream.StreamStatus
		row.Accepted, row.Refused = clone(row.Accepted), clone(row.Refused)
		st.Streams = append(st.Streams, row)
	}
	slices.SortFunc(st.Streams, func(a, b StreamStatus) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), strings.Compare(a.Type, b.Type))
	})
	return st
}

func clone(m map[string]string) map[string]string {
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// callbacks keep the list of streams and log refusals.
func (s *Server) callbacks() server.Callbacks {
	return server.CallbackFuncs{
		StreamOpenFunc: func(_ context.Context, id int64, typeURL string) error {
			s.opened(streamID{id, false}, typeURL)
			return nil
		},
		DeltaStreamOpenFunc: func(_ context.Context, id int64, typeURL string) error {
			s.opened(streamID{id, true}, typeURL)
			return nil
		},
		StreamClosedFunc:      func(id int64, _ *corev3.Node) { s.closed(streamID{id, false}) },
		DeltaStreamClosedFunc: func(id int64, _ *corev3.Node) { s.closed(streamID{id, true}) },
		StreamRequestFunc: func(id int64, r *discoveryv3.DiscoveryRequest) error {
			s.requested(streamID{id, false}, r.GetNode(), r.GetTypeUrl(), r.GetVersionInfo(), r.GetResponseNonce(), r.GetErrorDetail())
			return nil
		},
		StreamDeltaRequestFunc: func(id int64, r *discoveryv3.DeltaDiscoveryRequest) error {
			s.requested(streamID{id, true}, r.GetNode(), r.GetTypeUrl(), "", r.GetResponseNonce(), r.GetErrorDetail())
			return nil
		},
	}
}

func (s *Server) opened(id streamID, typeURL string) {
	if typeURL == "" {
		typeURL = "ads"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams[id] = &streamStatus{StreamStatus{ID: id.id, Type: typeURL, Delta: id.delta, Accepted: map[string]string{}, Refused: map[string]string{}}}
}

func (s *Server) closed(id streamID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, id)
}

func (s *Server) requested(id streamID, node *corev3.Node, typeURL, version, nonce string, refusal *rpcstatus.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stream := s.streams[id]
	if stream == nil {
		return
	}
	if node.GetId() != "" {
		stream.Node = node.GetId()
	}
	switch {
	case refusal != nil:
		stream.Refused[typeURL] = refusal.GetMessage()
		s.log.Warn("a data plane refused resources", "node", stream.Node, "type", typeURL, "error", refusal.GetMessage())
	case nonce != "":
		delete(stream.Refused, typeURL)
		if version != "" {
			stream.Accepted[typeURL] = version
		}
	}
}
