/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A sender that never pauses is always ahead of the proxy, which has twice its work: there is no moment in which nothing
 * of its direction is under way, and so none in which it can be handed over (aside.h). So at some messages the sender
 * waits for the proxy. It waits inside the kernel, with its socket locked, and keeps its processor: little, and only
 * where the wait is likely to end well.
 *
 * What makes it end well: the sender calls the proxy. It leaves the number of its direction at the desk of the
 * proxy's loop, and the loop looks there between any two pieces of work and serves that direction until nothing is
 * left of it (pkg/proxy/loop/calls.go). So what has to be waited for is what is under way of this one direction, not of
 * all that the loop carries. Nobody else pays more than that look.
 *
 * What is under way is known, so a wait is only begun where there is time enough for that much, and goes on only while
 * the proxy is seen to work: the bytes that it has forwarded grow, or its loop shows that it has heard and is busy with
 * others. If neither is so, its thread has no processor (perhaps it waits for this one), and the wait is in vain.
 * The first wait of a direction is more patient: it may outlast the turn of another thread on the proxy's processor.
 * A direction's waits together take no more than SM_WAIT_ALL and, in the long run, 1/SM_WAIT_SHARE of the time;
 * dir->rested is when a direction that has waited for so long would have begun to rest from it. */
#ifndef SM_PATIENCE_H
#define SM_PATIENCE_H

#include "backlog.h"

#define SM_WAIT_BYTE 2                   /* ns; the proxy moves more than 500 MB/s */
#define SM_WAIT_MESSAGE (20 * 1000ull)   /* ns */
#define SM_WAIT_ALL (4 * 1000 * 1000ull) /* ns */
#define SM_WAIT_SHARE 8
#define SM_WAIT_MOST (4 << 20)           /* bytes under way */
#define SM_WAIT_STILL (200 * 1000ull)    /* ns without a sign of the proxy */
#define SM_WAIT_FIRST (3 * 1000 * 1000ull) /* the same of the first wait */
/* As often as there are desks. A constant number of looks is what a verifier of any kernel accepts. */
#define SM_WAIT_LOOKS 128

/* The same before the proxy has asked for the sender's bytes: see sm_await_proxy. */
#define SM_AHEAD_STILL SM_WAIT_ALL /* the proxy may have to accept it first, and to connect to the server */

struct sm_wait {
	__u64 sent;
	__u64 limit; /* ns */
	__u64 began;
	__u64 now;
	__u64 seen;  /* what the proxy had done when it was last seen to work, */
	__u64 moved; /* which was then */
	struct sm_sock *st;
	__u32 slot;
	__u32 desk;
	__u32 beat;
	__u32 still; /* ns without a sign of the proxy */
};

static __always_inline bool sm_is_patient(void)
{
	struct sm_config *cfg = sm_configuration();

	return cfg && cfg->flags & SM_PATIENT;
}

/* Time passes, and the memory that is shared is left alone. Four times, so that so many looks take long enough. */
static __always_inline __u64 sm_pass_time(void)
{
	bpf_ktime_get_ns();
	bpf_ktime_get_ns();
	bpf_ktime_get_ns();
	return bpf_ktime_get_ns();
}

/* Some looks at the proxy; 1: that's enough. */
static long sm_look(void *map, __u32 *key, struct sm_aside_desk *unused, struct sm_wait *w)
{
	__u32 slot = w->slot, at = w->desk;
	struct sm_aside_dir *dir = bpf_map_lookup_elem(&aside_slots, &slot);
	volatile struct sm_aside_desk *desk = bpf_map_lookup_elem(&aside_desks, &at);
	__u64 forwarded;
	int i;

	if (!dir || !desk)
		return 1;
	for (i = 0; i < SM_WAIT_LOOKS; i++) {
		forwarded = *(volatile __u64 *)&dir->forwarded;
		if (forwarded == w->sent)
			return 1;
		if (!desk->call)
			desk->call = slot + 1;
		if (forwarded != w->seen || desk->beat != w->beat) {
			w->seen = forwarded;
			w->beat = desk->beat;
			w->moved = w->now;
		}
		w->now = sm_pass_time();
		if (w->now - w->began >= w->limit || w->now - w->moved >= w->still)
			return 1;
	}
	return 0;
}

/* Waits for the proxy to have forwarded as much as the sender has sent. A global function, which the verifier looks at once and not
 * on every path that leads here. */
