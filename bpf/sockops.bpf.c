/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The end of a handshake, on both sides.
 *
 * The connecting side (ACTIVE) always gets here first: its ACK is what makes the other side ESTABLISHED. It leaves a
 * note under the connection's tuple: where the client wanted to go, and whether the two are to be redirected. The
 * accepting side (PASSIVE) finds the note, keeps the origin in its own storage, where the proxy reads it, and
 * enrols itself. Only pairs of which connect() said so are touched; for everybody else this is one look into an
 * empty socket storage.
 */
#include "pairs.h"
#include "socket.h"

static __always_inline void sm_enrol(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct sm_sock *st, struct sm_tuple *self)
{
	struct tcp_sock *tp;
	long err = bpf_sock_hash_update(ctx, &sm_pairs, self, BPF_NOEXIST);

	if (err) {
		/* EBUSY: another tool's verdict program owns this socket. E2BIG: sm_pairs is full. */
		st->state = SM_PLAIN;
		st->reason = SM_WHY_ENROL_FAILED;
		st->error = err;
		SM_COUNT(enrol_failed);
		return;
	}
	st->state = SM_ENROLLED_STATE;
	st->reason = SM_WHY_NONE;
	st->route = *self;
	/* Not so if data has gone out with the handshake (TCP fast open). */
	tp = bpf_skc_to_tcp_sock(sk);
	st->tcp_counted = tp && !tp->data_segs_out;
	if (tp)
		st->aside_tcp_seq = tp->write_seq;
	SM_COUNT(enrolled);
}

/* A connection that leaves no note must not find one either: an earlier one of the same tuple may have left its own
 * and never been accepted (a full backlog). Whoever dials the proxy's port directly, from the source port of such a
 * connection, would be taken for it. The connecting side is always here before the accepting one. */
static __always_inline void sm_forget_note(struct bpf_sock_ops *ctx, struct sm_sock *st)
{
	struct sm_config *cfg = sm_configuration();
	struct sm_tuple self;
	bool direct;

	if (!cfg)
		return;
	/* ends of which connect() might have said otherwise this time */
	direct = st && (st->role == SM_ROLE_UPSTREAM || (st->role != SM_ROLE_NONE && cfg->flags & SM_ACCELERATE_PODS));
	if (!direct && bpf_ntohl(SM_FIELD(ctx, remote_port)) != cfg->proxy_port)
		return;
	SM_TUPLE(ctx, &self);
	if (direct || self.netns)
		bpf_map_delete_elem(&sm_origin, &self);
}

static __always_inline void sm_active(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct sm_sock *st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	struct sm_origin note = {};
	struct sm_tuple self;

	if (!st || (st->role != SM_ROLE_CLIENT && st->state != SM_WANTED)) {
		sm_forget_note(ctx, st);
		return;
	}
	SM_TUPLE(ctx, &self);
	if (st->state == SM_WANTED) {
		sm_enrol(ctx, sk, st, &self);
		if (st->state == SM_ENROLLED_STATE) {
			note.accelerate = 1;
			/* see sm_first_ack */
			bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
		}
	}
	if (st->role != SM_ROLE_CLIENT && !note.accelerate) {
		bpf_map_delete_elem(&sm_origin, &self);
		return;
	}
	__builtin_memcpy(note.addr, st->origin, sizeof(note.addr));
	note.port = st->origin_port;
	note.role = st->role;
	if (bpf_map_update_elem(&sm_origin, &self, &note, BPF_ANY))
		SM_COUNT(origin_full);
}

/* Is this an accepted socket for which somebody may have left a note? The proxy's port on loopback, or a pod's own
 * address in that pod's own netns (an address elsewhere, in a container network of somebody else, is not ours). */
