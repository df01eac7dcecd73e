/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* getsockopt(SO_ORIGINAL_DST): what an iptables REDIRECT would have told a proxy that isn't ours. Attached only when
 * asked for, since a getsockopt hook costs every getsockopt of the node a copy and a program run. */
#include "maps.h"

static __always_inline struct sm_sock *sm_accepted(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sm_sock *st;

	if (!sk)
		return NULL;
	st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	return st && st->role == SM_ROLE_DOWNSTREAM ? st : NULL;
}

SEC("cgroup/getsockopt")
int sm_getsockopt(struct bpf_sockopt *ctx)
{
	struct sm_sock *st;
	struct sm_ip ip;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return SM_ALLOW;
	st = sm_accepted(ctx);
	if (!st)
		return SM_ALLOW;
	ip = sm_load(st->origin);

	if (ctx->level == SOL_IP) {
		struct sockaddr_in *sa = ctx->optval;

		if (!sm_is_v4(&ip) || (void *)(sa + 1) > ctx->optval_end)
			return SM_ALLOW;
		__builtin_memset(sa, 0, sizeof(*sa));
		sa->sin_family = AF_INET;
		sa->sin_port = bpf_htons(st->origin_port);
		sa->sin_addr.s_addr = ip.word[3];
		ctx->optlen = sizeof(*sa);
	} else {
		struct sockaddr_in6 *sa = ctx->optval;

		if (sm_is_v4(&ip) || (void *)(sa + 1) > ctx->optval_end)
			return SM_ALLOW;
		__builtin_memset(sa, 0, sizeof(*sa));
		sa->sin6_family = AF_INET6;
		sa->sin6_port = bpf_htons(st->origin_port);
		__builtin_memcpy(&sa->sin6_addr, &ip, sizeof(ip));
		ctx->optlen = sizeof(*sa);
	}
	ctx->retval = 0;
	return SM_ALLOW;
}
