package xds

import (
	"fmt"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
)

// worldProtocol is the state-of-the-world variant: a response to a wildcard subscription holds everything, and
// what is absent is gone; a response for names holds some of them, and absence means nothing.
type worldProtocol struct {
	stream   *stream
	raw      grpc.ClientStream
	sentNode bool
}

func (p *worldProtocol) attach(raw grpc.ClientStream) { p.raw = raw }

func (p *worldProtocol) method() string {
	if p.stream.source.ads {
		return "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
	}
	return kindTable[p.stream.kind].method[0]
}

func (p *worldProtocol) sync(kind Kind, sub *subscription, names []string) error {
	if sub.requested && sameNames(names, sub.sent) {
		return nil
	}
	sub.sent = toSet(names)
	return p.send(kind, sub, names, nil)
}

func (p *worldProtocol) send(kind Kind, sub *subscription, names []string, nack error) error {
	request := &discoveryv3.DiscoveryRequest{
		TypeUrl: kind.TypeURL(), VersionInfo: sub.version, ResponseNonce: sub.nonce, ErrorDetail: errorDetail(nack),
	}
	if !sub.wildcard {
		request.ResourceNames = names // a wildcard is the legacy empty list, which every server knows
	}
	if !p.sentNode {
		request.Node = p.stream.client.node
		p.sentNode = true
	}
	sub.requested = true
	return p.raw.SendMsg(request)
}

func (p *worldProtocol) receive() (any, error) {
	response := &discoveryv3.DiscoveryResponse{}
	return response, p.raw.RecvMsg(response)
}

func (p *worldProtocol) handle(message any) error {
	response := message.(*discoveryv3.DiscoveryResponse)
	s := p.stream
	kind, known := kindOf(response.GetTypeUrl())
	sub := s.existing(kind)
	if !known || sub == nil {
		return fmt.Errorf("the server sent %q, which was not asked for", response.GetTypeUrl())
	}
	sub.nonce = response.GetNonce()
	list := make([]incoming, 0, len(response.GetResources()))
	for _, a := range response.GetResources() {
		list = append(list, incoming{version: response.GetVersionInfo(), any: a})
	}
	err := s.client.apply(s, kind, list, sub.wildcard && kind.wildcard())
	if err == nil {
		sub.version = response.GetVersionInfo()
	}
	s.logAnswer(kind, response.GetVersionInfo(), len(list), 0, err)
	// The names are the ones last sent: an ACK that drops a name would unsubscribe it before sync could say so.
	names := make([]string, 0, len(sub.sent))
	for name := range sub.sent {
		names = append(names, name)
	}
	return p.send(kind, sub, names, err)
}

func (s *stream) logAnswer(kind Kind, version string, resources, removed int, err error) {
	if err != nil {
		s.client.log.Warn("xDS response refused in part (NACK)", "type", kind.String(), "version", version, "resources", resources, "error", err)
		return
	}
	s.client.log.Debug("xDS response accepted (ACK)", "type", kind.String(), "version", version, "resources", resources, "removed", removed)
}
