/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Clients outside this node, at the tc hooks of its devices.
 *
 *	client ──► ingress of the device it comes by      the destination becomes a backend
 *	           the node's stack                        sees client and backend
 *	           egress of the device towards the backend   the source becomes the node, unless the policy is Local
 *	backend ──► ingress of that device                 the destination becomes the client again
 *	           the node's stack                        sees backend and client
 *	           egress towards the client               the source becomes the frontend again
 *
 * The order is that of netfilter's hooks with kube-proxy, so that what lies between works as before: routing, rp_filter,
 * the FORWARD chain and NetworkPolicy made of it, conntrack. Doing all at ingress would be shorter and wrong: with its own
 * address as source the node takes a packet for a martian, and a redirect to the pod's device passes NetworkPolicy by.
 *
 * All is decided at a connection's first packet: backend, source address and port. The rest is one look-up per hook. Errors
 * (ICMP) are translated with the packet that they quote, in both directions, so that path MTU discovery works.
 *
 * Devices that face pods get the same programs with sm_nat_edge unset, which leaves what backends need of them.
 */
#include "packet.h"
#include "natconn.h"
#include "direct.h"
#include "refuse.h"

#define PACKET_HOST 0

/* Set by the loader: clients may come by this device, not only answers of pods. */
const volatile bool sm_nat_edge = true;

#define VLAN_ID 0xfff

/* Nothing for us on this device, or in this packet? Tagged packets are seen again at the VLAN's own device, if the node has
 * it; those of VLAN 0, whose tag only says how urgent they are, are everybody's. */
static __always_inline struct sm_nat_work *sm_begin(struct __sk_buff *skb)
{
	struct sm_config *cfg = sm_configuration();
	struct sm_nat_work *w;

	if (!cfg || !(cfg->flags & SM_OUTSIDE) || (skb->vlan_present && skb->vlan_tci & VLAN_ID))
		return NULL;
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return NULL;
	w = sm_work();
	if (!w || !sm_parse(skb))
		return NULL;
	w->nat_port_min = cfg->nat_port_min;
	w->nat_ports = cfg->nat_port_max - cfg->nat_port_min + 1;
	return w;
}

/* Applies w->in to a packet that arrives, or to an error that quotes the answer to it. */
static __always_inline int sm_arrive(struct __sk_buff *skb, struct sm_nat_work *w)
{
	__u32 to = w->p.icmp ? SM_SRC : SM_DST, by = w->p.icmp ? SM_DST : SM_SRC;

	skb->tc_index = SM_TRANSLATED;
	w->to = sm_load(w->in.peer);
	if (sm_translate(skb, to, w->in.peer_port))
		return SM_DROP;
	if (w->p.icmp) {
		if (sm_readdress_error(skb, SM_DST))
			return SM_DROP;
		SM_COUNT(outside_errors);
	}
	return w->in.from_client && sm_translate_port(skb, w, by, w->in.own_port) ? SM_DROP : SM_NEXT;
}

/* A packet that doesn't come by a frontend. It only matters where it could be taken for one that does. */
static __always_inline int sm_past_frontends(struct __sk_buff *skb, struct sm_nat_work *w)
{
	int met = SM_DIRECT_PASS;

	if (w->p.icmp || w->p.later_fragment || skb->tc_index == SM_TRANSLATED)
		return SM_NEXT;
	if (sm_nat_edge && sm_port_bit(0, w->p.dport)) {
		sm_nat_key_of(&w->p, true, &w->name);
		met = sm_meet_direct(1);
	}
	if (met == SM_DIRECT_PASS && sm_port_bit(0, w->p.sport)) {
		sm_nat_key_of(&w->p, false, &w->name);
		met = sm_meet_direct(0);
	}
	switch (met) {
	case SM_DIRECT_ENTERED:
		return sm_arrive(skb, w);
	case SM_DIRECT_DROP:
		return SM_DROP;
	}
	return SM_NEXT;
}

/* A packet of a client for which there is no connection. */
static __always_inline int sm_first_packet(struct __sk_buff *skb, struct sm_nat_work *w)
{
	switch (sm_connect_outside(skb)) {
	case SM_OUT_CONNECTED:
		return sm_arrive(skb, w);
	case SM_OUT_NONE:
		return sm_past_frontends(skb, w);
	case SM_OUT_REFUSED:
		return sm_refuse_packet(skb);
	default:
		return SM_DROP;
	}
}

