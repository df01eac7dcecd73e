/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the kernel knows of a socket and does not show in the programs' contexts, read by CO-RE. */
#ifndef SM_SOCKET_H
#define SM_SOCKET_H

#include "common.h"

/* Does a read on this socket sleep? Then it must not be enrolled unasked: on a sockmap socket such a read can return
 * EAGAIN (kernel.md 22). A socket without a file belongs to the kernel; leave it alone too. */
static __always_inline bool sm_is_blocking(struct bpf_sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	if (!tp)
		return true;
	return !(tp->inet_conn.icsk_inet.sk.sk_socket->file->f_flags & O_NONBLOCK);
}

static __always_inline bool sm_is_mptcp(struct bpf_sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	if (!tp)
		return true;
	if (!bpf_core_field_exists(tp->is_mptcp))
		return false;
	return BPF_CORE_READ_BITFIELD(tp, is_mptcp);
}

#endif
