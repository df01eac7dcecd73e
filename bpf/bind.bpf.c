/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* bind(): the proxy's port in a pod is the proxy's.
 *
 * The listeners in a pod have SO_REUSEPORT, so that an agent can take over from another. The kernel lets a socket join
 * such a group only if its user is the same; but a pod's root usually is the agent's user, and every socket of the group
 * gets its share of the pod's connections. So while a listener of the agent is there, nobody else may bind its port.
 * For every other port this is one comparison. Where the proxy may be another's (SM_FOREIGN), its port is anybody's.
 */
#include "listener.h"

static __always_inline int sm_bind(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sm_config *cfg;

	if (ctx->protocol != IPPROTO_TCP || !sk)
		return SM_ALLOW;
	cfg = sm_configuration();
	if (!cfg || bpf_ntohs(ctx->user_port) != cfg->proxy_port || cfg->flags & SM_FOREIGN || sm_is_ours(sk))
		return SM_ALLOW;
	if (!sm_proxy_listens(ctx, true, cfg) && !sm_proxy_listens(ctx, false, cfg))
		return SM_ALLOW;
	SM_COUNT(bind_refused);
	return sm_deny(EADDRINUSE);
}

SEC("cgroup/bind4")
int sm_bind4(struct bpf_sock_addr *ctx)
{
	return sm_bind(ctx);
}

SEC("cgroup/bind6")
int sm_bind6(struct bpf_sock_addr *ctx)
{
	return sm_bind(ctx);
}
