/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The proxy steps aside: a direction's bytes go from the sending application's socket straight to the receiving one's,
 * past both of the proxy's sockets, until one of them ends.
 *
 * A direction, say from client to server: client -> [downstream  proxy  upstream] -> server. The proxy has asked for it
 * (aside.bpf.c armed the client's socket) and shows, in memory that it shares with us, how many of the client's bytes
 * its upstream socket has taken. What was redirected is in the receiver's queue when the sender's sendmsg returns. So
 * at a message of the client before which it has sent exactly that many bytes, nothing of the direction is under way,
 * neither in the downstream socket's queue nor in the proxy, and this message may follow at once; else it goes to the
 * proxy like all before it, and the next one is looked at. No message needs a system call of the proxy.
 *
 * What the receiver got by TCP, because the upstream socket went over to TCP for a while, it must have read: redirected
 * bytes would overtake it. Its copied_seq is the upstream socket's write_seq then.
 *
 * The way back is always in order, since what skipped the proxy is in the receiver's queue already: bytes that go to
 * the proxy come behind it. It is taken when the receiver leaves too much unread (and left again when it has caught
 * up), or its application splices. When one of the two connections has ended the direction goes by TCP, which has
 * the right answer: if the proxy is gone the sender is reset, as it would have been without us.
 *
 * That the far socket is still the one that was meant, and not another under the same addresses and ports, follows from
 * this: its peer, the proxy's far socket, holds them as long as it is open; before the proxy closes it, it takes the
 * token away; and if the proxy was killed, then its near socket, whose addresses the sender itself holds, is not in
 * sm_pairs any more when the sender has got its FIN.
 *
 * The same for the body of a single message, after which the direction is the proxy's again: body.h. */
#ifndef SM_ASIDE_H
#define SM_ASIDE_H

#include "body.h"
#include "pairs.h"
#include "patience.h"

static __always_inline bool sm_redirect(struct sk_msg_md *msg, struct sm_tuple *peer)
{
	return bpf_msg_redirect_hash(msg, &sm_pairs, peer, BPF_F_INGRESS) == SK_PASS;
}

/* Is somebody seen to splice the socket with that key? */
static __always_inline struct sm_spliced *sm_find_spliced(struct sm_tuple *key)
{
	__u32 zero = 0, *any = bpf_map_lookup_elem(&sm_splicing, &zero);

	if (!any || !*any)
		return NULL;
	return bpf_map_lookup_elem(&sm_spliced, key);
}

/* Can the socket still get bytes? Not after its peer's FIN. */
static __always_inline bool sm_receives(struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	return state == BPF_TCP_ESTABLISHED || state == BPF_TCP_FIN_WAIT1 || state == BPF_TCP_FIN_WAIT2;
}

/* Has the application read all that has come by TCP from the socket relay? */
static __always_inline bool sm_read_all(struct sock *sk, struct sock *relay)
{
	struct tcp_sock *to = (struct tcp_sock *)sk, *from = (struct tcp_sock *)relay;

	return BPF_CORE_READ(to, copied_seq) == BPF_CORE_READ(from, write_seq);
}

/* Has the receiver so little unread, of what it may have, that it pays to begin? */
static __always_inline bool sm_has_room(struct sock *sk)
{
	struct sm_config *cfg = sm_configuration();
	__u32 backlog = 0;

	if (!cfg || !sm_backlog(sk, &backlog))
		return false;
	return backlog <= cfg->backlog_limit / 4 || (backlog <= cfg->backlog_limit / 4 * SM_HARD_FACTOR && !sm_memory_is_short(sk));
}

/* The bytes that the sender has sent to the proxy. What a TCP send has really taken is in write_seq alone. */
static __always_inline __u64 sm_sent_to_proxy(struct bpf_sock *sk, struct sm_sock *st)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	if (!tp)
		return ~0ull;
	st->aside_tcp_bytes += (__u32)(tp->write_seq - st->aside_tcp_seq);
	st->aside_tcp_seq = tp->write_seq;
	return st->redirected_bytes - st->aside_bytes + st->aside_tcp_bytes;
}

/* Does anything of what the sender has sent still wait in its own queue, because the other end's window is full? */
static __always_inline bool sm_unsent(struct bpf_sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	return !tp || tp->snd_nxt != tp->write_seq;
}

static __always_inline void sm_aside_over(struct sm_sock *st, __u8 why)
{
	st->aside = SM_ASIDE_OVER;
	st->aside_reason = why;
}

/* One of the two connections has ended. */
static __always_inline void sm_aside_ended(struct sm_sock *st, __u8 why)
{
	sm_aside_over(st, why);
	st->latch = SM_PASS;
	st->reason = SM_WHY_PEER_GONE;
	SM_COUNT(peer_gone);
}

/* An application's socket that was non-blocking when it connected begins to send. */
static __always_inline void sm_note_blocking(struct bpf_sock *sk, struct sm_sock *st)
{
	if (st->role == SM_ROLE_CLIENT && sm_is_blocking(sk))
		SM_COUNT(turned_blocking);
}

/* Counts connections, of which either direction may be the first. */
static __always_inline void sm_count_aside(__u32 slot)
{
	struct sm_aside_dir *first;

	slot &= ~1u;
	first = bpf_map_lookup_elem(&aside_slots, &slot);
	if (first && !__sync_fetch_and_or(&first->seen, 1))
		SM_COUNT(stepped_aside);
}

/* Armed: tries to begin with this message. True: it goes straight to the far socket; false: it goes where it would have
 * gone, except that a direction that had been slow may be redirected again (latch). */
