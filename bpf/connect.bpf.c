/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* connect() and getpeername() of every process below the cgroup root.
 *
 * connect decides once where a connection goes: to the proxy in the caller's own network namespace, to an endpoint
 * of an offloaded listener, to a backend of a Service, or wherever the caller said. Everything after that is
 * ordinary TCP, with no cost per packet. getpeername tells the caller the address that it asked for.
 */
#include "listener.h"
#include "udp.h"

/* The most specific claim: the address itself, then its port on any address, then whatever is left. */
static __always_inline struct sm_target *sm_find_claim(const struct sm_dest *d, __u32 flags)
{
	struct sm_claim_key key = { .port = d->port };
	struct sm_target *t;

	if (flags & SM_CLAIMS_EXACT) {
		sm_store(key.addr, &d->ip);
		t = bpf_map_lookup_elem(&sm_claims, &key);
		if (t)
			return t;
	}
	if (!(flags & (SM_CLAIMS_PORT | SM_CLAIMS_CATCHALL)))
		return NULL;
	__builtin_memset(key.addr, 0, sizeof(key.addr));
	if (sm_is_v4(&d->ip))
		key.addr[10] = key.addr[11] = 0xff;
	if (flags & SM_CLAIMS_PORT) {
		t = bpf_map_lookup_elem(&sm_claims, &key);
		if (t)
			return t;
	}
	if (!(flags & SM_CLAIMS_CATCHALL))
		return NULL;
	key.port = 0;
	return bpf_map_lookup_elem(&sm_claims, &key);
}

/* Whether the connecting socket may be enrolled: SM_WANTED, or SM_PLAIN with the reason. netns is 0 for the proxy. */
static __always_inline __u8 sm_wants(struct bpf_sock *sk, const struct sm_config *cfg, __u64 netns, __u32 netns_flags,
				     __u8 *reason)
{
	if (!(cfg->flags & SM_ACCELERATE)) {
		*reason = SM_WHY_OFF;
		return SM_PLAIN;
	}
	if (sm_is_mptcp(sk)) {
		*reason = SM_WHY_MPTCP;
		SM_COUNT(skipped_mptcp);
		return SM_PLAIN;
	}
	if (!(netns_flags & SM_BLOCKING_OK) && sm_is_blocking(sk)) {
		*reason = SM_WHY_BLOCKING;
		SM_COUNT(skipped_blocking);
		return SM_PLAIN;
	}
	if (netns && sm_app_splices(netns, bpf_get_current_cgroup_id(), 0)) {
		*reason = SM_WHY_SPLICE;
		return SM_PLAIN;
	}
	return SM_WANTED;
}

static __always_inline struct sm_local *sm_find_local(const struct sm_ip *ip)
{
	struct sm_local_key key;

	sm_store(key.addr, ip);
	return bpf_map_lookup_elem(&sm_local, &key);
}

/* The connection goes to the pod itself, translated or not: can both ends be enrolled? Marks the socket so that
 * sockops need only look into its storage. */
static __always_inline void sm_prepare_direct(struct bpf_sock *sk, const struct sm_config *cfg, bool proxy,
					      __u64 netns, __u32 netns_flags, const struct sm_dest *origin,
					      const struct sm_dest *to, struct sm_sock *st)
{
	struct sm_local *local;
	__u8 reason = SM_WHY_NONE, state = SM_PLAIN;

	local = sm_find_local(&to->ip);
	if (!local)
		reason = SM_WHY_REMOTE;
	else if (!proxy && !(local->flags & SM_ENROLLED))
		return;
	else if (local->netns && sm_app_splices(local->netns, 0, to->port))
		reason = SM_WHY_PEER_SPLICES;
	else
		state = sm_wants(sk, cfg, proxy ? 0 : netns, proxy ? SM_BLOCKING_OK : netns_flags, &reason);
	if (!st)
		st = sm_remember(sk, proxy ? SM_ROLE_UPSTREAM : SM_ROLE_POD_CLIENT, origin);
	else if (proxy)
		st->role = SM_ROLE_UPSTREAM;
	if (!st)
		return;
	st->state = state;
	st->reason = reason;
}

