#!/usr/bin/env bash
# Every test of the project, one step after the other; the last line is "N passed, N failed". What each step wrote in
# full is in build/test/. Steps go on after a failure, so that one run tells everything.
#
# A test that failed is run once more, alone. If it passes then it is unsteady: what it said is printed all the same, its
# name stands before the last line, and somebody has to find out why. Two of them are the most that a run may have.
set -uo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0
logs=build/test
rm -rf $logs && mkdir -p $logs build/bin
passed=0 failed=0 unsteady=() most_unsteady=2

# step NAME DIRECTORY CMD...: runs it, shows packages and failures, counts tests (or the step itself if it has none).
step() {
  local name=$1 dir=$2 rc log began=$SECONDS; shift 2
  log=$PWD/$logs/$name.log
  echo "== $name"
  (cd "$dir" && "$@") >"$log" 2>&1
  rc=$?
  local ok bad
  ok=$(grep -cE '^--- PASS' "$log") bad=$(grep -cE '^--- FAIL' "$log")
  if [ $rc -ne 0 ]; then
    failures "$log" | head -200
    if [ "$bad" -gt 0 ]; then
      again "$name" "$dir" "$log" && ok=$((ok + bad)) bad=0
    else
      tail -n 15 "$log"
      bad=1
    fi
  elif [ "$((ok + bad))" -eq 0 ]; then
    ok=1
  fi
  grep -E '^(ok  |FAIL\s)' "$log" || true
  passed=$((passed + ok)) failed=$((failed + bad))
  echo "   $ok passed, $bad failed, $((SECONDS - began)) s"
}

# again NAME DIRECTORY LOG: gives the tests that failed a second run. It fails if one fails again, if there are too many, or
# if a package failed by more than its tests: a panic, a data race, a time-out.
again() {
  local name=$1 dir=$2 log=$3 package tests
  grep -qE '^(panic:|fatal error:|WARNING: DATA RACE)' "$log" && return 1
  # Of each package that failed, its tests that did, as a pattern. A package's own line comes after its tests'.
  awk '/^--- FAIL: / {names = names (names == "" ? "" : "|") $3; next}
    /^(ok|FAIL)[ \t]+[^ \t]+[ \t]/ {if ($1 == "FAIL") print $2, (names == "" ? "?" : names); names = ""}' "$log" >"$log.failed"
  [ "$((${#unsteady[@]} + $(grep -o '[|]' "$log.failed" | wc -l) + $(wc -l <"$log.failed")))" -le $most_unsteady ] || return 1
  grep -q '?' "$log.failed" && return 1
  while read -r package tests; do
    echo "   once more: $tests in $package"
    (cd "$dir" && go test -count=1 -timeout 10m -v -run "^($tests)\$" "$package") >"$log.again" 2>&1 </dev/null || {
      failures "$log.again" | head -100
      return 1
    }
  done <"$log.failed"
  while read -r package tests; do unsteady+=("$tests in $package"); done <"$log.failed"
}

# failures prints of a verbose test log what each failed test said, and what stopped a package altogether.
failures() {
  awk '/^=== RUN/ && $3 !~ /\// {n = 0} /^===/ {next} /^--- (PASS|SKIP)/ {n = 0; next}
    /^--- FAIL/ {for (i = n > 40 ? n - 40 : 0; i < n; i++) print "  " said[i]; print; n = 0; next}
    /^ +--- FAIL/ || /^(panic:|FAIL|# )/ {print; next} {said[n++] = $0}
    END {if (n > 0 && n < 40) for (i = 0; i < n; i++) print "  " said[i]}' "$1"
}

formatted() {
  local files
  files=$(git ls-files '*.go' | xargs gofmt -l)
  [ -z "$files" ] || { echo "gofmt would change: $files"; return 1; }
}

step format . formatted
step build . make --no-print-directory build
step vet . go vet ./...
# Two packages at a time: many of them use namespaces, cgroups and real processes on what may be two cores. The tests
# of tests/ come after, alone.
packages=$(go list ./... | grep -v /tests/)
# shellcheck disable=SC2086
step unit . go test -count=1 -p 2 -timeout 15m -v $packages
step bench . go vet ./tests/bench
for module in tests/*/go.mod; do
  [ -e "$module" ] || continue
  dir=$(dirname "$module")
  step "$(basename "$dir")" "$dir" go test -count=1 -timeout 15m -v ./...
done
for suite in $(go list ./tests/... | sed 's|.*/tests/||' | grep -v -e bench -e e2e); do
  step "$suite" . go test -count=1 -timeout 15m -v "./tests/$suite"
done

for test in "${unsteady[@]}"; do echo "unsteady, failed once and passed alone: $test"; done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