static __always_inline bool sm_aside_begin(struct sk_msg_md *msg, struct bpf_sock *sk, struct sm_sock *st,
					   struct sm_aside_dir *dir, struct sm_tuple *peer, bool patient)
{
	struct sm_tuple far;
	struct sock *to;

	/* The token once more: what was read is this direction's. */
	if (!sm_caught_up(dir, st->aside_slot, sm_sent_to_proxy(sk, st), !patient || sm_unsent(sk)) || dir->token != st->aside_token)
		return false;
	if (!sm_redirect(msg, peer))
		return false;
	/* The proxy has read everything, so this may be redirected, whatever way its predecessors took. */
	if (st->latch == SM_UNDECIDED)
		sm_note_blocking(sk, st);
	if (st->latch == SM_PASS)
		st->reason = SM_WHY_NONE;
	st->latch = SM_REDIRECT;
	far = st->route;
	if (sm_find_spliced(&far)) {
		sm_aside_over(st, SM_ASIDE_SPLICES);
		return false;
	}
	if (!sm_redirect(msg, &far)) {
		sm_aside_over(st, SM_ASIDE_FAR_GONE);
		return false;
	}
	to = sm_receiver(msg);
	if (to && sm_receives(to) && sm_read_all(to, (struct sock *)dir->relay) && sm_has_room(to)) {
		st->aside_far = (__u64)to;
		st->aside = SM_ASIDE_ON;
		st->aside_reason = SM_ASIDE_OK;
		sm_forget_backlog(st);
		SM_COUNT(aside_directions);
		return true;
	}
	sm_redirect(msg, peer);
	return false;
}

/* On: goes on, if both ends of the way are what they were. */
static __always_inline bool sm_aside_go_on(struct sk_msg_md *msg, struct bpf_sock *sk, struct sm_sock *st,
					   struct sm_tuple *peer)
{
	struct sm_tuple far;

	/* The other end has sent its FIN: on behalf of the far application, or because the proxy is gone. */
	if (sk->state == BPF_TCP_CLOSE_WAIT && !sm_redirect(msg, peer)) {
		sm_aside_ended(st, SM_ASIDE_ENDED);
		return false;
	}
	far = st->route;
	if (sm_find_spliced(&far)) {
		sm_aside_over(st, SM_ASIDE_SPLICES);
		return false;
	}
	if (!sm_receives((struct sock *)st->aside_far) || !sm_redirect(msg, &far)) {
		sm_aside_ended(st, SM_ASIDE_FAR_GONE);
		return false;
	}
	return true;
}

/* From how many bytes on the rest of a body is worth waiting for the proxy. */
#define SM_WAIT_WORTH (256 * 1024ull)

/* Decides about a message of a socket whose connection, or body, the proxy has handed over. True: it was sent straight to
 * the far socket, at least its beginning, and is accounted for. */
static __always_inline bool sm_step_past(struct sk_msg_md *msg, struct bpf_sock *sk, struct sm_sock *st,
					 struct sm_tuple *peer, __u32 size)
{
	__u32 slot = st->aside_slot, whole = size;
	struct sm_aside_dir *dir = bpf_map_lookup_elem(&aside_slots, &slot);
	__u64 budget, at, left = SM_NO_BUDGET;
	bool first = st->aside == SM_ASIDE_ARMED;

	if (!dir)
		return false;
	/* An atomic read, before that of the token: see body.h. */
	budget = __sync_fetch_and_add(&dir->budget, 0);
	if (dir->token != st->aside_token) {
		if (st->aside == SM_ASIDE_ON)
			sm_aside_ended(st, SM_ASIDE_ENDED);
		return false;
	}
	if (budget != SM_NO_BUDGET) {
		at = sm_sent_to_proxy(sk, st) + st->aside_bytes;
		if (at >= budget)
			return false;
		left = budget - at;
	}
	if (first ? !sm_aside_begin(msg, sk, st, dir, peer, left >= SM_WAIT_WORTH) : !sm_aside_go_on(msg, sk, st, peer))
		return false;
	if (budget != SM_NO_BUDGET) {
		if (sm_may_be_refused(st->aside_far)) {
			st->aside = SM_ASIDE_ARMED;
			st->aside_reason = SM_ASIDE_MEMORY;
			if (!first)
				SM_COUNT(aside_returned);
			return false;
		}
		st->aside_rest = 0;
		if (size > left) {
			size = left;
			bpf_msg_apply_bytes(msg, size);
			st->aside_rest = whole - size;
		}
		st->aside_part = 1;
		if (dir->seen != (__u32)budget) {
			dir->seen = budget;
			SM_COUNT(aside_bodies);
		}
		SM_COUNT_BYTES(aside_messages, aside_body_bytes, size);
	} else {
		if (first)
			sm_count_aside(slot);
		SM_COUNT(aside_messages);
	}
	st->redirected_bytes += size;
	st->aside_bytes += size;
	SM_COUNT_BYTES(redirected_messages, redirected_bytes, size);
	SM_ADD(aside_bytes, size);
	dir->carried = st->aside_bytes;
	dir->last = bpf_ktime_get_coarse_ns();
	if (size < whole) {
		st->aside = SM_ASIDE_ARMED; /* the rest can't go by TCP, even if the receiver is slow */
	} else if (sm_overfull(msg, st, size, true)) {
		st->aside = SM_ASIDE_ARMED;
		st->aside_reason = SM_ASIDE_SLOW_READER;
		/* By TCP, which stops the sender while the proxy waits for the receiver. */
		st->latch = SM_PASS;
		st->reason = SM_WHY_SLOW_READER;
		sm_forget_backlog(st);
		SM_COUNT(aside_returned);
	} else if (size == left) {
		st->aside = SM_ASIDE_ARMED; /* for the next body, if its receiver has everything then */
	}
	return true;
}

#endif
