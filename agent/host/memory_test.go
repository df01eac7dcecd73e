package host

import (
	"os"
	"regexp"
	"strconv"
	"testing"
)

func residentFilePages(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`RssFile:\s+(\d+) kB`).FindSubmatch(text)
	if found == nil {
		t.Fatalf("no RssFile in %s", text)
	}
	n, err := strconv.Atoi(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestGivingMemoryBackLetsGoOfTheProgramsPagesAndNothingElse(t *testing.T) {
	written := []byte("data that was written stays")
	before := residentFilePages(t)
	if err := GiveBackMemory(); err != nil {
		t.Fatal(err)
	}
	after := residentFilePages(t)
	if after >= before {
		t.Errorf("%d KiB of files were resident before, %d are after", before, after)
	}
	if string(written) != "data that was written stays" {
		t.Errorf("memory has changed: %q", written)
	}
}
