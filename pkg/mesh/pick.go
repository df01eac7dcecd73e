package mesh

import "math/bits"

// mix scrambles a request's random draw (splitmix64's finaliser), so that the choice of a weighted cluster is
// independent of the low bits that runtime_fraction looks at.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// pick draws a cluster with probability weight/total; nil where all weights are zero.
func pick(clusters []WeightedCluster, total, random uint64) *WeightedCluster {
	if len(clusters) == 1 {
		return &clusters[0]
	}
	draw, _ := bits.Mul64(mix(random), total) // [0, total), without the bias of a modulo
	for i := range clusters {
		weight := uint64(clusters[i].Weight)
		if draw < weight {
			return &clusters[i]
		}
		draw -= weight
	}
	return nil
}

// PickCluster draws one of the action's clusters. random is the request's Random() as it is: independent bits
// are derived from it here. header looks up a request header. The result's ClusterName gives the name. Nil:
// every weight is zero, or the header that should name the cluster is missing or empty.
func (a *RouteAction) PickCluster(random uint64, header func(string) (string, bool)) *WeightedCluster {
	w := pick(a.Clusters, a.TotalWeight, random)
	if w == nil || w.ClusterName(header) == "" {
		return nil
	}
	return w
}

// ClusterName is Name, or the value of the header that names the cluster (cluster_header).
func (w *WeightedCluster) ClusterName(header func(string) (string, bool)) string {
	if w.ClusterHeader == "" {
		return w.Name
	}
	name, _ := header(w.ClusterHeader)
	return name
}

// PickCluster draws one of the tcp_proxy's clusters; nil where every weight is zero.
func (p *TCPProxy) PickCluster(random uint64) *WeightedCluster {
	return pick(p.Clusters, p.TotalWeight, random)
}
