/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* How a Service address becomes a backend: by a draw over its slots or, with session affinity, the one that the client
 * had. Shared by everything that balances: connect() and sendmsg() inside, packets from outside.
 *
 * The caller copies the target out of its map and looks it up again where the answer is SM_PICK_STALE: slots are replaced
 * while they are read. What a caller needs is sm_find_frontend and sm_pick_for; who its client is, it says itself.
 */
#ifndef SM_PICK_H
#define SM_PICK_H

#include "maps.h"

/* An address with its port. */
struct sm_dest {
	struct sm_ip ip;
	__u16 port;
	__u16 pad; /* none by the compiler: what is handed to a global function has no bytes that nobody wrote */
};

static __always_inline struct sm_target *sm_find_frontend(const struct sm_dest *d, __u8 proto)
{
	struct sm_frontend_key key = { .port = d->port, .proto = proto };

	sm_store(key.addr, &d->ip);
	return bpf_map_lookup_elem(&sm_frontends, &key);
}

#define SM_PICKED 0
#define SM_PICK_REFUSE 1 /* nobody to send it to */
#define SM_PICK_STALE 2  /* the set of slots was replaced meanwhile: look again */

/* How often a set of slots that is being replaced is looked at again. */
#define SM_POOL_ATTEMPTS 4

/* Puts a backend's address into d; false: it is gone. */
static __always_inline bool sm_to_backend(__u32 id, struct sm_dest *d)
{
	struct sm_backend *backend = bpf_map_lookup_elem(&sm_backends, &id);

	if (!backend)
		return false;
	d->ip = sm_load(backend->addr);
	d->port = backend->port;
	return true;
}

/* Draws a backend and puts its address into d. */
static __always_inline int sm_pick(const struct sm_target *target, struct sm_dest *d, __u32 *backend_id)
{
	struct sm_slot_key key = { .pool = target->pool, .generation = target->generation };
	__u32 slots = target->slots;
	__u64 weight = target->weight;
	struct sm_slot *slot;
	__u32 id;

	if (!slots)
		return SM_PICK_REFUSE;
	key.slot = bpf_get_prandom_u32() % slots;
	slot = bpf_map_lookup_elem(&sm_slots, &key);
	if (!slot)
		return SM_PICK_STALE;
	id = slot->backend;
	if (weight > 1) {
		__u64 coin = ((__u64)bpf_get_prandom_u32() << 32) | bpf_get_prandom_u32();

		if (coin % weight >= slot->keep)
			id = slot->other;
	}
	if (!id)
		return SM_PICK_REFUSE;
	if (!sm_to_backend(id, d))
		return SM_PICK_STALE;
	*backend_id = id;
	return SM_PICKED;
}

/* Does the backend take new connections of the pool? Only pools with SM_TARGET_MEMBERS can be asked. */
static __always_inline bool sm_is_member(__u32 pool, __u32 backend)
{
	struct sm_member_key key = { .pool = pool, .backend = backend };

	return bpf_map_lookup_elem(&sm_members, &key);
}

/* An entry of sm_affinity changes as one word: nobody sees one client's backend with another one's time. */
union sm_affinity_word {
	struct sm_affinity is;
	__u64 word;
};

static __always_inline __u32 sm_seconds(void)
{
	return bpf_ktime_get_coarse_ns() / 1000000000;
}

/* Is what the client had still good? Then d is its address. Seconds are cut off, so a time-out comes up to one second late,
 * never early. A backend that is missing although it is a member is about to go: stale, not refused. */
static __always_inline bool sm_stays(const struct sm_target *target, const union sm_affinity_word *had, __u32 now,
				     struct sm_dest *d)
{
	return now - had->is.used <= target->affinity_seconds && sm_is_member(target->pool, had->is.backend) &&
	       sm_to_backend(had->is.backend, d);
}

/* The backend that this client had within the time-out, if it is still good; else a draw, which it then keeps. Of several
 * first connections at once all but one lose the exchange, and take what the winner drew.
 *
 * A global function, so that the verifier looks at it once in each program, not once for each way that leads here. That is
 * why it has to check its arguments. */
__noinline int sm_pick_sticky(struct sm_target *target, struct sm_ip *client, struct sm_dest *d, __u32 *backend_id)
{
	struct sm_affinity_key key = {};
	union sm_affinity_word had = {}, next = {};
	struct sm_affinity *entry;
	int picked;

	if (!target || !client || !d || !backend_id)
		return SM_PICK_REFUSE;
	key.pool = target->pool;
	*(struct sm_ip *)key.client = *client;
	next.is.used = sm_seconds();
	entry = bpf_map_lookup_elem(&sm_affinity, &key);
	if (entry) {
		had.word = *(volatile __u64 *)entry;
		if (sm_stays(target, &had, next.is.used, d)) {
			*backend_id = next.is.backend = had.is.backend;
			if (had.is.used != next.is.used) /* lost to somebody else's use: just as good */
				__sync_val_compare_and_swap((__u64 *)entry, had.word, next.word);
			return SM_PICKED;
		}
	}
	picked = sm_pick(target, d, backend_id);
	if (picked != SM_PICKED)
		return picked;
	next.is.backend = *backend_id;
	if (entry) {
		if (__sync_val_compare_and_swap((__u64 *)entry, had.word, next.word) == had.word)
			return SM_PICKED;
	} else {
		if (!bpf_map_update_elem(&sm_affinity, &key, &next.is, BPF_NOEXIST))
			return SM_PICKED;
		entry = bpf_map_lookup_elem(&sm_affinity, &key);
		if (!entry)
			return SM_PICKED; /* no room, or forgotten already */
	}
	had.word = *(volatile __u64 *)entry;
	if (sm_stays(target, &had, next.is.used, d)) {
		*backend_id = had.is.backend;
		return SM_PICKED;
	}
	return sm_to_backend(*backend_id, d) ? SM_PICKED : SM_PICK_STALE;
}

/* Picks a backend for the client and puts its address into d. The client only counts where the target has affinity. */
static __always_inline int sm_pick_for(struct sm_target *target, struct sm_ip *client, struct sm_dest *d,
				       __u32 *backend_id)
{
	if (!target->affinity_seconds)
		return sm_pick(target, d, backend_id);
	return sm_pick_sticky(target, client, d, backend_id);
}

/* A use of the backend that the client has: its time-out begins anew. */
static __always_inline void sm_refresh(const struct sm_target *target, const struct sm_ip *client, __u32 backend_id)
{
	struct sm_affinity_key key = { .pool = target->pool };
	union sm_affinity_word had, next = {};
	struct sm_affinity *entry;

	*(struct sm_ip *)key.client = *client;
	entry = bpf_map_lookup_elem(&sm_affinity, &key);
	if (!entry)
		return;
	had.word = *(volatile __u64 *)entry;
	next.is.used = sm_seconds();
	next.is.backend = backend_id;
	if (had.is.backend == backend_id && had.is.used != next.is.used)
		__sync_val_compare_and_swap((__u64 *)entry, had.word, next.word);
}

#endif
