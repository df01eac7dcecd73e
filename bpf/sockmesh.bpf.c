/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* All hook families as one object, so that they share their maps without further ado. */
#include "connect.bpf.c"
#include "udp.bpf.c"
#include "bind.bpf.c"
#include "sockops.bpf.c"
#include "skmsg.bpf.c"
#include "aside.bpf.c"
#include "sockopt.bpf.c"
#include "iter.bpf.c"
#include "end.bpf.c"
#include "splice.bpf.c"
#include "nat.bpf.c"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
