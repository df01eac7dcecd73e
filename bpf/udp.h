/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Where a UDP socket's datagrams go, and whom their answers come from.
 *
 * A socket's datagrams to one Service address, its flow, go to one backend for as long as that one takes traffic,
 * whether the socket is connected or not: QUIC and TFTP are conversations. The moment the backend stops being a member of
 * the Service's pool the next datagram goes elsewhere: no socket stays pinned to a dead one. Answers are shown under the
 * Service's address, those that come late from an earlier backend too.
 *
 * Flows stand in the socket's storage (sm_udp), which dies with it, under a lock: threads share sockets, and half of one
 * address with half of another must never be used. What finds no room there, and the backends of before, stand in
 * sm_udp_more by the socket's cookie, which is never used again.
 *
 * Where answers are ambiguous the latest use decides: of two Service addresses with one backend, the one that was
 * sent to last; and whoever sends to a backend's own address sees its answers under that.
 */
#ifndef SM_UDP_H
#define SM_UDP_H

#include "inside.h"

static __always_inline bool sm_same(const __u8 *addr, __u16 port, const struct sm_dest *d)
{
	struct sm_ip ip = sm_load(addr);

	return port == d->port && ip.word[3] == d->ip.word[3] && ip.word[2] == d->ip.word[2] &&
	       ip.word[1] == d->ip.word[1] && ip.word[0] == d->ip.word[0];
}

static __always_inline void sm_more_key(struct bpf_sock_addr *ctx, const __u8 *addr, __u16 port, __u8 answers,
					struct sm_udp_key *key)
{
	struct sm_ip ip = sm_load(addr);

	__builtin_memset(key, 0, sizeof(*key));
	key->cookie = bpf_get_socket_cookie(ctx);
	key->port = port;
	key->answers = answers;
	sm_store(key->addr, &ip);
}

static __always_inline struct sm_udp_flow *sm_find_more(struct bpf_sock_addr *ctx, const struct sm_dest *d, __u8 answers)
{
	struct sm_udp_key key;

	sm_more_key(ctx, (const __u8 *)&d->ip, d->port, answers, &key);
	return bpf_map_lookup_elem(&sm_udp_more, &key);
}

/* The socket's flow to a Service address, as a copy; a use of it. */
static __always_inline bool sm_find_flow(struct bpf_sock_addr *ctx, struct sm_udp *udp, const struct sm_dest *front,
					 struct sm_udp_flow *flow)
{
	struct sm_udp_flow *more;
	struct sm_udp_key key;
	bool found = false, spilled;
	__u32 use;
	int i;

	bpf_spin_lock(&udp->lock);
	use = ++udp->uses;
	spilled = udp->spilled;
	for (i = 0; i < SM_UDP_FLOWS; i++) {
		struct sm_udp_flow *f = &udp->flows[i];

		if (!f->front_port || !sm_same(f->front, f->front_port, front))
			continue;
		f->used = use;
		f->direct = 0;
		*flow = *f;
		found = true;
		break;
	}
	bpf_spin_unlock(&udp->lock);
	if (found || !spilled)
		return found;
	more = sm_find_more(ctx, front, 0);
	if (!more)
		return false;
	*flow = *more;
	if (!sm_same(flow->front, flow->front_port, front))
		return false; /* the LRU gave its place to another one while we read it */
	flow->used = use;
	sm_more_key(ctx, flow->addr, flow->port, 1, &key);
	bpf_map_update_elem(&sm_udp_more, &key, flow, BPF_ANY);
	return true;
}

/* Puts what is in one flow into the other and the other way round, without a third one on the stack. */
static __always_inline void sm_swap(struct sm_udp_flow *a, struct sm_udp_flow *b)
{
	__u32 *x = (__u32 *)a, *y = (__u32 *)b, z;
	int i;

#pragma unroll
	for (i = 0; i < sizeof(*a) / sizeof(z); i++) {
		z = x[i];
		x[i] = y[i];
		y[i] = z;
	}
}

/* Notes where the socket's datagrams to front, which is flow->front, go from now on. Spoils flow. Global, so that its stack
 * is its own. */
