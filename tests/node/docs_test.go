package node

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/lab/labtest"
)

// What the documentation names exists: every metric is served, every flag is one of the agent's and each of those is
// documented.
func TestDocumentationNamesWhatIsThere(t *testing.T) {
	w := newWorld(t, anywhere)
	w.curl(w.client, w.shop.VIP(0), 10)
	served, err := w.Metrics(w.ctx, "/metrics")
	w.must(err)
	for _, name := range regexp.MustCompile("`(sockmesh_[a-z_]+|istio_[a-z]+_[a-z_]+)[`{]").FindAllStringSubmatch(read(t, "../../docs/metrics.md"), -1) {
		// A metric without a value yet is not served: TCP metrics, logs that nobody asked for.
		if strings.HasPrefix(name[1], "istio_tcp") || name[1] == "sockmesh_access_log_lines_total" || strings.HasSuffix(name[1], "_") {
			continue
		}
		if !strings.Contains(served, "# HELP "+name[1]+" ") {
			t.Errorf("docs/metrics.md names %s, which is not served", name[1])
		}
	}

	help, err := exec.CommandContext(t.Context(), filepath.Join(labtest.Binaries(), "sockmesh-agent"), "--help").CombinedOutput()
	w.must(err)
	documented := read(t, "../../docs/configuration.md")
	documented = documented[:strings.Index(documented, "### Labels")]
	flag := regexp.MustCompile(`--[a-z][a-z-]+`)
	for _, f := range flag.FindAllString(documented, -1) {
		if !strings.Contains(string(help), f+" ") && !strings.Contains(string(help), f+"\n") {
			t.Errorf("docs/configuration.md names %s, which is no flag", f)
		}
	}
	for _, f := range regexp.MustCompile(`(?m)^\s+(?:-\w, )?(--[a-z-]+) `).FindAllStringSubmatch(string(help), -1) {
		if f[1] != "--help" && f[1] != "--version" && !strings.Contains(documented, f[1]) {
			t.Errorf("the agent has the flag %s, and docs/configuration.md does not", f[1])
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
