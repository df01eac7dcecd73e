/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The connections of clients outside: finding them, making them, and following their state as far as their time-out
 * depends on it. The collector in pkg/datapath/nat.go removes those that are over.
 */
#ifndef SM_NATCONN_H
#define SM_NATCONN_H

#include "packet.h"
#include "pick.h"

/* How many seconds may pass before a connection's last use is written again: the hot path must not write always. */
#define SM_NAT_COARSE 4

#define SM_PORT_ATTEMPTS 32 /* source ports tried for a new connection */
#define SM_PORT_RANDOM 24   /* the first of them at random, the others in a row, which finds the last port of a small range */
#define SM_NAME_ATTEMPTS 8

/* What a client's packet means for its connection. */
#define SM_CONN_OK 0
#define SM_CONN_FULL 1 /* the handshake is over, and there is no room for the connection yet */
#define SM_CONN_OVER 2 /* it's over, or its backend is: this packet begins another */

/* What became of a client's first packet. */
#define SM_OUT_CONNECTED 0
#define SM_OUT_NONE 1    /* not addressed to a frontend */
#define SM_OUT_DROPPED 2 /* and counted */
#define SM_OUT_REFUSED 3 /* to be answered so, and counted */

static __always_inline void sm_fill_in_key(const struct sm_ip *src, __u16 sport, const struct sm_ip *dst, __u16 dport, __u8 proto,
					   struct sm_nat_in_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	sm_store(key->src, src);
	sm_store(key->dst, dst);
	key->sport = sport;
	key->dport = dport;
	key->proto = proto;
}

/* How the packet arrived; for an ICMP error, how a packet would arrive that goes the quoted one's way back. */
static __always_inline void sm_nat_in_key_of(const struct sm_packet *p, struct sm_nat_in_key *key)
{
	if (p->icmp)
		sm_fill_in_key(&p->dst, p->dport, &p->src, p->sport, p->proto, key);
	else
		sm_fill_in_key(&p->src, p->sport, &p->dst, p->dport, p->proto, key);
}

static __always_inline void sm_fill_nat_key(const struct sm_ip *client, __u16 client_port, const struct sm_ip *backend,
					    __u16 backend_port, __u8 proto, struct sm_nat_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	sm_store(key->client, client);
	sm_store(key->backend, backend);
	key->client_port = client_port;
	key->backend_port = backend_port;
	key->proto = proto;
}

/* The connection's name if the (quoted) packet is the client's, or if it's the backend's. */
static __always_inline void sm_nat_key_of(const struct sm_packet *p, bool client, struct sm_nat_key *key)
{
	if (client)
		sm_fill_nat_key(&p->src, p->sport, &p->dst, p->dport, p->proto, key);
	else
		sm_fill_nat_key(&p->dst, p->dport, &p->src, p->sport, p->proto, key);
}

static __always_inline struct sm_nat_in *sm_find_arriving(const struct sm_nat_in_key *key)
{
	struct sm_nat_in *in = bpf_map_lookup_elem(&sm_nat_in, key);

	return in ? in : bpf_map_lookup_elem(&sm_nat_new_in, key);
}

static __always_inline struct sm_nat *sm_find_conn(const struct sm_nat_key *key)
{
	struct sm_nat *conn = bpf_map_lookup_elem(&sm_nat, key);

	return conn ? conn : bpf_map_lookup_elem(&sm_nat_new, key);
}

/* The two forms in which the connection's packets arrive. */
static __always_inline void sm_client_form(const struct sm_nat_key *name, const struct sm_nat *conn, struct sm_nat_in_key *key)
{
	struct sm_ip client = sm_load(name->client), front = sm_load(conn->front);

	sm_fill_in_key(&client, conn->client_port, &front, conn->front_port, name->proto, key);
}

static __always_inline void sm_backend_form(const struct sm_nat_key *name, const struct sm_nat *conn, struct sm_nat_in_key *key)
{
	struct sm_ip backend = sm_load(name->backend), node = sm_load(conn->node);

	sm_fill_in_key(&backend, name->backend_port, &node, conn->node_port, name->proto, key);
}

static __always_inline void sm_lead_client(const struct sm_nat_key *name, struct sm_nat_in *in)
{
	struct sm_ip backend = sm_load(name->backend);

	__builtin_memset(in, 0, sizeof(*in));
	sm_store(in->peer, &backend);
	in->peer_port = name->backend_port;
	in->own_port = name->client_port;
	in->from_client = 1;
}

static __always_inline void sm_lead_backend(const struct sm_nat_key *name, struct sm_nat_in *in)
{
	struct sm_ip client = sm_load(name->client);

	__builtin_memset(in, 0, sizeof(*in));
	sm_store(in->peer, &client);
	in->peer_port = name->client_port;
	in->own_port = name->backend_port;
}

