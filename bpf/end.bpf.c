/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Ends sockets whose backend is gone: the agent names them by cookie in sm_doomed, enters their network namespace and reads
 * one of these iterators, which see that namespace alone. bpf_sock_destroy came with 6.5; before, the agent asks
 * sock_diag.
 */
#include "maps.h"

int bpf_sock_destroy(struct sock_common *sk) __ksym;

static __always_inline bool sm_is_doomed(struct sock_common *sk)
{
	__u64 cookie = bpf_get_socket_cookie(sk);

	return bpf_map_lookup_elem(&sm_doomed, &cookie) && !bpf_map_delete_elem(&sm_doomed, &cookie);
}

SEC("iter/tcp")
int sm_end_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;

	if (sk && sm_is_doomed(sk))
		bpf_sock_destroy(sk);
	return 0;
}

SEC("iter/udp")
int sm_end_udp(struct bpf_iter__udp *ctx)
{
	struct sock_common *sk = (struct sock_common *)ctx->udp_sk;

	if (sk && sm_is_doomed(sk))
		bpf_sock_destroy(sk);
	return 0;
}
