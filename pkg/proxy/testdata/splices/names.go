// Package sample uses what splices under names that a look at the text would miss.
package sample

import (
	cat "io"
	sys "syscall"

	kernel "golang.org/x/sys/unix"
)

func aliases(a, b int, w cat.Writer, r cat.Reader) {
	_, _ = kernel.Splice(a, nil, b, nil, 1, 0) // caught: golang.org/x/sys/unix.Splice
	_, _ = kernel.Tee(a, b, 1, 0)              // caught: golang.org/x/sys/unix.Tee
	_, _ = kernel.Sendfile(a, b, nil, 1)       // caught: golang.org/x/sys/unix.Sendfile
	_, _ = sys.Splice(a, nil, b, nil, 1, 0)    // caught: syscall.Splice
	_, _ = sys.Sendfile(a, b, nil, 1)          // caught: syscall.Sendfile
	_, _ = cat.Copy(w, r)                      // caught: io.Copy
	_, _ = cat.CopyN(w, r, 1)                  // caught: io.CopyN
	_, _ = cat.CopyBuffer(w, r, nil)           // caught: io.CopyBuffer
	_, _ = cat.ReadAll(r)
	_, _ = kernel.Read(a, nil)
}

// A value of a function is as good as a call.
var later = kernel.Splice // caught: golang.org/x/sys/unix.Splice
