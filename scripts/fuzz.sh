#!/usr/bin/env bash
# Runs every fuzz target of the module for the given time each: `scripts/fuzz.sh 30s`. Go fuzzes one target at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
duration=${1:-30s} failed=0 ran=0
while IFS=: read -r file target; do
  echo "== $target in $(dirname "$file") for $duration"
  ran=$((ran + 1))
  go test -run '^$' -fuzz "^$target\$" -fuzztime "$duration" "./$(dirname "$file")" || failed=$((failed + 1))
done < <(git ls-files '*_test.go' | xargs -r grep -Eo '^func Fuzz[A-Za-z0-9_]+' | sed 's/func //' | sort -u)
echo "$((ran - failed)) passed, $failed failed"
[ "$ran" -gt 0 ] && [ "$failed" -eq 0 ]
