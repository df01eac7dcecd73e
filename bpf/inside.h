/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the hooks on this node's sockets share, whatever their protocol: who the client is, how it is refused, what its
 * socket remembers.
 */
#ifndef SM_INSIDE_H
#define SM_INSIDE_H

#include "pick.h"
#include "socket.h"

/* Set by the loader after a real attempt: bpf_set_retval came with 5.18. Without it a refusal reads EPERM. */
const volatile bool sm_has_set_retval = false;

static __always_inline int sm_deny(int errno)
{
	if (sm_has_set_retval)
		bpf_set_retval(-errno);
	return SM_DENY;
}

static __always_inline int sm_refuse(void)
{
	return sm_deny(ECONNREFUSED);
}

/* Node ports on loopback are for sockets of the host's own network namespace: anybody else's loopback is their own. */
static __always_inline bool sm_serves_loopback(struct bpf_sock_addr *ctx, const struct sm_config *cfg)
{
	return cfg->flags & SM_LOOPBACK_PORTS && bpf_get_netns_cookie(ctx) == cfg->host_netns;
}

/* A client inside is its network namespace: at connect time there is no source address yet. */
static __always_inline struct sm_ip sm_client_inside(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct sm_ip client = { .word = { cookie, cookie >> 32 } };

	return client;
}

static __always_inline int sm_pick_inside(struct bpf_sock_addr *ctx, struct sm_target *target, struct sm_dest *d,
					  __u32 *backend_id)
{
	struct sm_ip client;

	if (!target->affinity_seconds)
		return sm_pick(target, d, backend_id);
	client = sm_client_inside(ctx);
	return sm_pick_sticky(target, &client, d, backend_id);
}

#define SM_CHOICE_LEAVE 0  /* no Service: the address stays */
#define SM_CHOICE_MOVED 1  /* dest is the backend's */
#define SM_CHOICE_REFUSE 2 /* the Service has no backends */

/* An address, and what becomes of it. */
struct sm_choice {
	struct sm_dest dest;
	__u32 pool;
	__u32 backend;
};

/* Where a TCP connection to an address goes, if that is a Service's. Global for the verifier's sake: see sm_pick_sticky. */
__noinline int sm_choose_tcp(struct bpf_sock_addr *ctx, struct sm_choice *c)
{
	struct sm_target *found, target;
	struct sm_dest front;
	int i, picked;

	if (!c)
		return SM_CHOICE_LEAVE;
	front = c->dest;
	for (i = 0; i < SM_POOL_ATTEMPTS; i++) {
		found = sm_find_frontend(&front, IPPROTO_TCP);
		if (!found)
			break;
		target = *found;
		picked = sm_pick_inside(ctx, &target, &c->dest, &c->backend);
		if (picked == SM_PICK_REFUSE) {
			SM_COUNT(refused);
			return SM_CHOICE_REFUSE;
		}
		if (picked == SM_PICKED) {
			SM_COUNT(service);
			c->pool = target.pool;
			return SM_CHOICE_MOVED;
		}
		SM_COUNT(pool_retries);
	}
	c->dest = front;
	return SM_CHOICE_LEAVE;
}

/* What the socket has to remember. Reused when a socket connects again. */
static __always_inline struct sm_sock *sm_remember(struct bpf_sock *sk, __u8 role, const struct sm_dest *origin)
{
	struct sm_sock *st = bpf_sk_storage_get(&sm_sock, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!st) {
		SM_COUNT(storage_failed);
		return NULL;
	}
	__builtin_memset(st, 0, sizeof(*st));
	st->role = role;
	if (origin) {
		sm_store(st->origin, &origin->ip);
		st->origin_port = origin->port;
	}
	return st;
}

/* A connection that stays what the caller asked for. A socket that was translated before must forget it. */
static __always_inline int sm_leave(struct bpf_sock *sk)
{
	struct sm_sock *st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);

	if (st)
		__builtin_memset(st, 0, sizeof(*st));
	return SM_ALLOW;
}

static __always_inline void sm_read6(const struct bpf_sock_addr *ctx, struct sm_dest *d)
{
	d->ip.word[0] = ctx->user_ip6[0];
	d->ip.word[1] = ctx->user_ip6[1];
	d->ip.word[2] = ctx->user_ip6[2];
	d->ip.word[3] = ctx->user_ip6[3];
	d->port = bpf_ntohs(ctx->user_port);
}

static __always_inline void sm_write6(struct bpf_sock_addr *ctx, const struct sm_dest *d)
{
	ctx->user_ip6[0] = d->ip.word[0];
	ctx->user_ip6[1] = d->ip.word[1];
	ctx->user_ip6[2] = d->ip.word[2];
	ctx->user_ip6[3] = d->ip.word[3];
	ctx->user_port = bpf_htons(d->port);
}

#endif
