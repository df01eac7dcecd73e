package datapath

import "unsafe"

// ptrOf is for system calls that x/sys has no wrapper for.
func ptrOf[T any](v *T) unsafe.Pointer { return unsafe.Pointer(v) }