/* Deletes a lead, unless it leads to another connection by now: what an LRU map forgets, somebody else may have made anew. */
static __always_inline void sm_drop_lead(const struct sm_nat_in_key *key, const struct sm_nat_in *in)
{
	struct sm_nat_in *is = bpf_map_lookup_elem(&sm_nat_in, key);

	if (is && !__builtin_memcmp(is, in, sizeof(*in)))
		bpf_map_delete_elem(&sm_nat_in, key);
	is = bpf_map_lookup_elem(&sm_nat_new_in, key);
	if (is && !__builtin_memcmp(is, in, sizeof(*in)))
		bpf_map_delete_elem(&sm_nat_new_in, key);
}

/* Forgets the connection w->conn with the name w->name, wherever it is. */
__noinline int sm_forget(void)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat_in_key key;
	struct sm_nat_in in;

	if (!w)
		return 0;
	sm_client_form(&w->name, &w->conn, &key);
	sm_lead_client(&w->name, &in);
	sm_drop_lead(&key, &in);
	if (w->conn.flags & SM_NAT_SNAT) {
		sm_backend_form(&w->name, &w->conn, &key);
		sm_lead_backend(&w->name, &in);
		sm_drop_lead(&key, &in);
	}
	bpf_map_delete_elem(&sm_nat, &w->name);
	bpf_map_delete_elem(&sm_nat_new, &w->name);
	return 0;
}

/* The connection exists: it moves from where a flood could push it out to where it stays. Others may look it up at any
 * moment, so it is there before it goes here. */
__noinline int sm_promote(void)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat_in_key client, backend;
	struct sm_nat_in in;
	bool snat;

	if (!w)
		return SM_CONN_FULL;
	snat = w->conn.flags & SM_NAT_SNAT;
	sm_client_form(&w->name, &w->conn, &client);
	sm_backend_form(&w->name, &w->conn, &backend);
	if (bpf_map_update_elem(&sm_nat, &w->name, &w->conn, BPF_ANY))
		goto full;
	sm_lead_client(&w->name, &in);
	if (bpf_map_update_elem(&sm_nat_in, &client, &in, BPF_ANY))
		goto full;
	if (snat) {
		sm_lead_backend(&w->name, &in);
		if (bpf_map_update_elem(&sm_nat_in, &backend, &in, BPF_ANY))
			goto full;
		bpf_map_delete_elem(&sm_nat_new_in, &backend);
	}
	bpf_map_delete_elem(&sm_nat_new_in, &client);
	bpf_map_delete_elem(&sm_nat_new, &w->name);
	return SM_CONN_OK;
full:
	bpf_map_delete_elem(&sm_nat_in, &client);
	bpf_map_delete_elem(&sm_nat, &w->name);
	SM_COUNT(outside_full);
	return SM_CONN_FULL;
}

/* Notes that the connection was used, and how it is ending. A reset that is followed by more from the same side was a
 * forgery. */
static __always_inline void sm_touch(struct sm_nat *conn, const struct sm_packet *p, __u16 fin, __u16 rst, __u16 set)
{
	__u16 flags = conn->flags | set;
	__u32 now = sm_seconds();

	if (p->proto == IPPROTO_TCP) {
		if (p->tcp_flags & TCP_FIN)
			flags |= fin;
		if (p->tcp_flags & TCP_RST)
			flags |= rst;
		else
			flags &= ~rst;
	}
	if (flags != conn->flags)
		conn->flags = flags;
	if (now - conn->used >= SM_NAT_COARSE)
		conn->used = now;
}

static __always_inline void sm_from_backend(const struct sm_packet *p, struct sm_nat *conn)
{
	sm_touch(conn, p, SM_NAT_FIN_BACKEND, SM_NAT_RST_BACKEND, SM_NAT_ANSWERED);
}