__noinline int sm_keep_flow(struct bpf_sock_addr *ctx, struct sm_dest *front, struct sm_udp_flow *flow)
{
	struct bpf_sock *sk = ctx->sk;
	struct sm_udp_key key;
	struct sm_udp *udp;
	bool kept = false;
	int i;

	if (!sk || !front || !flow)
		return 0;
	udp = bpf_sk_storage_get(&sm_udp, sk, 0, 0);
	if (!udp)
		return 0;
	bpf_spin_lock(&udp->lock);
	flow->used = ++udp->uses;
	for (i = 0; i < SM_UDP_FLOWS; i++) {
		struct sm_udp_flow *f = &udp->flows[i];

		if (f->front_port && !sm_same(f->front, f->front_port, front))
			continue;
		sm_swap(f, flow);
		kept = true;
		break;
	}
	if (flow->front_port)
		udp->spilled = 1;
	bpf_spin_unlock(&udp->lock);
	if (!flow->front_port)
		return 0; /* there was room */
	/* Now flow is the backend of before, which may answer yet, or the one that found no room. */
	sm_more_key(ctx, flow->addr, flow->port, 1, &key);
	bpf_map_update_elem(&sm_udp_more, &key, flow, BPF_ANY);
	if (kept)
		return 0;
	sm_more_key(ctx, flow->front, flow->front_port, 0, &key);
	bpf_map_update_elem(&sm_udp_more, &key, flow, BPF_ANY);
	return 0;
}

/* The socket sends to an address that is no Service's, or connects to it. If it is that of a backend, its answers are its own
 * from now on. Not so where the kernel itself names the backend: an AF_INET6 socket that is connected to a v4-mapped
 * address comes through the IPv4 sendmsg hook with every write(), under the address that connect() put in. */
static __always_inline void sm_go_direct(struct bpf_sock_addr *ctx, const struct sm_dest *d, bool connecting)
{
	struct bpf_sock *sk = ctx->sk;
	struct sm_udp *udp = bpf_sk_storage_get(&sm_udp, sk, 0, 0);
	__u32 pool = 0, backend = 0;
	struct sm_udp_key key;
	struct sm_sock *st;
	bool spilled;
	int i;

	if (!udp)
		return;
	if (!connecting && sk->state == BPF_TCP_ESTABLISHED) {
		st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
		if (st && st->role == SM_ROLE_SERVICE) {
			pool = st->pool;
			backend = st->backend;
		}
	}
	bpf_spin_lock(&udp->lock);
	spilled = udp->spilled;
	for (i = 0; i < SM_UDP_FLOWS; i++) {
		struct sm_udp_flow *f = &udp->flows[i];

		if (f->front_port && sm_same(f->addr, f->port, d) && (!pool || f->pool != pool || f->backend != backend))
			f->direct = 1;
	}
	bpf_spin_unlock(&udp->lock);
	if (!spilled)
		return;
	sm_more_key(ctx, (const __u8 *)&d->ip, d->port, 1, &key);
	bpf_map_delete_elem(&sm_udp_more, &key);
}

/* Puts the Service's address in the place of the backend's that a datagram came from; false: it is nobody's backend. */
static __always_inline bool sm_answered(struct bpf_sock_addr *ctx, struct sm_dest *d)
{
	struct bpf_sock *sk = ctx->sk;
	struct sm_udp_flow *more, late;
	struct sm_dest front = {};
	struct sm_udp *udp;
	bool found = false, spilled;
	__u32 used = 0;
	int i;

	if (!sk)
		return false;
	udp = bpf_sk_storage_get(&sm_udp, sk, 0, 0);
	if (!udp)
		return false;
	bpf_spin_lock(&udp->lock);
	spilled = udp->spilled;
	for (i = 0; i < SM_UDP_FLOWS; i++) {
		struct sm_udp_flow *f = &udp->flows[i];

		if (!f->front_port || f->direct || !sm_same(f->addr, f->port, d))
			continue;
		if (found && (__s32)(f->used - used) < 0)
			continue;
		found = true;
		used = f->used;
		front.ip = sm_load(f->front);
		front.port = f->front_port;
	}
	bpf_spin_unlock(&udp->lock);
	if (spilled) {
		more = sm_find_more(ctx, d, 1);
		if (more) {
			late = *more;
			if (sm_same(late.addr, late.port, d) && (!found || (__s32)(late.used - used) > 0)) {
				found = true;
				front.ip = sm_load(late.front);
				front.port = late.front_port;
			}
		}
	}
	if (found)
		*d = front;
	return found;
}

