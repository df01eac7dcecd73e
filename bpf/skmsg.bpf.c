/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Every message that an enrolled socket sends: straight into the other end's receive queue, or by TCP.
 *
 * Decided at the first message of a direction and never changed for the better: the receiver drains redirected bytes
 * before those that came by TCP, so a direction that began by TCP has to go on by TCP, else bytes swap. The other
 * way round is safe, and happens when the other end has closed: TCP answers then as it always does.
 * bpf_msg_redirect_hash says SK_DROP where the other end is not in the map; that must never be returned, because
 * the application would read EACCES.
 */
#include "pairs.h"
#include "socket.h"

static __always_inline bool sm_redirect(struct sk_msg_md *msg, struct sm_tuple *peer)
{
	return bpf_msg_redirect_hash(msg, &sm_pairs, peer, BPF_F_INGRESS) == SK_PASS;
}

/* The other end isn't there. If it is still on its way, tell it not to come: its inbound bytes take TCP. If it can't
 * come, so be it. If it arrived between our two looks, all is well after all. */
static __always_inline bool sm_peer_absent(struct sk_msg_md *msg, struct sm_sock *st, struct sm_tuple *self,
					   struct sm_tuple *peer)
{
	struct sm_origin *note = bpf_map_lookup_elem(&sm_origin, self);
	__u32 claim = SM_TAKEN;

	if (note)
		claim = __sync_val_compare_and_swap(&note->claim, SM_OPEN, SM_LATE);
	if (claim == SM_OPEN) {
		st->reason = SM_WHY_LATE;
		SM_COUNT(late);
		return true;
	}
	if (claim == SM_REFUSED) {
		st->reason = SM_WHY_PEER_PLAIN;
		bpf_map_delete_elem(&sm_origin, self);
		return true;
	}
	if (sm_redirect(msg, peer))
		return false;
	st->reason = SM_WHY_PEER_MISSING;
	SM_COUNT(peer_missing);
	return true;
}

/* A redirected message is queued at the receiver with no limit but the machine's (tcp_mem), since nothing of TCP's
 * windows applies. So the sender looks at that queue every now and then, and where too much lies unread the direction
 * goes on by TCP, which stops the sender. One-way, as every change of the latch.
 *
 * Towards the proxy the limit is backlog_limit. Towards an application it is HARD_FACTOR times that while the machine
 * has memory to spare: on many kernels FIONREAD of an enrolled socket counts redirected bytes only (kernel.md 7), so
 * an application that trusts it may stall once its bytes come by TCP. The proxy doesn't ask.
 *
 * The queue's length is known in bytes; what a message costs beside its bytes is not, so it's estimated by the smallest
 * mean size of a window of messages since the queue was last seen empty. */
#define SM_MESSAGE_COST 1024 /* a struct sk_msg and the slack of its pages */
#define SM_WINDOW_COST (64 * 1024)
#define SM_HARD_FACTOR 16

/* The bytes that the receiver of this message, which has just been redirected, has not read. */
static __always_inline bool sm_backlog(struct sock *peer, __u32 *bytes)
{
	struct sk_psock *psock = NULL;

	if (!bpf_core_field_exists(psock->msg_tot_len))
		return false;
	psock = sm_psock(peer);
	if (!psock)
		return false;
	*bytes = BPF_CORE_READ(psock, msg_tot_len);
	return true;
}

/* Has TCP taken half of what it may take before it feels pressure? */
static __always_inline bool sm_memory_is_short(struct sock *peer)
{
	struct proto *prot = BPF_CORE_READ(peer, __sk_common.skc_prot);
	long allocated = BPF_CORE_READ(prot, memory_allocated, counter), low = 0;

	bpf_probe_read_kernel(&low, sizeof(low), BPF_CORE_READ(prot, sysctl_mem));
	return allocated * 2 > low;
}