SEC("tc")
int sm_nat_ingress(struct __sk_buff *skb)
{
	struct sm_nat_in *found;
	struct sm_nat_work *w;
	__u16 port;

	if (skb->pkt_type != PACKET_HOST)
		return SM_NEXT;
	w = sm_begin(skb);
	if (!w)
		return SM_NEXT;
	port = w->p.icmp ? w->p.sport : w->p.dport; /* the node's side of the packet */
	if (port - w->nat_port_min >= w->nat_ports && !(sm_nat_edge && sm_port_bit(SM_FRONT_PORTS, port)))
		return sm_past_frontends(skb, w);
	sm_nat_in_key_of(&w->p, &w->in_key);
	found = sm_find_arriving(&w->in_key);
	if (!found) {
		if (!sm_nat_edge || w->p.icmp || w->p.later_fragment)
			return sm_past_frontends(skb, w);
		return sm_first_packet(skb, w);
	}
	w->in = *found;
	if (w->in.from_client && !w->p.icmp && !w->p.later_fragment) {
		switch (sm_from_client()) {
		case SM_CONN_FULL:
			return SM_DROP;
		case SM_CONN_OVER:
			return sm_first_packet(skb, w);
		}
	}
	return sm_arrive(skb, w);
}

/* Towards the backend: the node speaks for the client. An error that quotes an answer goes the same way. */
static __always_inline int sm_leave_to_backend(struct __sk_buff *skb, struct sm_nat_work *w, const struct sm_nat *conn)
{
	if (!(conn->flags & SM_NAT_SNAT))
		return SM_NEXT;
	w->to = sm_load(conn->node);
	if (!w->p.icmp)
		return sm_translate(skb, SM_SRC, conn->node_port) ? SM_DROP : SM_NEXT;
	if (sm_translate(skb, SM_DST, conn->node_port) || sm_readdress_error(skb, SM_SRC))
		return SM_DROP;
	SM_COUNT(outside_errors);
	return SM_NEXT;
}

/* Towards the client: it knows the frontend alone. */
static __always_inline int sm_leave_to_client(struct __sk_buff *skb, struct sm_nat_work *w, const struct sm_nat *conn)
{
	__u16 own = conn->client_port;

	w->to = sm_load(conn->front);
	if (!w->p.icmp)
		return sm_translate(skb, SM_SRC, conn->front_port) || sm_translate_port(skb, w, SM_DST, own) ? SM_DROP : SM_NEXT;
	if (sm_translate(skb, SM_DST, conn->front_port) || sm_readdress_error(skb, SM_SRC) || sm_translate_port(skb, w, SM_SRC, own))
		return SM_DROP;
	SM_COUNT(outside_errors);
	return SM_NEXT;
}

SEC("tc")
int sm_nat_egress(struct __sk_buff *skb)
{
	struct sm_nat_work *w = sm_begin(skb);
	struct sm_nat *conn;

	if (!w)
		return SM_NEXT;
	if ((sm_nat_edge || !w->p.icmp) && sm_port_bit(0, w->p.dport)) {
		sm_nat_key_of(&w->p, true, &w->name);
		conn = sm_find_conn(&w->name);
		if (conn)
			return w->p.icmp ? sm_leave_to_client(skb, w, conn) : sm_leave_to_backend(skb, w, conn);
	}
	if ((sm_nat_edge || w->p.icmp) && sm_port_bit(0, w->p.sport)) {
		sm_nat_key_of(&w->p, false, &w->name);
		conn = sm_find_conn(&w->name);
		if (conn) {
			if (!w->p.icmp && !w->p.later_fragment) {
				if (sm_is_no_answer(&w->p, conn)) {
					w->conn = *conn;
					sm_yield_to_direct();
					return SM_NEXT;
				}
				sm_from_backend(&w->p, conn);
			}
			return w->p.icmp ? sm_leave_to_backend(skb, w, conn) : sm_leave_to_client(skb, w, conn);
		}
	}
	return SM_NEXT;
}
