/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Clients outside that also use a backend's own address, where pods can be reached from outside.
 *
 * Such packets are none of ours until the client uses the port of a connection through a frontend for one past it, to the same
 * backend. Then both have the same middle form, and the packets of one would be taken for the other's. One of them has to get
 * another port in the middle form; conntrack does the same where tuples clash.
 *
 *	the node speaks for the client (policy Cluster)   nobody beyond this node knows the middle form: that of the connection
 *	                                                  through the frontend changes, at any time
 *	the backend sees the client (policy Local)        the backend knows the form of whichever was first. A direct one that
 *	                                                  begins gets another port. If it's the direct one that was first, the
 *	                                                  backend answers the other's SYN with something that is none; that is
 *	                                                  forgotten, and its next SYN gets another port
 *
 * From then on the direct connection is in the tables as one of ours whose frontend is the backend itself (SM_NAT_DIRECT).
 * Datagrams say nothing of beginnings: a direct flow gets another port with its client's next datagram.
 */
#ifndef SM_DIRECT_H
#define SM_DIRECT_H

#include "natconn.h"

/* What is to become of a packet that doesn't come by a frontend. */
#define SM_DIRECT_PASS 0
#define SM_DIRECT_ENTERED 1 /* it's translated by w->in from now on */
#define SM_DIRECT_DROP 2    /* no room, and counted */

/* Marks packets that were translated on their way in: where a device of the node leads to another one of it they are seen
 * again, and look like direct ones. tc_index is of no other use without the qdisc dsmark, which is gone since 6.3. */
#define SM_TRANSLATED 0x534d

/* Makes of w->conn the direct connection with the name w->name. */
static __always_inline void sm_fill_direct(struct sm_nat_work *w, __u16 flags)
{
	struct sm_ip backend = sm_load(w->name.backend);

	__builtin_memset(&w->conn, 0, sizeof(w->conn));
	sm_store(w->conn.front, &backend);
	w->conn.front_port = w->name.backend_port;
	w->conn.client_port = w->name.client_port;
	w->conn.flags = SM_NAT_DIRECT | flags;
	w->conn.since = w->conn.used = sm_seconds();
	sm_set_port_bit(SM_FRONT_PORTS, w->name.backend_port);
}

/* The name w->name is that of the direct connection which exists. */
__noinline int sm_enter_direct(void)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat_in_key key;
	struct sm_nat_in in;

	if (!w)
		return 0;
	sm_fill_direct(w, SM_NAT_ANSWERED);
	bpf_map_delete_elem(&sm_nat, &w->name);
	bpf_map_update_elem(&sm_nat_new, &w->name, &w->conn, BPF_ANY);
	sm_client_form(&w->name, &w->conn, &key);
	sm_lead_client(&w->name, &in);
	bpf_map_update_elem(&sm_nat_new_in, &key, &in, BPF_ANY);
	return 0;
}

/* Gives the connection w->conn, for which the node speaks, another port in the middle form than w->name says. Make before
 * break: its packets keep coming. */
__noinline int sm_rename(void)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat_in_key client, backend;
	struct sm_nat_in in;
	__u16 was;
	bool kept;
	int i;

	if (!w || !w->nat_ports)
		return -1;
	was = w->name.client_port;
	kept = bpf_map_lookup_elem(&sm_nat, &w->name);
	for (i = 0; i < SM_NAME_ATTEMPTS; i++) {
		w->name.client_port = w->nat_port_min + bpf_get_prandom_u32() % w->nat_ports;
		if (sm_find_conn(&w->name))
			continue;
		if (!(kept ? bpf_map_update_elem(&sm_nat, &w->name, &w->conn, BPF_NOEXIST) :
			     bpf_map_update_elem(&sm_nat_new, &w->name, &w->conn, BPF_NOEXIST)))
			break;
	}
	if (i < SM_NAME_ATTEMPTS) {
		sm_client_form(&w->name, &w->conn, &client);
		sm_backend_form(&w->name, &w->conn, &backend);
		sm_lead_client(&w->name, &in);
		if (kept)
			bpf_map_update_elem(&sm_nat_in, &client, &in, BPF_EXIST);
		else
			bpf_map_update_elem(&sm_nat_new_in, &client, &in, BPF_ANY);
		sm_lead_backend(&w->name, &in);
		if (kept)
			bpf_map_update_elem(&sm_nat_in, &backend, &in, BPF_EXIST);
		else
			bpf_map_update_elem(&sm_nat_new_in, &backend, &in, BPF_ANY);
	}
	w->name.client_port = was;
	return i < SM_NAME_ATTEMPTS ? 0 : -1;
}

/* A packet that came by no frontend bears the name w->name, in which direction from_client says. */
__noinline int sm_meet_direct(int from_client)
{
	struct sm_nat_work *w = sm_work();
	struct sm_nat *conn;

	if (!w)
		return SM_DIRECT_PASS;
	conn = sm_find_conn(&w->name);
	if (!conn)
		return SM_DIRECT_PASS;
	if (conn->flags & SM_NAT_DIRECT) {
		sm_set_port_bit(SM_FRONT_PORTS, w->name.backend_port); /* the agent may have lost it, by writing the word meanwhile */
		return SM_DIRECT_PASS;
	}
	w->conn = *conn;
	if (w->conn.flags & SM_NAT_SNAT) {
		if (sm_rename()) {
			SM_COUNT(outside_full);
			return SM_DIRECT_DROP;
		}
		sm_enter_direct();
		return SM_DIRECT_PASS;
	}
	if (!from_client)
		return SM_DIRECT_PASS; /* an answer to the client, as the backend of policy Local gives it */
	if (w->p.proto == IPPROTO_TCP && !sm_is_syn(&w->p)) {
		if (!(w->conn.flags & SM_NAT_ANSWERED)) {
			sm_forget();
			sm_enter_direct();
		}
		return SM_DIRECT_PASS;
	}
	sm_fill_direct(w, 0);
	if (sm_enter())
		return SM_DIRECT_DROP;
	sm_lead_client(&w->name, &w->in);
	return SM_DIRECT_ENTERED;
}

/* Does the backend of policy Local answer a SYN as only one does who has a connection with these ports already? */
static __always_inline bool sm_is_no_answer(const struct sm_packet *p, const struct sm_nat *conn)
{
	return p->proto == IPPROTO_TCP && !(p->tcp_flags & (TCP_SYN | TCP_RST)) &&
	       !(conn->flags & (SM_NAT_SNAT | SM_NAT_ANSWERED | SM_NAT_DIRECT));
}

/* Then w->name is the direct connection's. */
__noinline int sm_yield_to_direct(void)
{
	sm_forget();
	return sm_enter_direct();
}

#endif
