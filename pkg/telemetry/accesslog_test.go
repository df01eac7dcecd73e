package telemetry

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

func logTo(t *testing.T, logs *Logs, path, format string) *Logger {
	t.Helper()
	lg, err := logs.Logger(&mesh.AccessLog{Path: path, Format: format})
	if err != nil {
		t.Fatal(err)
	}
	return lg
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestLinesAppearWithoutBeingAskedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	logs := NewLogs()
	defer logs.Close()
	logTo(t, logs, path, "%REQ(:METHOD)% %RESPONSE_CODE%\n").Log(sampleRecord(), 0)
	eventually(t, "the line", func() bool { return read(t, path) == "GET 200\n" })
}

func TestCloseWritesWhatIsBuffered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	logs := NewLogs()
	one, two := logTo(t, logs, path, "%BYTES_SENT%\n"), logTo(t, logs, path, "other\n")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5000 {
				one.Log(sampleRecord(), 0)
				two.Log(sampleRecord(), 0)
			}
		})
	}
	wg.Wait()
	if err := logs.Close(); err != nil {
		t.Fatal(err)
	}
	got := read(t, path)
	if strings.Count(got, "1234\n") != 20000 || strings.Count(got, "other\n") != 20000 || len(got) != 20000*11 {
		t.Errorf("%d bytes", len(got))
	}
	one.Log(sampleRecord(), 0) // too late, and harmless
	if len(read(t, path)) != len(got) {
		t.Error("written after Close")
	}
	if _, err := logs.Logger(&mesh.AccessLog{Path: path}); err == nil {
		t.Error("a new log after Close")
	}
}

func TestAFileIsReopenedAfterRotation(t *testing.T) {
	dir := t.TempDir()
	path, old := filepath.Join(dir, "a.log"), filepath.Join(dir, "a.log.1")
	logs := NewLogs()
	defer logs.Close()
	lg := logTo(t, logs, path, "line\n")
	lg.Log(sampleRecord(), 0)
	if err := os.Rename(path, old); err != nil {
		t.Fatal(err)
	}
	logs.Reopen()
	eventually(t, "the new file", func() bool { _, err := os.Stat(path); return err == nil })
	lg.Log(sampleRecord(), 0)
	eventually(t, "a line in it", func() bool { return read(t, path) == "line\n" })
	if read(t, old) != "line\n" {
		t.Errorf("the old file has %q", read(t, old))
	}
}

func TestAWriterThatCannotWriteDropsAndCounts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	logs := NewLogs()
	if _, err := logs.Logger(&mesh.AccessLog{Path: path}); err == nil {
		t.Fatal("a FIFO that nobody reads is accepted")
	}
	reader, err := os.OpenFile(path, os.O_RDWR, 0) // holds it open and never reads
	if err != nil {
		t.Fatal(err)
	}
	lg := logTo(t, logs, path, strings.Repeat("x", 1023)+"\n")
	const lines = 3 * logBuffer / 1024
	for range lines {
		lg.Log(sampleRecord(), 0)
	}
	lg.file.mu.Lock()
	held := len(lg.file.buf)
	lg.file.mu.Unlock()
	if st := logs.Stats()[0]; st.Dropped == 0 || held > logBuffer {
		t.Errorf("dropped %d, %d bytes held", st.Dropped, held)
	}
	// Once somebody reads, the rest comes out whole.
	go func() {
		b := make([]byte, 1<<20)
		for {
			if n, err := reader.Read(b); n == 0 || err != nil {
				return
			}
		}
	}()
	eventually(t, "every line is accounted for", func() bool {
		st := logs.Stats()[0]
		return st.Written+st.Dropped == lines && st.Failed == 0
	})
	if err := logs.Close(); err != nil {
		t.Error(err)
	}
	runtime.KeepAlive(lg)
	reader.Close()
}

func TestAFileThatCannotBeOpenedIsNamed(t *testing.T) {
	logs := NewLogs()
	defer logs.Close()
	_, err := logs.Logger(&mesh.AccessLog{Path: "/nowhere/at/all.log"})
	if err == nil || !strings.Contains(err.Error(), "path: open /nowhere/at/all.log") {
		t.Error(err)
	}
}

func TestTheSameConfigurationIsTheSameLogAndItsFileGoesWithIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	logs := NewLogs()
	defer logs.Close()
	func() {
		al := &mesh.AccessLog{Path: path, Format: "x\n"}
		a, err := logs.Logger(al)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := logs.Logger(al); a != b {
			t.Error("compiled twice")
		}
		runtime.GC()
		a.Log(sampleRecord(), 0)
	}()
	eventually(t, "the file is closed", func() bool { runtime.GC(); return len(logs.Stats()) == 0 })
	eventually(t, "with its line", func() bool { return read(t, path) == "x\n" })
}

func TestLoggingAllocatesNothing(t *testing.T) {
	for name, al := range map[string]*mesh.AccessLog{
		"text": {},
		"JSON": {JSON: map[string]any{
			"method": "%REQ(:METHOD)%", "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "code": "%RESPONSE_CODE%",
			"took": "%DURATION%", "start": "%START_TIME%", "peer": "%DOWNSTREAM_REMOTE_ADDRESS%", "up": "%UPSTREAM_HOST%",
		}},
	} {
		al.Path = filepath.Join(t.TempDir(), "a.log")
		logs := NewLogs()
		lg, err := logs.Logger(al)
		if err != nil {
			t.Fatal(err)
		}
		r := sampleRecord()
		// The file's buffers grow while the first lines come.
		lg.file.buf, lg.file.spare = make([]byte, 0, logBuffer), nil
		line := lg.AppendLine(nil, r)
		if n := testing.AllocsPerRun(100, func() { line = lg.AppendLine(line[:0], r) }); n != 0 {
			t.Errorf("%s: a line takes %v allocations", name, n)
		}
		if n := testing.AllocsPerRun(100, func() { lg.Log(r, 0) }); n != 0 {
			t.Errorf("%s: logging takes %v allocations", name, n)
		}
		if err := logs.Close(); err != nil {
			t.Error(err)
		}
		if !bytes.HasPrefix([]byte(read(t, al.Path)), line) {
			t.Errorf("%s: the line is not there", name)
		}
	}
}

func BenchmarkLog(b *testing.B) {
	logs := NewLogs()
	defer logs.Close()
	al := &mesh.AccessLog{Path: filepath.Join(b.TempDir(), "a.log")}
	lg, err := logs.Logger(al)
	if err != nil {
		b.Fatal(err)
	}
	r := sampleRecord()
	b.ReportAllocs()
	for b.Loop() {
		lg.Log(r, 0)
	}
}
