package main

import "fmt"

// Two loops against one. Only where client and server have cores of their own does this say what a second loop adds (on
// four cores and more each is pinned, see cores.go); on fewer, all of them share, and what is left to see is whether the
// CPU per request stays what it was: loops that share locks or cache lines would make it grow.

var loopScenarios = []scenario{{
	name: "loops", what: "HTTP/1.1 keep-alive, 128 bytes, one loop and two; " + coreUse(), path: "/small",
	cases: func(all []testCase) []testCase {
		var cases []testCase
		for _, c := range only("sockmesh/sockmap", "sockmesh/iptables", "envoy/iptables", "haproxy/iptables", "nginx/iptables")(all) {
			for loops := 1; loops <= 2; loops++ {
				cases = append(cases, c.as(fmt.Sprintf("%d loops", loops), func(s *scenario) { s.loops = loops }))
			}
		}
		return cases
	},
}}