static __always_inline void sm_watch_backlog(struct sk_msg_md *msg, struct sm_sock *st, __u32 size)
{
	struct sk_msg *kernel = (struct sk_msg *)msg; /* what the context really is */
	struct sm_config *cfg;
	__u32 backlog, mean;
	__u64 cost, limit;
	struct sock *peer;

	st->window_bytes += size;
	st->window_messages++;
	if (st->window_bytes + st->window_messages * SM_MESSAGE_COST < SM_WINDOW_COST)
		return;
	mean = st->window_bytes / st->window_messages;
	st->window_bytes = 0;
	st->window_messages = 0;
	peer = BPF_CORE_READ(kernel, sk_redir);
	if (!peer || !sm_backlog(peer, &backlog))
		return;
	if (!backlog) {
		st->smallest_mean = 0;
		return;
	}
	if (!mean)
		mean = 1;
	if (!st->smallest_mean || mean < st->smallest_mean)
		st->smallest_mean = mean;
	cost = backlog + (__u64)backlog * SM_MESSAGE_COST / st->smallest_mean;
	cfg = sm_configuration();
	limit = cfg ? cfg->backlog_limit : 0;
	if (!limit || cost <= limit)
		return;
	if (st->role != SM_ROLE_CLIENT && st->role != SM_ROLE_SERVER && cost <= limit * SM_HARD_FACTOR &&
	    !sm_memory_is_short(peer))
		return;
	st->latch = SM_PASS; /* from the next message on */
	st->reason = SM_WHY_SLOW_READER;
	SM_COUNT(slow_reader);
}

/* The other end's application splices and would never see what is redirected to it (splice.bpf.c). Go on by TCP, but
 * never past bytes that it has not read: what comes by TCP would overtake them. Then the agent ends the connection. */
static __always_inline bool sm_peer_splices(struct sm_tuple *peer)
{
	__u32 zero = 0, *any = bpf_map_lookup_elem(&sm_splicing, &zero);
	struct sm_spliced *spliced;

	if (!any || !*any)
		return false;
	spliced = bpf_map_lookup_elem(&sm_spliced, peer);
	return spliced && !sm_unread((struct sock *)spliced->sk);
}

SEC("sk_msg")
int sm_msg(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct sm_tuple self, peer;
	struct sm_sock *st;
	__u32 size = msg->size;

	if (!sk)
		return SK_PASS;
	st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	if (!st)
		return SK_PASS;
	if (st->latch == SM_PASS)
		goto pass;
	/* After its own shutdown(SHUT_WR), or a reset, a socket can't send: TCP has the errno. */
	if (sk->state != BPF_TCP_ESTABLISHED && sk->state != BPF_TCP_CLOSE_WAIT)
		return SK_PASS;

	SM_TUPLE(msg, &self);
	sm_mirror(&peer, &self);
	if (sm_peer_splices(&peer)) {
		st->latch = SM_PASS;
		st->reason = SM_WHY_PEER_SPLICES;
		goto pass;
	}
	if (!sm_redirect(msg, &peer)) {
		if (st->latch == SM_REDIRECT) {
			st->reason = SM_WHY_PEER_GONE;
			SM_COUNT(peer_gone);
			st->latch = SM_PASS;
			goto pass;
		}
		if (sm_peer_absent(msg, st, &self, &peer)) {
			st->latch = SM_PASS;
			goto pass;
		}
	}
	if (st->latch == SM_UNDECIDED) {
		st->latch = SM_REDIRECT;
		if (st->role == SM_ROLE_CLIENT && sm_is_blocking(sk))
			SM_COUNT(turned_blocking);
	}
	st->redirected_bytes += size;
	SM_COUNT_BYTES(redirected_messages, redirected_bytes, size);
	sm_watch_backlog(msg, st, size);
	return SK_PASS;
pass:
	st->passed_bytes += size;
	SM_COUNT_BYTES(passed_messages, passed_bytes, size);
	return SK_PASS;
}
