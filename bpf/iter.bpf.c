/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Lists the sockets that have storage of ours, for `sockmesh sockets`. Run by reading from an iterator, at no cost to
 * anybody else. */
#include "maps.h"
#include "socket.h"

/* One record of the iterator's output. */
struct sm_socket_row {
	struct sm_sock state;
	__u8 local[16] SM_ALIGNED;
	__u8 remote[16] SM_ALIGNED;
	__u64 cookie;
	__u64 netns;
	__u16 local_port;
	__u16 remote_port;
	__u16 family;
	__u8 tcp_state;
	__u8 protocol;
	__u32 unread; /* redirected bytes that the application has not read; 1 where the kernel keeps no count */
	__u32 pid;    /* of a process that has the socket, and its descriptor; 0: not known */
	__u32 fd;
	__u32 mute; /* enrolled while no program was there to decide about its messages: they go by TCP */
};

/* Not used: it keeps the record's type in BTF, from which the Go type is generated. */
const volatile struct sm_socket_row sm_socket_row_type = {};

static __always_inline void sm_describe(struct sm_socket_row *row, struct sock *sk, struct sm_sock *st)
{
	struct sm_ip ip;

	__builtin_memcpy(&row->state, st, sizeof(row->state));
	row->cookie = bpf_get_socket_cookie(sk);
	row->netns = sk->__sk_common.skc_net.net->net_cookie;
	row->family = sk->__sk_common.skc_family;
	row->tcp_state = sk->__sk_common.skc_state;
	row->protocol = BPF_CORE_READ(sk, sk_protocol);
	row->local_port = sk->__sk_common.skc_num;
	row->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	if (st->state == SM_ENROLLED_STATE) {
		row->unread = sm_unread(sk);
		row->mute = !sm_decides(sk);
	}
	if (row->family == AF_INET6) {
		BPF_CORE_READ_INTO(&row->local, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&row->remote, sk, __sk_common.skc_v6_daddr);
	} else {
		ip = sm_mapped(sk->__sk_common.skc_rcv_saddr);
		sm_store(row->local, &ip);
		ip = sm_mapped(sk->__sk_common.skc_daddr);
		sm_store(row->remote, &ip);
	}
}

SEC("iter/bpf_sk_storage_map")
int sm_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	struct sm_sock *st = ctx->value;
	struct sm_socket_row row = {};

	if (!sk || !st)
		return 0;
	sm_describe(&row, sk, st);
	bpf_seq_write(ctx->meta->seq, &row, sizeof(row));
	return 0;
}

/* Some hardened kernels refuse iterators over maps, with EPERM. Then every descriptor of every process that the reader can
 * see is looked at: dearer, blind to sockets that nobody has accepted yet, but it knows whose they are. A socket that
 * several descriptors share is listed once for each. */
SEC("iter/task_file")
int sm_sock_files(struct bpf_iter__task_file *ctx)
{
	struct file *file = ctx->file;
	struct task_struct *task = ctx->task;
	struct sm_socket_row row = {};
	struct socket *socket;
	struct sm_sock *st;
	struct sock *sk;

	if (!file || !task)
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = socket->sk;
	if (!sk)
		return 0;
	st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	if (!st)
		return 0;
	sm_describe(&row, sk, st);
	row.pid = task->tgid;
	row.fd = ctx->fd;
	bpf_seq_write(ctx->meta->seq, &row, sizeof(row));
	return 0;
}
