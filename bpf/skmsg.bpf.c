/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Every message that an enrolled socket sends: straight into the other end's receive queue, or by TCP.
 *
 * Decided at the first message of a direction and not changed for the better: the receiver drains redirected bytes
 * before those that came by TCP, so a direction that began by TCP has to go on by TCP, else bytes swap. The other
 * way round is safe, and happens when the other end has closed: TCP answers then as it always does. The exception is a
 * direction of which it is known that all its bytes have been read: aside.h, which is also where bytes skip the proxy.
 * bpf_msg_redirect_hash says SK_DROP where the other end is not in the map; that must never be returned, because
 * the application would read EACCES.
 */
#include "aside.h"

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

/* The other end's application splices and would never see what is redirected to it (splice.bpf.c). Go on by TCP, but
 * never past bytes that it has not read: what comes by TCP would overtake them. Then the agent ends the connection. */
static __always_inline bool sm_peer_splices(struct sm_tuple *peer)
{
	struct sm_spliced *spliced = sm_find_spliced(peer);

	return spliced && !sm_unread((struct sock *)spliced->sk);
}

/* May this direction, which goes by TCP because its reader was slow, come back from that? Only if the reader has read
 * everything: with nothing that came by TCP unread or under way, nothing can be overtaken. Of a direction that is handed over
 * the proxy tells that: aside.h. */
static __always_inline bool sm_may_recover(struct bpf_sock *sk, struct sm_sock *st)
{
	struct sock *reader = (struct sock *)st->aside_far;
	struct tcp_sock *tp;

	if (st->reason != SM_WHY_SLOW_READER)
		return false;
	if (st->aside == SM_ASIDE_ARMED)
		return true;
	tp = bpf_skc_to_tcp_sock(sk);
	return st->aside == SM_ASIDE_NONE && reader && tp && sm_receives(reader) && sm_read_all(reader, (struct sock *)tp) &&
	       !sm_unread(reader);
}

SEC("sk_msg")
int sm_msg(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct sm_tuple self, peer;
	struct sm_sock *st;
	__u32 size = msg->size;
	bool rest = false;

	if (!sk)
		return SK_PASS;
	st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	if (!st)
		return SK_PASS;
	if (st->aside_part)
		rest = sm_body_rest(msg, st);
	if (st->latch == SM_PASS && !sm_may_recover(sk, st))
		goto pass;
	/* After its own shutdown(SHUT_WR), or a reset, a socket can't send: TCP has the errno. */
	if (sk->state != BPF_TCP_ESTABLISHED && sk->state != BPF_TCP_CLOSE_WAIT)
		return rest ? SK_DROP : SK_PASS;

	SM_TUPLE(msg, &self);
	sm_mirror(&peer, &self);
	if (st->ahead == SM_AHEAD_NOW)
		sm_await_proxy(st);
	if (st->aside == SM_ASIDE_ARMED || st->aside == SM_ASIDE_ON) {
		if (sm_step_past(msg, sk, st, &peer, size))
			return SK_PASS;
		if (st->latch == SM_PASS)
			goto pass;
	}
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
	if (st->latch == SM_UNDECIDED)
		sm_note_blocking(sk, st);
	if (st->latch == SM_PASS)
		st->reason = SM_WHY_NONE;
	st->latch = SM_REDIRECT;
	st->redirected_bytes += size;
	SM_COUNT_BYTES(redirected_messages, redirected_bytes, size);
	if (sm_overfull(msg, st, size, st->role != SM_ROLE_CLIENT && st->role != SM_ROLE_SERVER)) {
		st->latch = SM_PASS; /* from the next message on */
		st->reason = SM_WHY_SLOW_READER;
		if (st->aside == SM_ASIDE_NONE)
			st->aside_far = (__u64)sm_receiver(msg);
		sm_forget_backlog(st);
		SM_COUNT(slow_reader);
	}
	return SK_PASS;
pass:
	/* The rest of a message that was carried: passing it would send it after its beginning, to the far socket (body.h). The
	 * sender hears that only the beginning was sent, and what it sends next goes by TCP. */
	if (rest)
		return SK_DROP;
	sm_sent_to_proxy(sk, st);
	st->passed_bytes += size;
	SM_COUNT_BYTES(passed_messages, passed_bytes, size);
	return SK_PASS;
}
