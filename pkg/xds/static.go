package xds

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// loadStatic takes in the bootstrap's static resources. A refused one is reported and does not stop the others.
// Clusters that only say where a control plane is are no clusters of the mesh.
func (c *Client) loadStatic() {
	servers := c.cfg.Bootstrap.serverClusters()
	for _, m := range c.cfg.Bootstrap.proto.GetStaticResources().GetClusters() {
		if !servers[m.GetName()] {
			c.acceptStatic(Clusters, m)
		}
	}
	for _, m := range c.cfg.Bootstrap.proto.GetStaticResources().GetListeners() {
		c.acceptStatic(Listeners, m)
	}
}

func (c *Client) acceptStatic(kind Kind, m proto.Message) {
	a, err := anypb.New(m)
	if err == nil {
		err = c.accept(nil, staticSource, kind, incoming{name: resourceName(m), version: staticSource, any: a}, m)
	}
	if err != nil {
		c.log.Error("static resource refused", "file", c.cfg.Bootstrap.name, "error", err)
	}
}