/* Sends the connection to the listener of the proxy in the caller's netns. */
static __always_inline int sm_to_proxy(struct bpf_sock *sk, const struct sm_config *cfg, __u64 netns,
				       __u32 netns_flags, struct sm_dest *d)
{
	struct sm_sock *st = sm_remember(sk, SM_ROLE_CLIENT, d);

	if (!st)
		return SM_DENY; /* out of memory: without the origin the proxy could only guess */
	st->netns = netns;
	st->state = sm_wants(sk, cfg, netns, netns_flags, &st->reason);
	if (sm_is_v4(&d->ip)) {
		d->ip = sm_mapped(bpf_htonl(0x7f000001));
	} else {
		__builtin_memset(&d->ip, 0, sizeof(d->ip));
		d->ip.word[3] = bpf_htonl(1);
	}
	d->port = cfg->proxy_port;
	SM_COUNT(proxied);
	return SM_ALLOW;
}

#define SM_CHOICE_PROXY 3

/* Whether a listener claims a connection: then it goes to the proxy, or to an endpoint of an offloaded listener. Global for
 * the verifier's sake: see sm_pick_sticky. */
__noinline int sm_choose_claim(struct sm_choice *c, __u32 flags)
{
	struct sm_target *found, target;
	struct sm_dest origin;
	int i, picked;

	if (!c)
		return SM_CHOICE_LEAVE;
	origin = c->dest;
	/* What was found may be replaced while it's being used, even by another kind: then decide anew. */
	for (i = 0; i < SM_POOL_ATTEMPTS; i++) {
		found = sm_find_claim(&origin, flags);
		if (!found)
			break;
		target = *found;
		if (target.mode == SM_MODE_PROXY)
			return SM_CHOICE_PROXY;
		picked = sm_pick(&target, &c->dest, &c->backend);
		if (picked == SM_PICK_REFUSE) {
			SM_COUNT(refused);
			return SM_CHOICE_REFUSE;
		}
		if (picked == SM_PICKED) {
			SM_COUNT(offloaded);
			return SM_CHOICE_MOVED;
		}
		SM_COUNT(pool_retries);
	}
	return SM_CHOICE_LEAVE;
}

/* The whole decision. Changes d where the connection is to go elsewhere. */
static __always_inline int sm_connect(struct bpf_sock_addr *ctx, struct sm_dest *d)
{
	struct sm_dest origin = *d;
	struct sm_choice choice = {};
	struct bpf_sock *sk = ctx->sk;
	struct sm_config *cfg;
	struct sm_netns *netns = NULL;
	struct sm_sock *st = NULL;
	__u32 netns_flags = 0, flags;
	__u64 cookie = 0;
	bool proxy = false;

	if (!sk)
		return SM_ALLOW;
	if (ctx->protocol == IPPROTO_UDP)
		return sm_connect_udp(ctx, d);
	if (ctx->protocol != IPPROTO_TCP)
		return SM_ALLOW;
	if (sm_is_link_local6(&d->ip))
		return sm_leave(sk);
	cfg = sm_configuration();
	if (!cfg)
		return SM_ALLOW;
	flags = cfg->flags;
	if (sm_is_loopback(&d->ip)) {
		if (!sm_serves_loopback(ctx, cfg))
			return sm_leave(sk);
		goto service; /* node ports are all that can be there */
	}

	proxy = sm_is_ours(sk);
	/* A socket tied to a device can't reach the proxy on loopback. */
	if (!proxy && !sk->bound_dev_if && flags & (SM_CLAIMS_EXACT | SM_CLAIMS_PORT | SM_CLAIMS_CATCHALL | SM_ACCELERATE_PODS)) {
		cookie = bpf_get_netns_cookie(ctx);
		netns = bpf_map_lookup_elem(&sm_netns, &cookie);
		if (netns)
			netns_flags = netns->flags;
	}

	if (netns_flags & SM_ENROLLED) {
		choice.dest = origin;
		switch (sm_choose_claim(&choice, flags)) {
		case SM_CHOICE_PROXY:
			if (sm_proxy_listens(ctx, sm_is_v4(&d->ip), cfg))
				return sm_to_proxy(sk, cfg, cookie, netns_flags, d);
			if (flags & SM_FAIL_CLOSED) {
				SM_COUNT(fail_closed);
				return sm_refuse();
			}
			SM_COUNT(fail_open);
			break;
		case SM_CHOICE_REFUSE:
			return sm_refuse();
		case SM_CHOICE_MOVED:
			*d = choice.dest;
			st = sm_remember(sk, SM_ROLE_OFFLOAD, &origin);
			if (st)
				st->backend = choice.backend;
			goto direct;
		}
	}
service:
	if (flags & SM_SERVICES) {
		choice.dest = origin;
		switch (sm_choose_tcp(ctx, &choice)) {
		case SM_CHOICE_REFUSE:
			return sm_refuse();
		case SM_CHOICE_MOVED:
			*d = choice.dest;
			st = sm_remember(sk, SM_ROLE_SERVICE, &origin);
			if (st) {
				st->backend = choice.backend;
				st->pool = choice.pool;
			}
			goto direct;
		}
	}

	sm_leave(sk);
	if (netns_flags & SM_ENROLLED)
		SM_COUNT(passed);
direct:
	if (proxy && flags & SM_ACCELERATE)
		sm_prepare_direct(sk, cfg, true, 0, 0, NULL, d, st);
	else if (flags & SM_ACCELERATE_PODS && netns_flags & SM_ENROLLED)
		sm_prepare_direct(sk, cfg, false, cookie, netns_flags, NULL, d, st);
	return SM_ALLOW;
}

