/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The body of one message skips the proxy; the next message is the proxy's again.
 *
 * What aside.h says of a direction holds here up to a position: the budget, in bytes that the sender has sent altogether,
 * by whatever way. The proxy, which has read the head and knows the body's length, sets it to the body's end less one byte.
 * A message that reaches beyond is cut there (bpf_msg_apply_bytes), and what is cut off gets a verdict of its own: to the
 * proxy. So the body's last byte wakes the proxy, which finds the count of what was carried in the shared memory, and
 * whatever follows in the same message, a pipelined request, is the proxy's, too. One slot stays with a pair of
 * connections for many bodies; for each the proxy stores where its bytes count from and then the budget.
 *
 * Why no byte behind the budget, of the next message or of another client's, can go to this body's receiver:
 *
 *   - A sender's messages are decided about one after the other, under its lock, and each at the position where it begins.
 *     What begins at the budget or behind it does nothing here; what begins before it is cut.
 *   - The proxy changes nothing that a decision depends on, neither "forwarded", nor the budget, nor, to lend the
 *     connection to somebody else, slot, token and route, before it has received the byte at the budget, or else it closes
 *     both connections. That byte left after all before it were decided about. So while something changes, no message
 *     that begins before the budget is in the program or will ever be, and those behind it look at nothing but the budget.
 *   - It raises the budget last. Who sees the new one, by an atomic read, sees the rest; and he reads the token after
 *     it: the budget of a slot that has meanwhile been given to somebody else is not taken for his own.
 *
 * That the count is right matters more than for a whole connection: a byte that is counted and has not arrived would make the
 * proxy take the next message's first byte for this one's last. A receiver that gets no more memory takes a part of a
 * message, or nothing, and the kernel tells the sender, but nobody tells us. Of a part the rest comes here for another
 * verdict (sm_body_rest). For nothing there is no sign, so no body is carried while that could be: sm_may_be_refused. */
#ifndef SM_BODY_H
#define SM_BODY_H

#include "backlog.h"

/* Is it possible that the socket's kernel refuses it memory for that many bytes? TCP as a whole is far from where it begins
 * to, and so is every cgroup that the socket's memory is charged to, or the answer is yes. A global function, which the verifier looks
 * at once and not on every path that leads here. */
#define SM_CGROUP_DEPTH 12
#define SM_CGROUP_SPARE (4096ull) /* pages */

__noinline int sm_may_be_refused(__u64 receiver)
{
	struct sock *sk = (struct sock *)receiver;
	struct page_counter *charged;
	struct mem_cgroup *memcg;
	unsigned long most;
	long used;
	int i;

	if (sm_memory_is_short(sk))
		return true;
	if (!bpf_core_field_exists(sk->sk_memcg))
		return false;
	memcg = (struct mem_cgroup *)((unsigned long)BPF_CORE_READ(sk, sk_memcg) & ~7ul); /* the lower bits are flags */
	if (!memcg)
		return false;
	if (bpf_core_field_exists(memcg->tcpmem_active) && BPF_CORE_READ(memcg, tcpmem_active))
		return true; /* of cgroup v1, and rare: not worth looking at */
	charged = (struct page_counter *)((void *)memcg + bpf_core_field_offset(memcg->memory));
	for (i = 0; i < SM_CGROUP_DEPTH; i++) {
		used = BPF_CORE_READ(charged, usage.counter);
		most = BPF_CORE_READ(charged, max);
		if (used < 0 || (unsigned long)used + SM_CGROUP_SPARE > most)
			return true;
		charged = BPF_CORE_READ(charged, parent);
		if (!charged)
			return false;
	}
	return true;
}

/* The last message was carried, or a part of it. If this one is what remained of it, then what it should have left is known:
 * what is there beyond that was counted and did not arrive. True: it is.
 *
 * The kernel keeps two things of the first verdict: where to cut, and where the message was redirected to, and SK_PASS means
 * that socket still. So what remains must be redirected elsewhere or be dropped. */
static __always_inline bool sm_body_rest(struct sk_msg_md *msg, struct sm_sock *st)
{
	struct sk_msg *kernel = (struct sk_msg *)msg; /* what the context really is */
	__u32 slot = st->aside_slot, size = msg->size, failed;
	struct sm_aside_dir *dir;

	st->aside_part = 0;
	/* A message that comes for the first time begins at its first piece and was not cut. */
	if (!BPF_CORE_READ(kernel, sg.start) && !BPF_CORE_READ(kernel, apply_bytes))
		return false;
	bpf_msg_apply_bytes(msg, 0);
	if (size <= st->aside_rest)
		return true;
	failed = size - st->aside_rest;
	st->redirected_bytes -= failed;
	st->aside_bytes -= failed;
	if (st->aside == SM_ASIDE_ON) {
		st->aside = SM_ASIDE_ARMED;
		st->aside_reason = SM_ASIDE_MEMORY;
	}
	dir = bpf_map_lookup_elem(&aside_slots, &slot);
	if (dir && dir->token == st->aside_token)
		dir->carried = st->aside_bytes;
	return true;
}

#endif
