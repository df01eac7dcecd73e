package main

import (
	"slices"
	"strings"
	"testing"
)

// The aims name rows that exist, and are judged by rows of one run that are results.

func measured(s subject, change func(*result)) result {
	x := result{Scenario: s.scenario, Proxy: s.proxy, Path: s.path, Variant: s.variant, Valid: true, Rounds: 3}
	change(&x)
	return x
}

func rate(s subject, rps float64) result {
	return measured(s, func(x *result) { x.RPS.Median = rps })
}

// Every aim names rows that the bench really measures: a renamed scenario, proxy, path or variant would leave it unjudged.
func TestAimsNameRowsThatAreMeasured(t *testing.T) {
	w := &world{o: options{build: t.TempDir()}}
	all := w.allCases()
	for _, path := range []string{"iptables", "connect", "sockmap"} {
		all = append(all, testCase{proxy: "envoy", path: path}) // whose binary is not here
	}
	rows := map[subject]bool{}
	for _, s := range scenarios {
		if s.run != nil {
			continue
		}
		cases := slices.Clone(all)
		if s.cases != nil {
			cases = s.cases(cases)
		}
		for _, c := range cases {
			rows[subject{s.name, c.proxy, c.path, c.variant}] = true
		}
	}
	for _, a := range aims() {
		if !rows[a.of] {
			t.Errorf("%s: no row %q is measured", a.what, a.of)
		}
		if a.against != (subject{}) && !rows[a.against] {
			t.Errorf("%s: no row %q is measured", a.what, a.against)
		}
	}
}

func TestAimsAreJudgedByTheRowsOfOneRun(t *testing.T) {
	ours := subject{"http1-small", "sockmesh", "sockmap", ""}
	haproxy := subject{"http1-small", "haproxy", "iptables", ""}
	find := func(results ...result) *verdict {
		verdicts := judge(results)
		i := slices.IndexFunc(verdicts, func(v verdict) bool { return v.Of == ours.String() && v.Against == haproxy.String() })
		if i < 0 {
			return nil
		}
		return &verdicts[i]
	}
	if v := find(rate(ours, 190), rate(haproxy, 100)); v == nil || !v.Met || v.Measured != 1.9 {
		t.Errorf("1.9 of HAProxy: %+v", v)
	}
	if v := find(rate(ours, 170), rate(haproxy, 100)); v == nil || v.Met {
		t.Errorf("1.7 of HAProxy is less than 1.8: %+v", v)
	}
	if v := find(rate(ours, 190)); v != nil {
		t.Errorf("judged without the other row: %+v", v)
	}
	broken := rate(haproxy, 100)
	broken.Valid = false
	if v := find(rate(ours, 190), broken); v != nil {
		t.Errorf("judged by a row that is no result: %+v", v)
	}
	var out strings.Builder
	printAims(&out, judge([]result{measured(ours, func(x *result) { x.CallsMedian = 4 })}))
	if !strings.Contains(out.String(), "at most 3") || !strings.Contains(out.String(), "4.00, missed") {
		t.Errorf("printed:\n%s", out.String())
	}
}