/* Where a UDP socket's datagrams to an address go, if that is a Service's. Global for the verifier's sake: see
 * sm_pick_sticky. */
__noinline int sm_choose_udp(struct bpf_sock_addr *ctx, struct sm_choice *c, int connecting)
{
	struct sm_config *cfg = sm_configuration();
	struct bpf_sock *sk = ctx->sk;
	struct sm_target *found, target;
	struct sm_udp_flow flow = {};
	struct sm_dest front;
	struct sm_udp *udp;
	struct sm_ip client;
	bool known;
	int i, picked;

	if (!c || !sk || !cfg || !(cfg->flags & SM_SERVICES) || ctx->protocol != IPPROTO_UDP)
		return SM_CHOICE_LEAVE;
	front = c->dest;
	if (sm_is_loopback(&front.ip) && !sm_serves_loopback(ctx, cfg))
		return SM_CHOICE_LEAVE;
	found = sm_find_frontend(&front, IPPROTO_UDP);
	if (!found) {
		sm_go_direct(ctx, &front, connecting);
		return SM_CHOICE_LEAVE;
	}
	udp = bpf_sk_storage_get(&sm_udp, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!udp)
		SM_COUNT(storage_failed); /* the datagram gets there; its answer shows the backend */
	known = udp && sm_find_flow(ctx, udp, &front, &flow);
	for (i = 0; i < SM_POOL_ATTEMPTS && found; i++) {
		target = *found;
		if (known && flow.pool == target.pool && sm_is_member(target.pool, flow.backend)) {
			c->dest.ip = sm_load(flow.addr);
			c->dest.port = flow.port;
			c->pool = flow.pool;
			c->backend = flow.backend;
			if (target.affinity_seconds) {
				client = sm_client_inside(ctx);
				sm_refresh(&target, &client, flow.backend);
			}
			return SM_CHOICE_MOVED;
		}
		picked = sm_pick_inside(ctx, &target, &c->dest, &c->backend);
		if (picked == SM_PICK_REFUSE) {
			SM_COUNT(refused);
			return SM_CHOICE_REFUSE;
		}
		if (picked == SM_PICKED)
			break;
		SM_COUNT(pool_retries);
		found = sm_find_frontend(&front, IPPROTO_UDP);
	}
	if (!found || i == SM_POOL_ATTEMPTS) {
		c->dest = front;
		return SM_CHOICE_LEAVE;
	}
	SM_COUNT(service);
	if (known)
		SM_COUNT(udp_repicked);
	c->pool = target.pool;
	__builtin_memset(&flow, 0, sizeof(flow));
	sm_store(flow.front, &front.ip);
	flow.front_port = front.port;
	sm_store(flow.addr, &c->dest.ip);
	flow.port = c->dest.port;
	flow.pool = target.pool;
	flow.backend = c->backend;
	sm_keep_flow(ctx, &front, &flow);
	return SM_CHOICE_MOVED;
}

/* connect() of a UDP socket: the kernel sends there from now on without asking, so the socket says what it is tied to,
 * for whoever has to end it when the backend is gone (pkg/datapath/endings.go). */
static __always_inline int sm_connect_udp(struct bpf_sock_addr *ctx, struct sm_dest *d)
{
	struct sm_choice choice = { .dest = *d };
	struct sm_dest front = *d;
	struct sm_sock *st;

	switch (sm_choose_udp(ctx, &choice, true)) {
	case SM_CHOICE_LEAVE:
		return sm_leave(ctx->sk);
	case SM_CHOICE_REFUSE:
		return sm_refuse();
	}
	*d = choice.dest;
	st = sm_remember(ctx->sk, SM_ROLE_SERVICE, &front);
	if (st) {
		st->backend = choice.backend;
		st->pool = choice.pool;
	}
	return SM_ALLOW;
}

#endif
