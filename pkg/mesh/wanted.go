package mesh

// WantedEndpoints are the EDS names that clusters ask for.
func (b *Builder) WantedEndpoints() map[string]bool {
	names := map[string]bool{}
	for _, state := range b.clusters {
		if state.want != nil && state.want.Discovery == EDS {
			names[state.want.ServiceName] = true
		}
	}
	return names
}

// WantedRoutes are the RDS names that listeners ask for, those of versions still in force included.
func (b *Builder) WantedRoutes() map[string]bool {
	names := map[string]bool{}
	for _, state := range b.listeners {
		for _, l := range []*Listener{state.want, state.active} {
			for _, h := range l.managers() {
				if h.RouteConfigName != "" {
					names[h.RouteConfigName] = true
				}
			}
		}
	}
	return names
}

// WantedNames are the DNS names of all clusters, each with the cluster that asks for the shortest refresh.
func (b *Builder) WantedNames() map[DNSKey]*DNS {
	names := map[DNSKey]*DNS{}
	for _, state := range b.clusters {
		if state.want == nil {
			continue
		}
		for _, key := range state.want.Names() {
			if old := names[key]; old == nil || state.want.DNS.Refresh < old.Refresh {
				names[key] = state.want.DNS
			}
		}
	}
	for key := range b.answers {
		if names[key] == nil {
			delete(b.answers, key)
		}
	}
	return names
}

// Warming names what is not in force yet and what it waits for, for a human.
func (b *Builder) Warming() map[string]string {
	waiting := map[string]string{}
	for name, state := range b.clusters {
		if state.want != nil && state.from != state.want {
			waiting["cluster "+name] = "endpoints " + state.want.ServiceName
			if state.want.DNS != nil {
				waiting["cluster "+name] = "addresses of its names"
			}
		}
	}
	for name, state := range b.routes {
		if state.active != state.want {
			waiting["route "+name] = "cluster " + b.unready(state.want.clusterNames(), true)
		}
	}
	for name, state := range b.listeners {
		if state.from == state.want {
			continue
		}
		if cluster := b.unready(state.want.clusterNames(), true); cluster != "" {
			waiting["listener "+name] = "cluster " + cluster
			continue
		}
		for _, h := range state.want.managers() {
			if h.RouteConfigName != "" && b.routesFor(h) == nil {
				waiting["listener "+name] = "route " + h.RouteConfigName
			}
		}
	}
	return waiting
}
