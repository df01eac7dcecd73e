/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Packets at tc hooks: reading addresses and ports, and changing them with every checksum that covers them.
 *
 * An ICMP error is about another packet, which it quotes; addresses and ports here are then the quoted packet's. IPv4
 * options and up to SM_EXTENSIONS IPv6 extension headers are stepped over. Of a fragmented datagram the later fragments get their
 * ports from the first, by sm_frags. Everything is read and written through helpers, so packets may be non-linear,
 * segments to be cut up later (GSO), or have checksums that are still to be filled in.
 */
#ifndef SM_PACKET_H
#define SM_PACKET_H

#include "nat.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

/* Not in the kernel's type information, or not under their usual names. */
#define IPPROTO_HOPOPTS 0
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_ICMPV6 58
#define IPPROTO_DSTOPTS 60

#define ICMP_UNREACHABLE 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER 12
#define ICMP6_LAST_ERROR 4 /* unreachable, too big, time exceeded, parameter problem */

/* As many as RFC 8200 recommends, with one to spare. */
#define SM_EXTENSIONS 6

#define IP_OFFSET 0x1fff
#define IP_MORE 0x2000

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Set by the loader: bytes before the IP header, 14 on Ethernet, 0 on devices that carry bare IP. */
const volatile __u32 sm_nat_l2 = 14;

static __always_inline struct sm_ip sm_ip6(const struct in6_addr *a)
{
	struct sm_ip ip = { .word = { a->in6_u.u6_addr32[0], a->in6_u.u6_addr32[1], a->in6_u.u6_addr32[2], a->in6_u.u6_addr32[3] } };

	return ip;
}