static __always_inline bool sm_expects(struct bpf_sock_ops *ctx, const struct sm_config *cfg, const struct sm_tuple *self,
				       bool *to_proxy)
{
	struct sm_local_key key;
	struct sm_local *local;

	*to_proxy = self->netns && self->local_port == cfg->proxy_port;
	if (*to_proxy)
		return true;
	if (!(cfg->flags & SM_ACCELERATE))
		return false;
	__builtin_memcpy(key.addr, self->local, sizeof(key.addr));
	local = bpf_map_lookup_elem(&sm_local, &key);
	return local && (!local->netns || local->netns == bpf_get_netns_cookie(ctx));
}

static __always_inline bool sm_enrol_accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct sm_sock *st,
					      struct sm_tuple *self)
{
	if (sm_is_mptcp(sk)) {
		st->reason = SM_WHY_MPTCP;
		SM_COUNT(skipped_mptcp);
		return false;
	}
	if (st->role != SM_ROLE_DOWNSTREAM && sm_app_splices(st->netns, 0, self->local_port)) {
		st->reason = SM_WHY_SPLICE;
		return false;
	}
	sm_enrol(ctx, sk, st, self);
	return st->state == SM_ENROLLED_STATE;
}

static __always_inline void sm_passive(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct sm_config *cfg = sm_configuration();
	struct sm_tuple self, peer;
	struct sm_origin *note;
	struct sm_sock *st;
	bool to_proxy;

	if (!cfg)
		return;
	SM_TUPLE(ctx, &self);
	if (!sm_expects(ctx, cfg, &self, &to_proxy))
		return;
	sm_mirror(&peer, &self);
	note = bpf_map_lookup_elem(&sm_origin, &peer);
	if (!note) {
		if (to_proxy)
			SM_COUNT(origin_missing);
		return;
	}
	st = bpf_sk_storage_get(&sm_sock, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!st) {
		SM_COUNT(storage_failed);
		return;
	}
	st->netns = bpf_get_netns_cookie(ctx);
	if (to_proxy) {
		st->role = SM_ROLE_DOWNSTREAM;
		__builtin_memcpy(st->origin, note->addr, sizeof(st->origin));
		st->origin_port = note->port;
	} else {
		st->role = note->role == SM_ROLE_UPSTREAM ? SM_ROLE_SERVER : SM_ROLE_POD_SERVER;
	}
	if (!note->accelerate) {
		st->reason = SM_WHY_PEER_PLAIN;
	} else if (__sync_val_compare_and_swap(&note->claim, SM_OPEN, SM_TAKEN) != SM_OPEN) {
		st->reason = SM_WHY_LATE;
	} else if (!sm_enrol_accepted(ctx, sk, st, &self)) {
		note->claim = SM_REFUSED; /* stays for the other end to find, at its first message */
		return;
	}
	bpf_map_delete_elem(&sm_origin, &peer);
}

/* The first ACK of our data means that the data went by TCP, because the other end was missing at the first message. If
 * it will never be enrolled, nothing can be redirected on this connection, and a socket that stays in the map while
 * its bytes come by TCP reads FIONREAD 0 on many kernels: take it out. This ACK precedes any answer, so the
 * application can't notice. Never so if the other end is or was in the map: bytes that it redirected to us would be
 * lost with our place in the map. */
static __always_inline void sm_first_ack(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct sm_sock *st = bpf_sk_storage_get(&sm_sock, sk, 0, 0);
	struct sm_tuple self;

	if (st && st->latch == SM_UNDECIDED)
		return;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_RTT_CB_FLAG);
	if (!st || st->state != SM_ENROLLED_STATE || (st->reason != SM_WHY_LATE && st->reason != SM_WHY_PEER_PLAIN))
		return;
	SM_TUPLE(ctx, &self);
	bpf_map_delete_elem(&sm_pairs, &self);
	st->state = SM_REMOVED;
}

SEC("sockops")
int sm_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk;

	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_RTT_CB:
		break;
	default:
		return 0;
	}
	if (ctx->family != AF_INET && ctx->family != AF_INET6)
		return 0;
	sk = ctx->sk;
	if (!sk)
		return 0;
	if (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		sm_active(ctx, sk);
	else if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		sm_passive(ctx, sk);
	else
		sm_first_ack(ctx, sk);
	return 0;
}
