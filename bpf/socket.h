/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the kernel knows of a socket and does not show in the programs' contexts, read by CO-RE. */
#ifndef SM_SOCKET_H
#define SM_SOCKET_H

#include "maps.h"

/* Does a read on this socket sleep? Then it must not be enrolled unasked: on a sockmap socket such a read can return
 * EAGAIN (kernel.md 22). A socket without a file belongs to the kernel; leave it alone too. */
static __always_inline bool sm_is_blocking(struct bpf_sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	if (!tp)
		return true;
	return !(tp->inet_conn.icsk_inet.sk.sk_socket->file->f_flags & O_NONBLOCK);
}

/* Did the agent make this socket? It says so in the socket's storage, through a map that nobody else can open. A mark or
 * an address would not do: every container with CAP_NET_RAW, which most have, may set SO_MARK (kernel 5.17). */
static __always_inline bool sm_is_ours(struct bpf_sock *sk)
{
	struct sm_sock *st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);

	return st && st->role == SM_ROLE_OURS;
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

/* Has the application behind this end been seen to splice? cgroup 0: the one that accepts on port; port 0: the one that
 * connects from cgroup. */
static __always_inline bool sm_app_splices(__u64 netns, __u64 cgroup, __u16 port)
{
	struct sm_app app = { .netns = netns, .cgroup = cgroup, .port = port };

	if (!bpf_map_lookup_elem(&sm_nosplice, &app))
		return false;
	SM_COUNT(skipped_splicing);
	return true;
}

/* The socket's psock. Only for sockets that are enrolled: others may keep something else there. */
static __always_inline struct sk_psock *sm_psock(struct sock *sk)
{
	/* the lower bits are flags */
	return (struct sk_psock *)((unsigned long)BPF_CORE_READ(sk, sk_user_data) & ~7ul);
}

/* Does a program decide about the messages that an enrolled socket sends? A socket keeps what hung on sm_pairs when it was
 * enrolled, for good: without a program all that it sends goes by TCP, and nobody counts it. */
static __always_inline bool sm_decides(struct sock *sk)
{
	struct sk_psock *psock = sm_psock(sk);

	return psock && BPF_CORE_READ(psock, progs.msg_parser);
}

/* The redirected bytes that the application has not read; 1 where the kernel keeps no count. */
static __always_inline __u32 sm_unread(struct sock *sk)
{
	struct sk_psock *psock = sm_psock(sk);
	struct list_head *queue;

	if (!psock)
		return 0;
	if (bpf_core_field_exists(psock->msg_tot_len))
		return BPF_CORE_READ(psock, msg_tot_len);
	queue = (struct list_head *)((void *)psock + bpf_core_field_offset(psock->ingress_msg));
	return BPF_CORE_READ(queue, next) != queue;
}

#endif