/* The IP header at p->l3: addresses, protocol, where the next header begins. */
static __always_inline bool sm_parse_v4(struct __sk_buff *skb, struct sm_packet *p)
{
	struct iphdr ip;
	__u16 fragment;

	if (bpf_skb_load_bytes(skb, p->l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return false;
	p->src = sm_mapped(ip.saddr);
	p->dst = sm_mapped(ip.daddr);
	p->proto = ip.protocol;
	p->l4 = p->l3 + ip.ihl * 4;
	fragment = bpf_ntohs(ip.frag_off);
	p->first_fragment = (fragment & (IP_OFFSET | IP_MORE)) == IP_MORE;
	p->later_fragment = (fragment & IP_OFFSET) != 0;
	p->frag_proto = ip.protocol;
	p->id = ip.id;
	return true;
}

static __always_inline bool sm_parse_v6(struct __sk_buff *skb, struct sm_packet *p)
{
	struct ipv6hdr ip;
	__u8 next[8];
	__u32 at;
	int i;

	if (bpf_skb_load_bytes(skb, p->l3, &ip, sizeof(ip)) || ip.version != 6)
		return false;
	p->src = sm_ip6(&ip.saddr);
	p->dst = sm_ip6(&ip.daddr);
	p->proto = ip.nexthdr;
	at = p->l3 + sizeof(ip);
	for (i = 0; i < SM_EXTENSIONS; i++) {
		__u8 proto = p->proto;

		if (proto != IPPROTO_HOPOPTS && proto != IPPROTO_DSTOPTS && proto != IPPROTO_ROUTING && proto != IPPROTO_FRAGMENT)
			break;
		if (bpf_skb_load_bytes(skb, at, next, sizeof(next)))
			return false;
		/* With segments left the packet is on its way through here, and its checksum is for the last address. */
		if (proto == IPPROTO_ROUTING && next[3])
			return false;
		p->proto = next[0];
		if (proto != IPPROTO_FRAGMENT) {
			at += (next[1] + 1) * 8;
			continue;
		}
		at += 8;
		p->later_fragment = next[2] || next[3] & 0xf8;
		p->first_fragment = !p->later_fragment && next[3] & 1;
		p->id = *(__u32 *)(next + 4);
		if (p->later_fragment)
			break;
	}
	p->l4 = at;
	return true;
}

static __always_inline bool sm_parse_ports(struct __sk_buff *skb, struct sm_packet *p)
{
	__u8 head[14];

	if (p->proto == IPPROTO_TCP && !p->icmp) {
		if (bpf_skb_load_bytes(skb, p->l4, head, sizeof(head)))
			return false;
		p->tcp_flags = head[13];
	} else if (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP) {
		if (bpf_skb_load_bytes(skb, p->l4, head, 4))
			return false;
	} else {
		return false;
	}
	p->sport = head[0] << 8 | head[1];
	p->dport = head[2] << 8 | head[3];
	return true;
}

static __always_inline void sm_frag_key_of(const struct sm_packet *p, struct sm_frag_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	sm_store(key->src, &p->src);
	sm_store(key->dst, &p->dst);
	key->id = p->id;
	key->proto = p->frag_proto;
}

/* Is the message at p->l4 an error that quotes a packet? */
static __always_inline bool sm_is_icmp_error(struct __sk_buff *skb, const struct sm_packet *p)
{
	__u8 type;

	if (bpf_skb_load_bytes(skb, p->l4, &type, 1))
		return false;
	if (p->v4)
		return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER;
	return type && type <= ICMP6_LAST_ERROR;
}

/* Reads the packet. 0 for what is none of ours: other protocols, broken headers, later fragments of datagrams that weren't
 * seen. */
__noinline int sm_parse(struct __sk_buff *skb)
{
	struct sm_nat_work *w = sm_work();
	struct sm_packet *p;

	if (!w)
		return 0;
	p = &w->p;
	__builtin_memset(p, 0, sizeof(*p));
	p->v4 = skb->protocol == bpf_htons(ETH_P_IP);
	p->l3 = sm_nat_l2;
	if (!(p->v4 ? sm_parse_v4(skb, p) : sm_parse_v6(skb, p)))
		return 0;
	if (p->later_fragment) {
		struct sm_frag_key key;
		struct sm_frag *ports;

		sm_frag_key_of(p, &key);
		ports = bpf_map_lookup_elem(&sm_frags, &key);
		if (!ports)
			return 0;
		p->sport = ports->sport;
		p->dport = ports->dport;
		p->proto = ports->proto; /* in IPv6 the first fragment alone says it, behind its extension headers */
		return 1;
	}
	if (p->proto == (p->v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6)) {
		if (p->first_fragment || !sm_is_icmp_error(skb, p))
			return 0;
		p->icmp = p->l4;
		p->l3 = p->icmp + 8;
		if (!(p->v4 ? sm_parse_v4(skb, p) : sm_parse_v6(skb, p)) || p->later_fragment)
			return 0;
		p->first_fragment = 0;
	}
	return sm_parse_ports(skb, p);
}

/* Notes the ports of a datagram whose first fragment is about to be changed, for the others. */
static __always_inline void sm_note_fragment(const struct sm_packet *p)
{
	struct sm_frag ports = { .sport = p->sport, .dport = p->dport, .proto = p->proto };
	struct sm_frag_key key;

	sm_frag_key_of(p, &key);
	bpf_map_update_elem(&sm_frags, &key, &ports, BPF_ANY);
}

/* Verdicts: what is attached after us has its turn, or the packet is dropped. */
#define SM_NEXT (-1) /* TC_ACT_UNSPEC, TCX_NEXT */
#define SM_DROP 2    /* TC_ACT_SHOT */

#define SM_SRC 0
#define SM_DST 1

/* Changes one address of the IP header at l3. sum is the offset of the checksum that covers it through the pseudo header or,
 * in a quoted IPv6 header, as data; 0: none does. */
static __always_inline int sm_set_addr(struct __sk_buff *skb, bool v4, __u32 l3, __u32 which, const struct sm_ip *from,
				       const struct sm_ip *to, __u32 sum, __u64 sum_flags)
{
	__s64 diff;

	if (v4) {
		if (sum)
			bpf_l4_csum_replace(skb, sum, from->word[3], to->word[3], sum_flags | 4);
		bpf_l3_csum_replace(skb, l3 + offsetof(struct iphdr, check), from->word[3], to->word[3], 4);
		return bpf_skb_store_bytes(skb, l3 + (which == SM_DST ? offsetof(struct iphdr, daddr) : offsetof(struct iphdr, saddr)),
					   &to->word[3], 4, 0);
	}
	diff = bpf_csum_diff((__be32 *)from->word, 16, (__be32 *)to->word, 16, 0);
	if (sum)
		bpf_l4_csum_replace(skb, sum, 0, diff, sum_flags);
	/* A device's sum over the whole packet stays right: the address and the checksum that covers it change by the same. With
	 * BPF_F_PSEUDO_HDR the helper believes that an IP header's checksum makes up for the address, which IPv6 hasn't. */
	if (!sum || sum_flags & BPF_F_PSEUDO_HDR)
		bpf_csum_update(skb, diff);
	return bpf_skb_store_bytes(skb, l3 + (which == SM_DST ? offsetof(struct ipv6hdr, daddr) : offsetof(struct ipv6hdr, saddr)),
				   to->word, 16, 0);
}

static __always_inline int sm_set_port(struct __sk_buff *skb, __u32 l4, __u32 which, __u16 from, __u16 to, __u32 sum, __u64 sum_flags)
{
	__be16 was = bpf_htons(from), is = bpf_htons(to);

	if (from == to)
		return 0;
	if (sum)
		bpf_l4_csum_replace(skb, sum, was, is, sum_flags | 2);
	return bpf_skb_store_bytes(skb, l4 + (which == SM_DST ? 2 : 0), &is, 2, 0);
}

/* Gives the packet the source or destination w->to and port. For an ICMP error which is the side of the quoted packet. */
__noinline int sm_translate(struct __sk_buff *skb, __u32 which, __u32 port)
{
	struct sm_nat_work *w = sm_work();
	const struct sm_packet *p;
	const struct sm_ip *from;
	__u16 from_port;
	__u64 flags;
	__u32 sum;

	if (!w)
		return -1;
	p = &w->p;
	from = which == SM_DST ? &p->dst : &p->src;
	from_port = which == SM_DST ? p->dport : p->sport;
	flags = p->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	if (p->icmp) {
		sum = p->icmp + 2;
		/* In a quoted IPv4 packet the header's own checksum makes up for the address. The quoted TCP or UDP checksum is
		 * left alone: nobody can verify it over a part of a packet. */
		sm_set_port(skb, p->l4, which, from_port, port, sum, 0);
		return sm_set_addr(skb, p->v4, p->l3, which, from, &w->to, p->v4 ? 0 : sum, 0);
	}
	if (p->later_fragment)
		return sm_set_addr(skb, p->v4, p->l3, which, from, &w->to, 0, 0);
	if (p->first_fragment)
		sm_note_fragment(p);
	sum = p->l4 + (p->proto == IPPROTO_UDP ? offsetof(struct udphdr, check) : offsetof(struct tcphdr, check));
	sm_set_port(skb, p->l4, which, from_port, port, sum, flags);
	return sm_set_addr(skb, p->v4, p->l3, which, from, &w->to, sum, flags | BPF_F_PSEUDO_HDR);
}

/* Another port at an address that stays. */
static __always_inline int sm_translate_port(struct __sk_buff *skb, struct sm_nat_work *w, __u32 which, __u16 port)
{
	if (port == (which == SM_DST ? w->p.dport : w->p.sport))
		return 0;
	w->to = which == SM_DST ? w->p.dst : w->p.src;
	return sm_translate(skb, which, port);
}

/* Gives an ICMP error itself the source or destination w->to. */
__noinline int sm_readdress_error(struct __sk_buff *skb, __u32 which)
{
	struct sm_nat_work *w = sm_work();
	__u32 l3 = sm_nat_l2, at;
	struct sm_ip from;

	if (!w)
		return -1;
	if (w->p.v4) {
		__be32 v4;

		at = l3 + (which == SM_DST ? offsetof(struct iphdr, daddr) : offsetof(struct iphdr, saddr));
		if (bpf_skb_load_bytes(skb, at, &v4, sizeof(v4)))
			return -1;
		from = sm_mapped(v4);
		return sm_set_addr(skb, true, l3, which, &from, &w->to, 0, 0);
	}
	at = l3 + (which == SM_DST ? offsetof(struct ipv6hdr, daddr) : offsetof(struct ipv6hdr, saddr));
	if (bpf_skb_load_bytes(skb, at, &from, sizeof(from)))
		return -1;
	return sm_set_addr(skb, false, l3, which, &from, &w->to, w->p.icmp + 2, BPF_F_PSEUDO_HDR);
}

#endif
