/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* sendto() and recvfrom() of every process below the cgroup root: UDP with an address in each call. What is not for a
 * Service costs one look-up in sm_frontends.
 *
 * An AF_INET6 socket that sends to a v4-mapped address runs the IPv4 hook, and what it receives by IPv4 comes to the
 * IPv6 hook as a mapped address: as 16 bytes both are the same.
 */
#include "udp.h"

SEC("cgroup/sendmsg4")
int sm_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct sm_choice c = { .dest = { .ip = sm_mapped(ctx->user_ip4), .port = bpf_ntohs(ctx->user_port) } };

	switch (sm_choose_udp(ctx, &c, false)) {
	case SM_CHOICE_REFUSE:
		return sm_refuse();
	case SM_CHOICE_MOVED:
		ctx->user_ip4 = c.dest.ip.word[3];
		ctx->user_port = bpf_htons(c.dest.port);
	}
	return SM_ALLOW;
}

SEC("cgroup/sendmsg6")
int sm_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct sm_choice c = {};

	sm_read6(ctx, &c.dest);
	switch (sm_choose_udp(ctx, &c, false)) {
	case SM_CHOICE_REFUSE:
		return sm_refuse();
	case SM_CHOICE_MOVED:
		sm_write6(ctx, &c.dest);
	}
	return SM_ALLOW;
}

SEC("cgroup/recvmsg4")
int sm_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct sm_dest d = { .ip = sm_mapped(ctx->user_ip4), .port = bpf_ntohs(ctx->user_port) };

	if (sm_answered(ctx, &d)) {
		ctx->user_ip4 = d.ip.word[3];
		ctx->user_port = bpf_htons(d.port);
	}
	return SM_ALLOW;
}

SEC("cgroup/recvmsg6")
int sm_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct sm_dest d = {};

	sm_read6(ctx, &d);
	if (sm_answered(ctx, &d))
		sm_write6(ctx, &d);
	return SM_ALLOW;
}