static __always_inline bool sm_is_syn(const struct sm_packet *p)
{
	return p->proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline bool sm_closed(__u16 flags)
{
	return (flags & (SM_NAT_FIN_CLIENT | SM_NAT_FIN_BACKEND)) == (SM_NAT_FIN_CLIENT | SM_NAT_FIN_BACKEND) ||
	       flags & (SM_NAT_RST_CLIENT | SM_NAT_RST_BACKEND);
}

/* A packet of a client whose connection may exist: w->in says where it leads. */
__noinline int sm_from_client(void)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat *conn;
	struct sm_ip backend;
	const struct sm_packet *p;
	bool fresh = false;

	if (!w)
		return SM_CONN_FULL;
	p = &w->p;
	backend = sm_load(w->in.peer);
	sm_fill_nat_key(&p->src, w->in.own_port, &backend, w->in.peer_port, p->proto, &w->name);
	conn = bpf_map_lookup_elem(&sm_nat, &w->name);
	if (!conn) {
		conn = bpf_map_lookup_elem(&sm_nat_new, &w->name);
		fresh = true;
	}
	if (!conn) {
		sm_drop_lead(&w->in_key, &w->in);
		return SM_CONN_OVER;
	}
	/* A TCP connection goes on with its backend, whatever became of that; for a datagram there may be a better one. */
	if (p->proto == IPPROTO_UDP ? !(conn->flags & SM_NAT_DIRECT) && !sm_is_member(conn->pool, conn->backend) :
				      sm_is_syn(p) && sm_closed(conn->flags)) {
		w->conn = *conn;
		sm_forget();
		return SM_CONN_OVER;
	}
	sm_touch(conn, p, SM_NAT_FIN_CLIENT, SM_NAT_RST_CLIENT, 0);
	/* The client speaks again after an answer: it's no forged address. */
	if (fresh && conn->flags & SM_NAT_ANSWERED && !(p->tcp_flags & (TCP_SYN | TCP_RST))) {
		w->conn = *conn;
		return sm_promote();
	}
	return SM_CONN_OK;
}

/* Which source the kernel prefers towards the backend. False: the backend is an address of this node itself, so nobody needs
 * to speak for the client. *same says that the way there is the device that the packet came by. */
static __always_inline bool sm_prefers(struct __sk_buff *skb, struct sm_nat_work *w, const struct sm_dest *to, struct sm_ip *node, bool *same)
{
	struct bpf_fib_lookup *fib = (void *)w->fib;
	const struct sm_packet *p = &w->p;
	struct sm_node *own;
	__u32 zero = 0;
	long ret;

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->l4_protocol = p->proto;
	fib->sport = bpf_htons(p->sport);
	fib->dport = bpf_htons(to->port);
	fib->ifindex = skb->ifindex;
	if (p->v4) {
		fib->family = AF_INET;
		fib->ipv4_src = p->src.word[3];
		fib->ipv4_dst = to->ip.word[3];
	} else {
		fib->family = AF_INET6;
		*(struct sm_ip *)fib->ipv6_src = p->src;
		*(struct sm_ip *)fib->ipv6_dst = to->ip;
	}
	ret = bpf_fib_lookup(skb, fib, sizeof(*fib), BPF_FIB_LOOKUP_SKIP_NEIGH | BPF_FIB_LOOKUP_SRC);
	if (ret == BPF_FIB_LKUP_RET_NOT_FWDED)
		return false;
	if (ret == BPF_FIB_LKUP_RET_SUCCESS) {
		*same = fib->ifindex == skb->ifindex;
		if (p->v4) {
			*node = sm_mapped(fib->ipv4_src);
			return true;
		}
		*node = *(struct sm_ip *)fib->ipv6_src;
		if (!sm_is_link_local6(node))
			return true;
	} else if (ret < 0) { /* flags that this kernel doesn't know yet: the source came with 6.7 */
		ret = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
		if (ret == BPF_FIB_LKUP_RET_NOT_FWDED)
			return false;
		*same = (ret == BPF_FIB_LKUP_RET_SUCCESS || ret == BPF_FIB_LKUP_RET_NO_NEIGH) && fib->ifindex == skb->ifindex;
	}
	__builtin_memset(node, 0, sizeof(*node));
	own = bpf_map_lookup_elem(&sm_node, &zero);
	if (own)
		*node = sm_load(p->v4 ? own->v4 : own->v6);
	return true;
}

static __always_inline bool sm_unspecified(const struct sm_ip *ip)
{
	return !ip->word[3] && !ip->word[2] && !ip->word[1] && !ip->word[0];
}

/* Reserves a port of the node towards the backend: the client's own where that is in the range and free. */
__noinline int sm_reserve_port(void)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat_in_key key;
	struct sm_nat_in in;
	__u32 min, n, at;
	int i;

	if (!w || !w->nat_ports)
		return -1;
	min = w->nat_port_min;
	n = w->nat_ports;
	at = bpf_get_prandom_u32() % n;
	if (w->conn.client_port - min < n)
		at = w->conn.client_port - min;
	sm_lead_backend(&w->name, &in);
	sm_backend_form(&w->name, &w->conn, &key);
	for (i = 0; i < SM_PORT_ATTEMPTS; i++) {
		key.dport = min + at;
		if (!bpf_map_update_elem(&sm_nat_new_in, &key, &in, BPF_NOEXIST)) {
			/* A connection that was promoted meanwhile was there first. */
			if (!bpf_map_lookup_elem(&sm_nat_in, &key)) {
				w->conn.node_port = key.dport;
				return 0;
			}
			bpf_map_delete_elem(&sm_nat_new_in, &key);
		}
		at = i < SM_PORT_RANDOM ? bpf_get_prandom_u32() % n : (at + 1) % n;
	}
	return -1;
}