__noinline int sm_await(__u32 slot, __u64 sent)
{
	struct sm_aside_dir *dir = bpf_map_lookup_elem(&aside_slots, &slot);
	struct sm_wait w = { .sent = sent, .slot = slot };
	struct sm_aside_desk *desk;
	__u64 under_way;

	if (!dir || !sm_is_patient())
		return 0;
	under_way = sent - dir->forwarded;
	if (under_way > SM_WAIT_MOST)
		return 0;
	w.desk = dir->desk;
	desk = bpf_map_lookup_elem(&aside_desks, &w.desk);
	if (!desk)
		return 0;
	w.limit = SM_WAIT_MESSAGE + SM_WAIT_BYTE * under_way;
	if (!dir->rested)
		w.limit = SM_WAIT_ALL;
	if (w.limit > SM_WAIT_ALL)
		w.limit = SM_WAIT_ALL;
	w.now = w.moved = w.began = bpf_ktime_get_ns();
	w.still = dir->rested ? SM_WAIT_STILL : SM_WAIT_FIRST;
	if (dir->rested + SM_WAIT_SHARE * SM_WAIT_ALL < w.began)
		dir->rested = w.began - SM_WAIT_SHARE * SM_WAIT_ALL;
	if (dir->rested + SM_WAIT_SHARE * w.limit > w.began)
		return 0;
	w.seen = dir->forwarded;
	w.beat = desk->beat;
	bpf_for_each_map_elem(&aside_desks, sm_look, &w, 0);
	dir->rested += SM_WAIT_SHARE * (w.now - w.began);
	/* If the loop has not heard it: it need not come any more. */
	__sync_val_compare_and_swap(&desk->call, slot + 1, 0);
	return 0;
}

/* Calls without waiting: the proxy takes all at once that waits in its socket, so that what waits here comes there, and may
 * have caught up before the next message. */
static __always_inline void sm_call(struct sm_aside_dir *dir, __u32 slot)
{
	__u32 at = dir->desk;
	volatile struct sm_aside_desk *desk = bpf_map_lookup_elem(&aside_desks, &at);

	if (desk && !desk->call)
		desk->call = slot + 1;
}

/* Has the proxy forwarded all that the sender has sent? unsent: TCP has not even passed it on, and won't while the sender
 * holds its socket. */
static __always_inline bool sm_caught_up(struct sm_aside_dir *dir, __u32 slot, __u64 sent, bool unsent)
{
	/* An atomic read: what it says must be true of everything that is read after it. */
	if (__sync_fetch_and_add(&dir->forwarded, 0) == sent)
		return true;
	if (unsent) {
		sm_call(dir, slot);
		return false;
	}
	sm_await(slot, sent);
	return __sync_fetch_and_add(&dir->forwarded, 0) == sent;
}

/* Some looks at the proxy's queue; 1: that's enough. */
static long sm_look_ahead(void *map, __u32 *key, struct sm_aside_desk *unused, struct sm_wait *w)
{
	struct sm_sock *st = w->st;
	__u32 backlog;
	int i;

	for (i = 0; i < SM_WAIT_LOOKS; i++) {
		backlog = 0;
		if (*(volatile __u32 *)&st->aside != SM_ASIDE_NONE || !sm_backlog((struct sock *)st->aside_far, &backlog) || !backlog)
			return 1;
		if (backlog != w->seen) {
			w->seen = backlog;
			w->moved = w->now;
		}
		w->now = sm_pass_time();
		if (w->now - w->began >= w->limit || w->now - w->moved >= SM_AHEAD_STILL)
			return 1;
	}
	return 0;
}

/* A sender that sends much at once is a long way ahead before the proxy has as much as asked for its bytes, and then goes by
 * TCP, with megabytes of its own under way. So it waits, once in its life, for the proxy to ask, or to have read them all. */
static __always_inline void sm_await_proxy(struct sm_sock *st)
{
	struct sm_wait w = { .st = st, .limit = SM_WAIT_ALL };

	st->ahead = SM_AHEAD_ONCE;
	if (st->aside != SM_ASIDE_NONE || !sm_is_patient())
		return;
	w.now = w.moved = w.began = bpf_ktime_get_ns();
	bpf_for_each_map_elem(&aside_desks, sm_look_ahead, &w, 0);
}

#endif
