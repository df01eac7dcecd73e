/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The proxy's listener in a pod, as connect() and bind() look for it. */
#ifndef SM_LISTENER_H
#define SM_LISTENER_H

#include "inside.h"
#include "socket.h"

/* Does the proxy listen in the caller's network namespace? Whoever else holds its port there is not asked, unless the agent
 * was told that it may be another's proxy. */
static __always_inline bool sm_proxy_listens(struct bpf_sock_addr *ctx, bool v4, const struct sm_config *cfg)
{
	__u16 port = cfg->proxy_port;
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size;
	bool listens;

	if (v4) {
		tuple.ipv4.saddr = bpf_htonl(0x7f000001);
		tuple.ipv4.daddr = bpf_htonl(0x7f000001);
		tuple.ipv4.sport = bpf_htons(1);
		tuple.ipv4.dport = bpf_htons(port);
		size = sizeof(tuple.ipv4);
	} else {
		tuple.ipv6.saddr[3] = bpf_htonl(1);
		tuple.ipv6.daddr[3] = bpf_htonl(1);
		tuple.ipv6.sport = bpf_htons(1);
		tuple.ipv6.dport = bpf_htons(port);
		size = sizeof(tuple.ipv6);
	}
	sk = bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	listens = sk->state == BPF_TCP_LISTEN && (cfg->flags & SM_FOREIGN || sm_is_ours(sk));
	bpf_sk_release(sk);
	return listens;
}

#endif
