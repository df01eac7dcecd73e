/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Applications that splice their sockets (Go's io.Copy between two connections, HAProxy).
 *
 * splice(2) takes bytes from TCP's receive queue alone: what was redirected it never sees, and the application waits
 * for ever. Nothing in the kernel lets a program move the bytes, or make that splice fail, without a hook that taxes
 * every read of the node. So it is noticed, and
 *
 *   - the application is remembered (sm_nosplice): its later connections are never enrolled;
 *   - this connection goes on by TCP in both directions, which is enough if nothing lay unread: the proxy applications
 *     that connect come here before there is an answer;
 *   - else the agent cuts this one connection off, and the application connects again: pkg/datapath/splice.go.
 *
 * What can't be helped: if the other end has closed its side already, the first splice reads the end of the data, and the
 * bytes before it, which were redirected, are missed. Only the first connection of an application can meet this.
 *
 * Two ways to notice, of which the loader takes the first that works. fentry costs nobody anything who doesn't splice.
 * The tracepoint is for kernels that allow no trampolines; every read from TCP passes it.
 */
#include "pairs.h"
#include "socket.h"
#include <bpf/bpf_tracing.h>

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 * 1024);
} splice_events SEC(".maps"); /* belongs to one agent, so it is not pinned */

/* Not used: it keeps the record's type in BTF, from which the Go type is generated. */
const volatile struct sm_splice_event sm_splice_event_type = {};

/* The number of splice(2), which differs between machines. */
#define SM_NR_SPLICE_X86_64 275
#define SM_NR_SPLICE_GENERIC 76

struct pt_regs___arm64 {
	int syscallno;
} __attribute__((preserve_access_index));

static __always_inline bool sm_in_splice(void)
{
	struct pt_regs *regs = (void *)bpf_task_pt_regs(bpf_get_current_task_btf());
	struct pt_regs___arm64 *arm = (void *)regs;

	if (bpf_core_field_exists(arm->syscallno))
		return BPF_CORE_READ(arm, syscallno) == SM_NR_SPLICE_GENERIC;
	return regs->orig_ax == SM_NR_SPLICE_X86_64;
}

/* SM_TUPLE for a kernel socket. */
static __always_inline void sm_tuple_of(struct sock *sk, struct sm_tuple *t)
{
	struct sm_ip l, r;

	__builtin_memset(t, 0, sizeof(*t));
	if (sk->__sk_common.skc_family == AF_INET) {
		l = sm_mapped(sk->__sk_common.skc_rcv_saddr);
		r = sm_mapped(sk->__sk_common.skc_daddr);
	} else {
		BPF_CORE_READ_INTO(&l, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&r, sk, __sk_common.skc_v6_daddr);
	}
	sm_store(t->local, &l);
	sm_store(t->remote, &r);
	t->local_port = sk->__sk_common.skc_num;
	t->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	if (sm_is_loopback(&l) || sm_is_loopback(&r))
		t->netns = sk->__sk_common.skc_net.net->net_cookie;
}

static __always_inline void sm_on_splice(struct sock *sk)
{
	struct sm_sock *st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	struct sm_splice_event *event, e = {};
	struct sm_spliced spliced = { .seen = bpf_ktime_get_ns(), .sk = (__u64)sk };
	__u32 zero = 0, one = 1;

	if (!st || st->state != SM_ENROLLED_STATE || st->reason == SM_WHY_SPLICE)
		return;
	sm_tuple_of(sk, &e.self);
	e.app.netns = sk->__sk_common.skc_net.net->net_cookie;
	if (st->role == SM_ROLE_SERVER || st->role == SM_ROLE_POD_SERVER || st->role == SM_ROLE_DOWNSTREAM)
		e.app.port = e.self.local_port;
	else
		e.app.cgroup = bpf_get_current_cgroup_id();
	e.cookie = bpf_get_socket_cookie(sk);
	e.role = st->role;
	bpf_map_update_elem(&sm_nosplice, &e.app, &spliced.seen, BPF_ANY);
	bpf_map_update_elem(&sm_spliced, &e.self, &spliced, BPF_ANY);
	bpf_map_update_elem(&sm_splicing, &zero, &one, BPF_ANY);
	/* Our own direction: from redirected to TCP is always in order. */
	st->latch = SM_PASS;
	st->reason = SM_WHY_SPLICE;
	SM_COUNT(spliced);
	event = bpf_ringbuf_reserve(&splice_events, sizeof(*event), 0);
	if (!event)
		return;
	*event = e;
	bpf_ringbuf_submit(event, 0);
}

SEC("fentry/tcp_splice_read")
int BPF_PROG(sm_splice_entry, struct socket *sock)
{
	struct sock *sk = sock->sk;

	if (sk)
		sm_on_splice(sk);
	return 0;
}

/* tcp_read_sock, the heart of tcp_splice_read, comes here whether it found something or not. */
SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(sm_splice_point, struct sock *sk)
{
	if (sm_in_splice())
		sm_on_splice(sk);
	return 0;
}
