package xds

import (
	"fmt"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
)

// deltaProtocol is the incremental variant: requests say what is subscribed to in addition or no longer,
// responses what changed. After a reconnect the first request of each kind tells the server the versions that
// are here already.
type deltaProtocol struct {
	stream   *stream
	raw      grpc.ClientStream
	sentNode bool
}

func (p *deltaProtocol) attach(raw grpc.ClientStream) { p.raw = raw }

func (p *deltaProtocol) method() string {
	if p.stream.source.ads {
		return "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
	}
	return kindTable[p.stream.kind].method[1]
}

func (p *deltaProtocol) sync(kind Kind, sub *subscription, names []string) error {
	request := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: kind.TypeURL()}
	if !sub.wildcard {
		for _, name := range names {
			if !sub.sent[name] {
				request.ResourceNamesSubscribe = append(request.ResourceNamesSubscribe, name)
			}
		}
		now := toSet(names)
		for name := range sub.sent {
			if !now[name] {
				request.ResourceNamesUnsubscribe = append(request.ResourceNamesUnsubscribe, name)
			}
		}
		sub.sent = now
	}
	if !sub.requested {
		request.InitialResourceVersions = p.stream.versions(kind)
	} else if len(request.ResourceNamesSubscribe) == 0 && len(request.ResourceNamesUnsubscribe) == 0 {
		return nil
	}
	sub.requested = true
	return p.send(request)
}

func (p *deltaProtocol) send(request *discoveryv3.DeltaDiscoveryRequest) error {
	if !p.sentNode {
		request.Node = p.stream.client.node
		p.sentNode = true
	}
	return p.raw.SendMsg(request)
}

// versions are those of the resources that came from this stream's server.
func (s *stream) versions(kind Kind) map[string]string {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	versions := map[string]string{}
	for name, r := range s.client.resources[kind] {
		if r.any != nil && r.source == s.key && s.asked(kind, name) && r.rejected == "" {
			versions[name] = r.version
		}
	}
	return versions
}

func (p *deltaProtocol) receive() (any, error) {
	response := &discoveryv3.DeltaDiscoveryResponse{}
	return response, p.raw.RecvMsg(response)
}

func (p *deltaProtocol) handle(message any) error {
	response := message.(*discoveryv3.DeltaDiscoveryResponse)
	s := p.stream
	kind, known := kindOf(response.GetTypeUrl())
	if !known || s.existing(kind) == nil {
		return fmt.Errorf("the server sent %q, which was not asked for", response.GetTypeUrl())
	}
	list := make([]incoming, 0, len(response.GetResources()))
	for _, r := range response.GetResources() {
		list = append(list, incoming{name: r.GetName(), version: r.GetVersion(), any: r.GetResource()})
	}
	err := s.client.apply(s, kind, list, false)
	s.client.applyRemoved(s, kind, response.GetRemovedResources())
	s.logAnswer(kind, response.GetSystemVersionInfo(), len(list), len(response.GetRemovedResources()), err)
	return p.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: kind.TypeURL(), ResponseNonce: response.GetNonce(), ErrorDetail: errorDetail(err)})
}