/* Puts w->conn into the maps of those that are new. A client that uses one port for two frontends, which may lead to the same
 * backend, gets another one in the middle form. */
__noinline int sm_enter(void)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat_in_key key;
	struct sm_nat_in in;
	int i;

	if (!w || !w->nat_ports)
		return -1;
	for (i = 0; i < SM_NAME_ATTEMPTS; i++) {
		if (!bpf_map_update_elem(&sm_nat_new, &w->name, &w->conn, BPF_NOEXIST)) {
			if (!bpf_map_lookup_elem(&sm_nat, &w->name))
				break;
			bpf_map_delete_elem(&sm_nat_new, &w->name);
		}
		w->name.client_port = w->nat_port_min + bpf_get_prandom_u32() % w->nat_ports;
	}
	if (i == SM_NAME_ATTEMPTS)
		goto exhausted;
	if (w->conn.flags & SM_NAT_SNAT) {
		if (sm_reserve_port()) {
			bpf_map_delete_elem(&sm_nat_new, &w->name);
			goto exhausted;
		}
		bpf_map_update_elem(&sm_nat_new, &w->name, &w->conn, BPF_ANY);
	}
	sm_client_form(&w->name, &w->conn, &key);
	sm_lead_client(&w->name, &in);
	bpf_map_update_elem(&sm_nat_new_in, &key, &in, BPF_ANY);
	sm_set_port_bit(0, w->name.backend_port);
	return 0;
exhausted:
	SM_COUNT(outside_no_port);
	return -1;
}

static __always_inline bool sm_source_allowed(const struct sm_packet *p, __u32 pool)
{
	struct sm_source_key key = { .prefixlen = 32 + 128, .pool = pool };

	sm_store(key.addr, &p->src);
	return bpf_map_lookup_elem(&sm_sources, &key);
}

/* The first packet of a connection: where does it go, and as whom? Leaves in w->in how it's translated. */
__noinline int sm_connect_outside(struct __sk_buff *skb)
{
	struct sm_nat_work *w = sm_work();
	struct sm_frontend_key front = {};
	const struct sm_packet *p;
	struct sm_target *found;
	struct sm_ip node = {};
	struct sm_dest to = {};
	bool same = false;
	int i, picked = SM_PICK_STALE;
	struct sm_ip client;
	__u32 backend = 0;

	if (!w)
		return SM_OUT_NONE;
	p = &w->p;
	front.port = p->dport;
	front.proto = p->proto;
	sm_store(front.addr, &p->dst);
	for (i = 0; i < SM_POOL_ATTEMPTS && picked == SM_PICK_STALE; i++) {
		found = bpf_map_lookup_elem(&sm_outside, &front);
		if (!found)
			return SM_OUT_NONE;
		w->target = *found;
		if (w->target.flags & SM_TARGET_SOURCES && !sm_source_allowed(p, w->target.pool)) {
			SM_COUNT(outside_denied);
			return SM_OUT_DROPPED;
		}
		if (p->proto == IPPROTO_TCP && !sm_is_syn(p)) {
			SM_COUNT(outside_stray);
			return w->target.flags & SM_TARGET_SILENT && !w->target.slots ? SM_OUT_DROPPED : SM_OUT_REFUSED;
		}
		client = p->src;
		picked = sm_pick_for(&w->target, &client, &to, &backend);
	}
	if (picked != SM_PICKED) {
		if (w->target.flags & SM_TARGET_SILENT) {
			SM_COUNT(outside_silent);
			return SM_OUT_DROPPED;
		}
		SM_COUNT(outside_refused);
		return SM_OUT_REFUSED;
	}
	__builtin_memset(&w->conn, 0, sizeof(w->conn));
	sm_store(w->conn.front, &p->dst);
	w->conn.front_port = p->dport;
	w->conn.client_port = p->sport;
	w->conn.pool = w->target.pool;
	w->conn.backend = backend;
	w->conn.since = w->conn.used = sm_seconds();
	/* Behind policy Local the backend sees the client, unless both are on one link, where it would answer past this node. */
	if (sm_prefers(skb, w, &to, &node, &same) && (same || !(w->target.flags & SM_TARGET_LOCAL))) {
		if (sm_unspecified(&node)) {
			SM_COUNT(outside_no_source);
			return SM_OUT_DROPPED;
		}
		sm_store(w->conn.node, &node);
		w->conn.flags = SM_NAT_SNAT;
	}
	sm_fill_nat_key(&p->src, p->sport, &to.ip, to.port, p->proto, &w->name);
	if (sm_enter())
		return SM_OUT_DROPPED;
	sm_lead_client(&w->name, &w->in);
	SM_COUNT(outside);
	return SM_OUT_CONNECTED;
}

#endif
