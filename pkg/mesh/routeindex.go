package mesh

// Routes are tried in order and the first match wins, which makes a table of a thousand routes a thousand
// comparisons. routeIndex narrows that down without changing the outcome: it gathers the routes that can match
// by their path alone (the exact path's, those of every prefix on the way down a trie, those that no path
// rules out), walks them in configuration order, and checks each in full. A candidate too many costs time,
// never correctness, so the tries may hold supersets: path-separated prefixes and case-insensitive exact paths
// sit at their bare prefix.
type routeIndex struct {
	routes []*Route
	exact  map[string][]int32
	prefix trie // case-sensitive prefixes
	folded trie // case-insensitive ones, in lower case
	always []int32
}

// linearBelow is the table size up to which a plain scan is faster than gathering candidates.
const linearBelow = 8

// maxCandidateLists bounds the array of cursors on the stack. A path below more nested prefixes than this
// falls back to the plain scan.
const maxCandidateLists = 16

func buildRouteIndex(routes []*Route) routeIndex {
	index := routeIndex{routes: routes}
	if len(routes) <= linearBelow {
		return index
	}
	index.exact = map[string][]int32{}
	for i, route := range routes {
		n, m := int32(i), &route.Match
		switch {
		case m.Kind == PathRegex || m.Kind == PathConnect || m.Path == "":
			index.always = append(index.always, n)
		case m.IgnoreCase:
			index.folded.insert(m.Path, n)
		case m.Kind == PathExact:
			index.exact[m.Path] = append(index.exact[m.Path], n)
		default:
			index.prefix.insert(m.Path, n)
		}
	}
	return index
}

// find returns the first route that matches.
func (index *routeIndex) find(r Request) *Route {
	path := pathOnly(r.Path())
	if index.exact == nil {
		return index.scan(r, path)
	}
	lists := candidates{}
	lists.add(index.exact[path])
	lists.add(index.always)
	index.prefix.collect(path, false, &lists)
	index.folded.collect(path, true, &lists)
	if lists.overflow {
		return index.scan(r, path)
	}
	for n := lists.next(); n >= 0; n = lists.next() {
		if route := index.routes[n]; route.Match.matches(r, path) {
			return route
		}
	}
	return nil
}

func (index *routeIndex) scan(r Request, path string) *Route {
	for _, route := range index.routes {
		if route.Match.matches(r, path) {
			return route
		}
	}
	return nil
}

// candidates merges a few ascending lists of route numbers.
type candidates struct {
	lists    [maxCandidateLists][]int32
	n        int
	overflow bool
}

func (c *candidates) add(list []int32) {
	if len(list) == 0 {
		return
	}
	if c.n == maxCandidateLists {
		c.overflow = true
		return
	}
	c.lists[c.n] = list
	c.n++
}

// next takes the smallest number off the lists; -1 when they are empty. A route is in one list only.
func (c *candidates) next() int32 {
	best := -1
	for i := range c.n {
		if len(c.lists[i]) > 0 && (best < 0 || c.lists[i][0] < c.lists[best][0]) {
			best = i
		}
	}
	if best < 0 {
		return -1
	}
	n := c.lists[best][0]
	c.lists[best] = c.lists[best][1:]
	return n
}

// trie is a radix tree of path prefixes.
type trie struct {
	nodes []trieNode // nodes[0] is the root, if there is any
}

type trieNode struct {
	edge     string  // bytes between the parent and this node
	routes   []int32 // routes whose prefix ends here, ascending
	children []int32 // node numbers; their edges begin with different bytes
}

// insert adds a route; route numbers must come in ascending order.
func (t *trie) insert(prefix string, route int32) {
	if len(t.nodes) == 0 {
		t.nodes = append(t.nodes, trieNode{})
	}
	at := int32(0)
	for prefix != "" {
		child := t.child(at, prefix[0], false)
		if child < 0 {
			t.nodes = append(t.nodes, trieNode{edge: prefix})
			child = int32(len(t.nodes) - 1)
			t.nodes[at].children = append(t.nodes[at].children, child)
			at, prefix = child, ""
			break
		}
		common := commonPrefix(t.nodes[child].edge, prefix)
		if common < len(t.nodes[child].edge) {
			t.split(child, common)
		}
		at, prefix = child, prefix[common:]
	}
	t.nodes[at].routes = append(t.nodes[at].routes, route)
}

// split ends node n after the first common bytes of its edge and hangs the rest below it.
func (t *trie) split(n int32, common int) {
	old := t.nodes[n]
	t.nodes = append(t.nodes, trieNode{edge: old.edge[common:], routes: old.routes, children: old.children})
	t.nodes[n] = trieNode{edge: old.edge[:common], children: []int32{int32(len(t.nodes) - 1)}}
}

func (t *trie) child(n int32, first byte, fold bool) int32 {
	if fold {
		first = lower(first)
	}
	for _, c := range t.nodes[n].children {
		if t.nodes[c].edge[0] == first {
			return c
		}
	}
	return -1
}

// collect adds the routes of every prefix of path.
func (t *trie) collect(path string, fold bool, out *candidates) {
	if len(t.nodes) == 0 {
		return
	}
	at := int32(0)
	for {
		out.add(t.nodes[at].routes)
		if path == "" {
			return
		}
		at = t.child(at, path[0], fold)
		if at < 0 || !hasPrefix(path, t.nodes[at].edge, fold) {
			return
		}
		path = path[len(t.nodes[at].edge):]
	}
}

func commonPrefix(a, b string) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// Match returns the route for a request; nil: none (flag NR). It does not act on RequireTLS: that precedes
// routing, see VirtualHost.
func (rc *RouteConfig) Match(r Request) *Route {
	host := rc.VirtualHost(r.Authority())
	if host == nil {
		return nil
	}
	return host.index.find(r)
}

// Route returns the virtual host's route for a request; nil if none matches.
func (vh *VirtualHost) Route(r Request) *Route { return vh.index.find(r) }

// Init builds the look-up tables of a route configuration and sets the Host, Config and Index of its routes.
// Compile functions do it; code that puts a RouteConfig together by hand must.
func (rc *RouteConfig) Init() error {
	index, err := buildHostIndex(rc.Hosts)
	if err != nil {
		return err
	}
	rc.hosts = index
	rc.clusters = rc.collectClusters()
	for _, host := range rc.Hosts {
		for i, route := range host.Routes {
			route.Index, route.Host, route.Config = i, host, rc
			route.MutatesRequest = !(route.RequestHeaders.Empty() && host.RequestHeaders.Empty() && rc.RequestHeaders.Empty())
			route.MutatesResponse = !(route.ResponseHeaders.Empty() && host.ResponseHeaders.Empty() && rc.ResponseHeaders.Empty())
		}
		host.index = buildRouteIndex(host.Routes)
	}
	return nil
}
