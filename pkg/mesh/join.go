package mesh

import (
	"maps"
	"slices"
)

// managers are the connection managers of all chains, in order.
func (l *Listener) managers() []*HTTPConnectionManager {
	var list []*HTTPConnectionManager
	if l == nil {
		return nil
	}
	for _, c := range l.allChains() {
		if c.HTTP != nil {
			list = append(list, c.HTTP)
		}
	}
	return list
}

func (l *Listener) allChains() []*FilterChain {
	if l.Default == nil {
		return l.Chains
	}
	return append(slices.Clip(l.Chains), l.Default)
}

// withRoutes is the listener with the routes of its connection managers put in; itself if none come by RDS.
func (l *Listener) withRoutes(routes []*RouteConfig) *Listener {
	rds := false
	for _, h := range l.managers() {
		rds = rds || h.RouteConfigName != ""
	}
	if !rds {
		return l
	}
	joined := *l
	put := func(c *FilterChain) *FilterChain {
		if c == nil || c.HTTP == nil {
			return c
		}
		chain, manager := *c, *c.HTTP
		manager.Routes, routes = routes[0], routes[1:]
		chain.HTTP = &manager
		return &chain
	}
	joined.Chains = make([]*FilterChain, len(l.Chains))
	for i, c := range l.Chains {
		joined.Chains[i] = put(c)
	}
	joined.Default = put(l.Default)
	_ = joined.Init() // the same matches went through it when the listener was compiled
	return &joined
}

// clusterNames are the clusters that the listener itself names: TCP proxies' and those of inline routes.
func (l *Listener) clusterNames() []string {
	var names []string
	for _, c := range l.allChains() {
		switch {
		case c.TCP != nil:
			for i := range c.TCP.Clusters {
				names = append(names, c.TCP.Clusters[i].Name)
			}
		case c.HTTP != nil && c.HTTP.RouteConfigName == "":
			names = append(names, c.HTTP.Routes.clusterNames()...)
		}
	}
	return names
}

// clusterNames are the clusters that the routes name.
func (rc *RouteConfig) clusterNames() []string {
	if rc == nil {
		return nil
	}
	return rc.clusters
}

func (rc *RouteConfig) collectClusters() []string {
	seen := map[string]bool{}
	for _, host := range rc.Hosts {
		for _, route := range host.Routes {
			if route.Action == nil {
				continue
			}
			for i := range route.Action.Clusters {
				seen[route.Action.Clusters[i].Name] = true
			}
			for i := range route.Action.Mirrors {
				seen[route.Action.Mirrors[i].Cluster] = true
			}
		}
	}
	delete(seen, "")
	return slices.Sorted(maps.Keys(seen))
}
