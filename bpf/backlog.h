/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* How much a receiver of redirected messages has left unread, and how much is too much.
 *
 * A redirected message is queued at the receiver with no limit but the machine's (tcp_mem), since nothing of TCP's
 * windows applies. So the sender looks at that queue every now and then, and where too much lies unread the direction
 * goes on by a way that stops the sender: by TCP, or back through the proxy if it has skipped that.
 *
 * Towards the proxy the limit is backlog_limit. Towards an application it is HARD_FACTOR times that while the machine
 * has memory to spare: on many kernels FIONREAD of an enrolled socket counts redirected bytes only (kernel.md 7), so
 * an application that trusts it may stall once its bytes come by TCP. The proxy doesn't ask.
 *
 * The queue's length is known in bytes; what a message costs beside its bytes is not, so it's estimated by the smallest
 * mean size of a window of messages since the queue was last seen empty. */
#ifndef SM_BACKLOG_H
#define SM_BACKLOG_H

#include "socket.h"

#define SM_MESSAGE_COST 1024 /* a struct sk_msg and the slack of its pages */
#define SM_WINDOW_COST (64 * 1024)
#define SM_HARD_FACTOR 16

/* struct sm_sock.ahead: the sender has sent so much before the proxy has asked for its bytes: see patience.h. */
enum sm_ahead {
	SM_AHEAD_NOT,
	SM_AHEAD_NOW,
	SM_AHEAD_ONCE, /* and has waited */
};

#define SM_AHEAD_BYTES (512 * 1024)

/* The receiver of this message, which has just been redirected. */
static __always_inline struct sock *sm_receiver(struct sk_msg_md *msg)
{
	struct sk_msg *kernel = (struct sk_msg *)msg; /* what the context really is */

	return BPF_CORE_READ(kernel, sk_redir);
}

/* The redirected bytes that a receiver has not read. */
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

/* Counts a message that has just been redirected and tells whether its receiver, an application or the proxy, has too
 * much unread. */
static __always_inline bool sm_overfull(struct sk_msg_md *msg, struct sm_sock *st, __u32 size, bool application)
{
	struct sm_config *cfg;
	__u32 backlog, mean;
	__u64 cost, limit;
	struct sock *peer;

	st->window_bytes += size;
	st->window_messages++;
	if (st->window_bytes + st->window_messages * SM_MESSAGE_COST < SM_WINDOW_COST)
		return false;
	mean = st->window_bytes / st->window_messages;
	st->window_bytes = 0;
	st->window_messages = 0;
	peer = sm_receiver(msg);
	if (!peer || !sm_backlog(peer, &backlog))
		return false;
	if (!backlog) {
		st->smallest_mean = 0;
		return false;
	}
	if (!application && backlog >= SM_AHEAD_BYTES && st->ahead == SM_AHEAD_NOT && st->aside == SM_ASIDE_NONE) {
		st->aside_far = (__u64)peer;
		st->ahead = SM_AHEAD_NOW;
	}
	if (!mean)
		mean = 1;
	if (!st->smallest_mean || mean < st->smallest_mean)
		st->smallest_mean = mean;
	cost = backlog + (__u64)backlog * SM_MESSAGE_COST / st->smallest_mean;
	cfg = sm_configuration();
	limit = cfg ? cfg->backlog_limit : 0;
	if (!limit || cost <= limit)
		return false;
	return !application || cost > limit * SM_HARD_FACTOR || sm_memory_is_short(peer);
}

/* Another receiver: what was known of the last one's queue is void. */
static __always_inline void sm_forget_backlog(struct sm_sock *st)
{
	st->window_bytes = 0;
	st->window_messages = 0;
	st->smallest_mean = 0;
}

#endif
