/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Both ends of a connection, read from the contexts of sockops and sk_msg. */
#ifndef SM_PAIRS_H
#define SM_PAIRS_H

#include "maps.h"

/* A context field at its fixed offset. vmlinux.h declares the contexts relocatable like any kernel struct, but they are
 * ABI, and the relocated form indexes arrays through a computed pointer, which the verifier refuses on a context.
 * Volatile keeps clang from merging the reads of two branches into such a pointer again. */
#define SM_FIELD(ctx, field)                                                                       \
	(*(volatile __u32 *)((void *)(ctx) + __builtin_offsetof(typeof(*(ctx)), field)))
#define SM_WORDS(ctx, field)                                                                       \
	{                                                                                          \
		.word = { SM_FIELD(ctx, field[0]), SM_FIELD(ctx, field[1]),                        \
			  SM_FIELD(ctx, field[2]), SM_FIELD(ctx, field[3]) }                       \
	}

/* The kernel gives local_port in host order and remote_port in network order, in 32 bits each: a key built without
 * turning the second one never matches. AF_INET6 sockets may carry v4-mapped addresses, which is what AF_INET
 * addresses become here. A macro, since the two contexts are different types with the same fields. */
#define SM_TUPLE(ctx, t)                                                                           \
	({                                                                                         \
		struct sm_ip l_ = SM_WORDS(ctx, local_ip6);                                      \
		struct sm_ip r_ = SM_WORDS(ctx, remote_ip6);                                     \
		__u32 l4_ = SM_FIELD(ctx, local_ip4), r4_ = SM_FIELD(ctx, remote_ip4);         \
		if ((ctx)->family == AF_INET) {                                                    \
			l_ = sm_mapped(l4_);                                                       \
			r_ = sm_mapped(r4_);                                                       \
		}                                                                                  \
		sm_store((t)->local, &l_);                                                         \
		sm_store((t)->remote, &r_);                                                        \
		(t)->local_port = (ctx)->local_port;                                               \
		(t)->remote_port = bpf_ntohl((ctx)->remote_port);                                  \
		(t)->pad = 0;                                                                      \
		(t)->netns = sm_is_loopback(&l_) || sm_is_loopback(&r_) ?                          \
				     bpf_get_netns_cookie(ctx) : 0;                                \
	})

/* The same connection as the other end sees it. */
static __always_inline void sm_mirror(struct sm_tuple *to, const struct sm_tuple *from)
{
	__builtin_memcpy(to->local, from->remote, sizeof(to->local));
	__builtin_memcpy(to->remote, from->local, sizeof(to->remote));
	to->netns = from->netns;
	to->local_port = from->remote_port;
	to->remote_port = from->local_port;
	to->pad = 0;
}

#endif
