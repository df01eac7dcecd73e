package loop

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkConnection is a connection's whole life on the loop: accepted, one message there and back, closed by the loop,
// beside connections that do nothing. cpu-us/op is the loop's thread's, whatever else the machine does.
func BenchmarkConnection(b *testing.B) {
	for _, idle := range []int{0, 8000} {
		b.Run(fmt.Sprintf("%s/idle=%d", testedIO, idle), func(b *testing.B) {
			l := startLoop(b)
			waiting := serve(b, l, Options{}, echo)
			for range idle {
				c := dial(b, waiting)
				_ = c.SetDeadline(time.Time{})
			}
			once := serve(b, l, Options{}, func() Handler {
				return &hooks{data: func(c *Conn, in []byte) int {
					c.Write(in)
					c.Close()
					return len(in)
				}}
			})
			buf := make([]byte, 64)
			before := loopCPU(b, l)
			b.ReportAllocs()
			for b.Loop() {
				c, err := net.Dial("tcp", once.String())
				if err != nil {
					b.Fatal(err)
				}
				_, _ = c.Write(buf)
				_, _ = io.ReadFull(c, buf)
				_ = c.Close()
			}
			b.ReportMetric(float64((loopCPU(b, l)-before).Nanoseconds())/float64(b.N)/1000, "loop-cpu-us/op")
		})
	}
}

// loopCPU is what the loop's thread has used.
func loopCPU(b *testing.B, l *Loop) (used time.Duration) {
	do(b, l, func() {
		var r unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_THREAD, &r); err != nil {
			b.Error(err)
		}
		used = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	})
	return used
}
