package sample

import . "golang.org/x/sys/unix"

func dot(a, b int) {
	_, _ = Splice(a, nil, b, nil, 1, 0) // caught: golang.org/x/sys/unix.Splice
	_, _ = Read(a, nil)
}