SEC("cgroup/connect4")
int sm_connect4(struct bpf_sock_addr *ctx)
{
	struct sm_dest d = { .ip = sm_mapped(ctx->user_ip4), .port = bpf_ntohs(ctx->user_port) };
	int verdict = sm_connect(ctx, &d);

	if (d.ip.word[3] != ctx->user_ip4)
		ctx->user_ip4 = d.ip.word[3];
	if (d.port != bpf_ntohs(ctx->user_port))
		ctx->user_port = bpf_htons(d.port);
	return verdict;
}

SEC("cgroup/connect6")
int sm_connect6(struct bpf_sock_addr *ctx)
{
	struct sm_dest d = {};
	int verdict;

	sm_read6(ctx, &d);
	verdict = sm_connect(ctx, &d);
	if (d.ip.word[0] != ctx->user_ip6[0] || d.ip.word[1] != ctx->user_ip6[1] || d.ip.word[2] != ctx->user_ip6[2] ||
	    d.ip.word[3] != ctx->user_ip6[3] || d.port != bpf_ntohs(ctx->user_port))
		sm_write6(ctx, &d);
	return verdict;
}

/* The address that a connecting socket asked for; NULL if it got just that. */
static __always_inline struct sm_sock *sm_asked_for(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sm_sock *st;

	if (!sk)
		return NULL;
	st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	if (!st || !st->origin_port || st->role == SM_ROLE_DOWNSTREAM)
		return NULL;
	return st;
}

SEC("cgroup/getpeername4")
int sm_getpeer4(struct bpf_sock_addr *ctx)
{
	struct sm_sock *st = sm_asked_for(ctx);
	struct sm_ip ip;

	if (!st)
		return SM_ALLOW;
	ip = sm_load(st->origin);
	ctx->user_ip4 = ip.word[3];
	ctx->user_port = bpf_htons(st->origin_port);
	return SM_ALLOW;
}

SEC("cgroup/getpeername6")
int sm_getpeer6(struct bpf_sock_addr *ctx)
{
	struct sm_sock *st = sm_asked_for(ctx);
	struct sm_ip ip;

	if (!st)
		return SM_ALLOW;
	ip = sm_load(st->origin);
	ctx->user_ip6[0] = ip.word[0];
	ctx->user_ip6[1] = ip.word[1];
	ctx->user_ip6[2] = ip.word[2];
	ctx->user_ip6[3] = ip.word[3];
	ctx->user_port = bpf_htons(st->origin_port);
	return SM_ALLOW;
}
