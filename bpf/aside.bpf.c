/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Hands a connection over: tells the sockets of both applications how to skip the proxy. aside.h has the whole story.
 *
 * The proxy can't reach the applications' sockets, and neither can sm_msg look at any but its own. A tc program can
 * look sockets up in sm_pairs, and user space can run one without attaching it (BPF_PROG_TEST_RUN), with the request
 * as its packet. It runs once per connection, and only this way.
 */
#include "aside.h"

/* Sizes of the request's type are in BTF through this. */
const volatile struct sm_aside_request sm_aside_request_type = {};
const volatile struct sm_aside_dir sm_aside_dir_type = {};

/* The address of the socket with that key; 0: there is none. */
static __always_inline __u64 sm_find(struct sm_tuple *key)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&sm_pairs, key);
	__u64 at = (__u64)sk;

	if (sk)
		bpf_sk_release(sk);
	return at;
}

/* The same of a socket whose messages a program decides about. Nothing is ever redirected to a socket whose peer is not
 * such a one, neither by the peer nor past it: pkg/datapath/guard.go relies on that when it takes it out of sm_pairs. */
static __always_inline __u64 sm_find_deciding(struct sm_tuple *key)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&sm_pairs, key);
	struct tcp_sock *tp;
	__u64 at = 0;

	if (!sk)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp && sm_decides((struct sock *)tp))
		at = (__u64)tp;
	bpf_sk_release(sk);
	return at;
}

/* Is it known how much the socket has sent, and can its bytes be redirected (again)? It has gone over to TCP for no
 * other reason than that the proxy was slow. */
static __always_inline bool sm_is_countable(struct sm_sock *st)
{
	return st->tcp_counted && (st->latch != SM_PASS || st->reason == SM_WHY_SLOW_READER);
}

/* Does the socket's own slot still hold its token? Another may be given to it then only if the proxy has not used that one: it
 * was for bodies, all of which are over, and the proxy lends the connection to somebody else. */
static __always_inline bool sm_is_taken(struct sm_sock *st)
{
	__u32 slot = st->aside_slot;
	struct sm_aside_dir *dir;

	if (st->aside == SM_ASIDE_NONE)
		return false;
	dir = bpf_map_lookup_elem(&aside_slots, &slot);
	return st->aside == SM_ASIDE_ON || !dir || dir->token == st->aside_token;
}

static __always_inline __u8 sm_arm_socket(struct bpf_sock *sk, struct sm_aside_dir *dir, struct sm_tuple *far, __u64 token,
					  __u32 slot)
{
	struct sm_sock *st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	if (!st || !tp || st->state != SM_ENROLLED_STATE)
		return SM_ASIDE_NEAR_PLAIN;
	if (sm_is_taken(st))
		return SM_ASIDE_TAKEN;
	if (!sm_is_countable(st)) {
		st->aside_reason = SM_ASIDE_BY_TCP;
		return SM_ASIDE_BY_TCP;
	}
	if (!dir->relay || !sm_find(far)) {
		st->aside_reason = SM_ASIDE_FAR_PLAIN;
		return SM_ASIDE_FAR_PLAIN;
	}
	dir->carried = st->aside_bytes;
	st->route = *far;
	st->aside_slot = slot;
	st->aside_reason = SM_ASIDE_OK;
	/* Atomic, so that whoever sees it sees the rest. Nobody acts on it before the proxy sets the budget. */
	__sync_lock_test_and_set(&st->aside_token, token);
	__sync_lock_test_and_set(&st->aside, SM_ASIDE_ARMED);
	return SM_ASIDE_OK;
}

/* Arms one direction: near is its sender, relay the proxy's socket that writes it, far its receiver. */
static __always_inline __u8 sm_arm(struct sm_tuple *near, struct sm_tuple *relay, struct sm_tuple *far, __u64 token,
				   __u32 slot)
{
	struct sm_aside_dir *dir = bpf_map_lookup_elem(&aside_slots, &slot);
	struct bpf_sock *sk = bpf_map_lookup_elem(&sm_pairs, near);
	__u8 why = SM_ASIDE_NEAR_PLAIN;

	if (!sk)
		return why;
	if (dir) {
		dir->relay = sm_find_deciding(relay);
		why = sm_arm_socket(sk, dir, far, token, slot);
	}
	bpf_sk_release(sk);
	return why;
}

/* Returns why the client's direction is not armed, and in the next byte why the server's is not. */
SEC("tc")
int sm_step_aside(struct __sk_buff *skb)
{
	struct sm_aside_request *packet = (void *)(long)skb->data;
	struct sm_tuple down, up, client, server;
	__u64 token;
	__u32 slot;
	__u8 why;

	if ((void *)(packet + 1) > (void *)(long)skb->data_end)
		return -1;
	down = packet->down;
	up = packet->up;
	token = packet->token;
	slot = packet->slot;
	sm_mirror(&client, &down);
	sm_mirror(&server, &up);
	why = sm_arm(&client, &up, &server, token, slot);
	return why | (int)sm_arm(&server, &down, &client, token, slot + 1) << 8;
}
